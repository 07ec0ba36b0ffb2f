"""Measures where whole merges spend their time; prints Markdown.

    python docs/benchmarks/phases.py STORE [--rounds 3] [--touch-gb 6]

Runs merges of whole_process.py in turn, each in a fresh process in which functions of
mergekit are wrapped with a timer. The checkpoints are locked in the page cache. The
phases are imports, our scan, the merge method without the scan, reading, writing, and
the rest (planning, and Python's exit).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import machine
import store
import whole_process
import yaml

METHODS = (
    "metagpt",
    "metagpt, granularity tensor",
    "task_arithmetic",
    "linear",
    "passthrough",
)
PHASES = ("imports", "scan", "sums", "reading", "writing", "rest")

# Merges sys.argv[1] into sys.argv[2]; writes seconds per phase to sys.argv[3].
MERGE = """
import atexit, json, sys, time

began, spent = time.perf_counter(), {}

def timed(owner, name, phase):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[phase] = spent.get(phase, 0) + time.perf_counter() - start
    setattr(owner, name, wrapper)

from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.scripts import run_yaml

spent["imports"] = time.perf_counter() - began
from mergekit_metagpt.scanning import once

timed(ExecuteMergeMethodTask, "execute", "method")
timed(once, "measure", "scan")
timed(LazyTensorLoader, "get_tensor", "reading")
timed(TensorWriter, "save_tensor", "writing")
timed(TensorWriter, "finalize", "writing")

config, out, answer = sys.argv[1:]

def end():
    spent["sums"] = spent.pop("method", 0) - spent.get("scan", 0)
    with open(answer, "w") as stream:
        json.dump(spent, stream)

atexit.register(end)
sys.argv = ["mergekit-yaml", config, out, "--no-copy-tokenizer", "--quiet"]
run_yaml.main()
"""


def run(config: dict[str, object], folder: Path) -> dict[str, float]:
    """Merge once; return seconds per phase."""
    file, out, answer = folder / "config.yml", folder / "out", folder / "phases.json"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", MERGE, file, out, answer],
        env={**os.environ, "MERGEKIT_METAGPT_CACHE": "0", "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    wall = time.perf_counter() - start
    shutil.rmtree(out)
    os.sync()
    spent = json.loads(answer.read_text())
    phases = {phase: spent.get(phase, 0.0) for phase in PHASES[:-1]}
    return {**phases, "rest": wall - sum(phases.values())}


def row(name: str, runs: Sequence[dict[str, float]]) -> str:
    """Write the medians of a merge's phases and of their sum."""
    cells = [statistics.median(run[phase] for run in runs) for phase in PHASES]
    total = statistics.median(sum(run.values()) for run in runs)
    return f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {total:.2f} |"


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--touch-gb", type=float, default=machine.TOUCHED_GB)
    given = parser.parse_args()
    base, tuned = store.make(given.store)
    configs = whole_process.configurations(
        base.resolve(), [path.resolve() for path in tuned]
    )
    machine.hold(store.files_of([base, *tuned]))
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for number in range(given.rounds + 1):
            for name in METHODS:
                machine.touch_memory(given.touch_gb)
                spent = run(configs[name], Path(folder))
                if number:  # the first round reads Python's and mergekit's files
                    measured[name].append(spent)
    print(machine.describe() + "\n")
    print(f"| merge | {' | '.join(PHASES)} | all, s |\n|---|{'---|' * 7}")
    for name, runs in measured.items():
        print(row(name, runs))


if __name__ == "__main__":
    main()
