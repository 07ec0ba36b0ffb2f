"""Compares the scan with memory bandwidth and with reading; prints Markdown.

    python docs/benchmarks/scan.py STORE [--rounds 5]

Each round measures, in one process:

- the copy of a large tensor by all CPUs (bytes read and written);
- the scan with 1, 2, 4, ... workers on a warm page cache (bytes of checkpoints);
- reading all files once, and scanning them, each after the files were dropped from the
  page cache. Odd rounds swap the order of the two.
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

from mergekit_metagpt.checkpoints.opening import open_checkpoint

# The public `scan` would remember its results.
from mergekit_metagpt.scanning.one_pass import scan_checkpoints

BLOCK = 1 << 24


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def copy_rate(elements: int = 1 << 27) -> float:
    """Measure the copy of a large float32 tensor: bytes read and written per second."""
    source = torch.ones(elements)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def drop(files: Sequence[Path]) -> None:
    """Drop files from the page cache; needs only the right to read them."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read(files: Sequence[Path], workers: int) -> None:
    """Read files once, `workers` files at a time."""

    def one(file: Path) -> None:
        buffer = bytearray(BLOCK)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(workers) as executor:
        list(executor.map(one, files))


def rows(times: dict[str, list[float]], size: int) -> Iterator[str]:
    """Yield the lines of the table; `size` is in bytes."""
    yield "| what | median, s | range | GB/s |\n|---|---|---|---|"
    for name, values in times.items():
        median = statistics.median(values)
        yield (
            f"| {name} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | "
            f"{size / median / 1e9:.2f} |"
        )


def shown(values: Sequence[float]) -> str:
    """Write a median and its range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=int, default=3, help="number of fine-tunes")
    parser.add_argument("--no-cold", action="store_true", help="warm cache only")
    given = parser.parse_args()
    base, tuned = store.make(given.store, given.models)
    files = store.files_of([base, *tuned])
    size = sum(file.stat().st_size for file in files)
    models = [open_checkpoint(folder) for folder in (base, *tuned)]
    cpus = len(os.sched_getaffinity(0))
    workers = [1 << n for n in range(cpus.bit_length()) if 1 << n <= cpus]
    times: dict[str, list[float]] = {}
    copies, shares = [], []
    read(files, cpus)
    for number in range(given.rounds):
        copies.append(copy_rate())
        for count in workers:
            took = seconds(
                lambda n=count: scan_checkpoints(models[0], models[1:], workers=n)
            )
            times.setdefault(f"scan, {count} workers, warm", []).append(took)
        shares.append(size / took / copies[-1])
        if given.no_cold:
            continue
        cold: dict[str, Callable[[], object]] = {
            "reading once, cold": lambda: read(files, cpus),
            "scan, cold": lambda: scan_checkpoints(models[0], models[1:]),
        }
        for name in sorted(cold, reverse=number % 2 == 1):
            drop(files)
            times.setdefault(name, []).append(seconds(cold[name]))
        read(files, cpus)
    print(machine.describe())
    print(f"{len(tuned) + 1} checkpoints, {size / 1e9:.1f} GB; {given.rounds} rounds\n")
    print("\n".join(rows(times, size)))
    print(f"\nCopy, GB/s: {shown([rate / 1e9 for rate in copies])}")
    print(f"Scan with all workers / copy: {shown(shares)}")
    if not given.no_cold:
        pairs = zip(times["scan, cold"], times["reading once, cold"], strict=True)
        print(f"Cold scan / cold reading: {shown([a / b for a, b in pairs])}")


if __name__ == "__main__":
    main()
