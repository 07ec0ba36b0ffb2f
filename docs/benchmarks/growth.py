"""Measures how time and memory grow with size and number of models; prints Markdown.

    python docs/benchmarks/growth.py STORE

Checkpoints: a base and three fine-tunes of 0.2 to 1.1 B parameters, and 2 to 12
fine-tunes of the smallest. For each set it measures one scan in a fresh process (time
and additional memory) and whole merges by metagpt and task_arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import store
import whole_process

SCALES = (0.1, 0.3, 0.6, 1.0)
COUNTS = (2, 4, 8, 12)

# Scans once untimed and once timed; prints seconds and bytes of additional memory.
SCAN = """
import json, os, sys, threading, time
sys.path.insert(0, {folder!r})
from whole_process import anonymous
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.scanning.one_pass import scan_checkpoints

base, *models = map(open_checkpoint, json.loads(sys.argv[1]))
scan_checkpoints(base, models)
before, peak, done = anonymous(os.getpid()), [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous(os.getpid()))

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
scan_checkpoints(base, models)
took = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps([took, max(0, peak[0] - before)]))
"""


def scan(models: list[Path]) -> tuple[float, int]:
    """Measure seconds and bytes of one scan in a fresh process, page cache warm."""
    code = SCAN.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([str(path) for path in models])],
        env={**os.environ, "MERGEKIT_METAGPT_CACHE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    took, memory = json.loads(done.stdout.splitlines()[-1])
    return took, memory


def row(folder: Path, count: int, scale: float) -> str:
    """Measure one set of checkpoints and return its row of the table."""
    base, tuned = store.make(folder, count, scale)
    base, tuned = base.resolve(), [path.resolve() for path in tuned[:count]]
    models = [base, *tuned]
    files = store.files_of(models)
    machine.hold(files)
    size = sum(file.stat().st_size for file in files)
    took, memory = scan(models)
    configs = whole_process.configurations(base, tuned)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        # Run each twice: the first run reads Python's and mergekit's files.
        runs = {}
        for method in ("metagpt", "task_arithmetic") * 2:
            machine.touch_memory()
            runs[method] = whole_process.run(configs[method], Path(name), "0")
    ours, theirs = runs["metagpt"], runs["task_arithmetic"]
    return (
        f"| {count} | {size / len(models) / 2e9:.2f} | {size / 1e9:.1f} | {took:.2f} | "
        f"{size / took / 1e9:.1f} | {memory / 1e6:.0f} | {ours.wall_s:.1f} | "
        f"{theirs.wall_s:.1f} | {ours.own / 1e9:.2f} | {theirs.own / 1e9:.2f} |"
    )


def main() -> None:
    """Measure all sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    given = parser.parse_args()
    print(machine.describe() + "\n")
    print(
        "| fine-tunes | parameters each, B | read, GB | scan, s | GB/s | scan's memory "
        "in MB | metagpt, s | task_arithmetic, s | own memory, GB | "
        "task_arithmetic's |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for scale in SCALES:
        folder = given.store / f"scale-{scale:g}" if scale != 1 else given.store
        print(row(folder, 3, scale), flush=True)
    for count in COUNTS:
        print(row(given.store / f"scale-{SCALES[0]:g}", count, SCALES[0]), flush=True)


if __name__ == "__main__":
    main()
