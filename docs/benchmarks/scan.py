"""Measures the scan against memory bandwidth and against reading; prints Markdown.

    python docs/benchmarks/scan.py STORE [--rounds 5]

In every round, in one process: the copy of a large tensor by all CPUs (bytes read and
written), the scan with 1, 2, ... workers on a warm page cache (bytes of checkpoints),
and, with the files dropped from the page cache first, reading them all once and
scanning them, in turns the one and the other first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
import store
import torch

os.environ["MERGEKIT_METAGPT_CACHE"] = "0"

from mergekit_metagpt import scan

BLOCK = 1 << 24


def seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def copy_rate(elements: int = 1 << 27) -> float:
    """Bytes read and written per second by the copy of a large float32 tensor."""
    source = torch.ones(elements)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def files_of(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache; needs no rights but to read them."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read(files: Sequence[Path], workers: int) -> None:
    """Read files once, as many at a time as the scan has workers."""

    def one(file: Path) -> None:
        buffer = bytearray(BLOCK)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(workers) as executor:
        list(executor.map(one, files))


def rows(found: dict[str, list[float]], size: int) -> Iterator[str]:
    yield "| what | median, s | range | GB/s |\n|---|---|---|---|"
    for name, values in found.items():
        median = statistics.median(values)
        yield (
            f"| {name} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | "
            f"{size / median / 1e9:.2f} |"
        )


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--no-cold", action="store_true")
    given = parser.parse_args()
    base, tuned = store.make(given.store, given.models)
    files = files_of([base, *tuned])
    size = sum(file.stat().st_size for file in files)
    cpus = len(os.sched_getaffinity(0))
    workers = [1 << n for n in range(cpus.bit_length()) if 1 << n <= cpus]
    found: dict[str, list[float]] = {}
    copies, shares = [], []
    read(files, cpus)
    for number in range(given.rounds):
        copies.append(copy_rate())
        for count in workers:
            took = seconds(lambda n=count: scan(base, tuned, workers=n))
            found.setdefault(f"scan, {count} workers, warm", []).append(took)
        shares.append(size / took / copies[-1])
        if given.no_cold:
            continue
        cold: dict[str, Callable[[], object]] = {
            "reading once, cold": lambda: read(files, cpus),
            "scan, cold": lambda: scan(base, tuned),
        }
        for name in sorted(cold, reverse=number % 2 == 1):
            drop(files)
            found.setdefault(name, []).append(seconds(cold[name]))
        read(files, cpus)
    print(machine.describe())
    print(f"{len(tuned) + 1} checkpoints, {size / 1e9:.1f} GB; {given.rounds} rounds\n")
    print("\n".join(rows(found, size)))
    print(f"\nCopy, GB/s: {shown([rate / 1e9 for rate in copies])}")
    print(f"Scan with all workers / copy: {shown(shares)}")
    if not given.no_cold:
        pairs = zip(found["scan, cold"], found["reading once, cold"], strict=True)
        print(f"Cold scan / cold reading: {shown([a / b for a, b in pairs])}")


if __name__ == "__main__":
    main()
