"""Compares the detailed scan with the plain one; prints Markdown.

    python docs/benchmarks/detailed.py STORE [--rounds 5]

The detailed scan also sums inner products of task vectors, for cosines. Each round runs
both in one process on a warm page cache, odd rounds in the other order: with the 3
models of the store, and with 12 (links to them), by the compiled loops and by torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import machine
import store

os.environ["MERGEKIT_METAGPT_CACHE"] = "0"

from mergekit_metagpt.arithmetic import compiled
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.scanning.one_pass import scan_checkpoints


def ratios(folders: list[Path], rounds: int) -> tuple[list[float], list[float]]:
    """Time both scans side by side: seconds of the plain one, and ratios."""
    base, *models = (open_checkpoint(folder) for folder in folders)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for gram in (False, True) if number % 2 else (True, False):
            before = time.perf_counter()
            scan_checkpoints(base, models, gram=gram)
            if number:  # the first round warms the page cache
                seconds[gram].append(time.perf_counter() - before)
    plain = seconds[False]
    return plain, [d / p for d, p in zip(seconds[True], plain, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    base, models = store.make(given.store)
    print(machine.describe(), "\n")
    print("| models | loops | plain scan, s | detailed / plain, median (range) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=given.store.parent) as place:
        links = []
        for number in range(12):
            links.append(Path(place) / str(number))
            links[-1].mkdir()
            for file in models[number % len(models)].iterdir():
                (links[-1] / file.name).hardlink_to(file)
        loops = compiled._loops
        for name, by in (("compiled", loops), ("torch", None)):
            compiled._loops = by
            for tuned in (links[:3], links):
                plain, ratio = ratios([base, *tuned], given.rounds)
                print(
                    f"| {len(tuned)} | {name} | {statistics.median(plain):.2f} "
                    f"| {statistics.median(ratio):.2f} "
                    f"({min(ratio):.2f} to {max(ratio):.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
