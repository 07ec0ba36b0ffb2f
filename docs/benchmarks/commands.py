"""Compares our commands with mergekit's; prints Markdown.

    python docs/benchmarks/commands.py STORE [--rounds 5]

Each round runs whole processes on the same YAML, in turn: `mergekit-yaml`,
`mergekit-metagpt merge`, `mergekit-metagpt inspect`, and `merge` once more with what
`inspect` left in the cache. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import store

CONFIG = """\
merge_method: metagpt
base_model: {base}
models:
{models}
dtype: bfloat16
"""


def run(cache: str, *command: str | Path) -> tuple[float, float]:
    """Run a command: seconds by the clock, and of the CPUs."""
    machine.touch_memory()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    script = Path(sys.executable).with_name(str(command[0]))
    subprocess.run(
        [script, *command[1:]],
        check=True,
        capture_output=True,
        env={**os.environ, "MERGEKIT_METAGPT_CACHE": cache, "HF_HUB_OFFLINE": "1"},
    )
    took = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def rounds(
    given: argparse.Namespace, place: Path
) -> dict[str, list[tuple[float, float]]]:
    """Run all commands in every round."""
    base, tuned = store.make(given.store.resolve())
    machine.hold(store.files_of([base, *tuned]))
    config, out, cache = place / "merge.yml", place / "out", place / "cache"
    models = "\n".join(f"  - model: {model}" for model in tuned)
    config.write_text(CONFIG.format(base=base, models=models))
    quiet = ("--quiet", "--no-copy-tokenizer")
    merge = ("mergekit-metagpt", "merge", config, out, *quiet)
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(given.rounds + 1):
        for name, kept, command in (
            ("mergekit-yaml", "0", ("mergekit-yaml", config, out, *quiet)),
            ("merge", "0", merge),
            ("inspect", str(cache), ("mergekit-metagpt", "inspect", config)),
            ("merge after inspect", str(cache), merge),
        ):
            took = run(kept, *command)
            shutil.rmtree(out, ignore_errors=True)
            if number:  # the first round reads Python's and mergekit's files
                times.setdefault(name, []).append(took)
        shutil.rmtree(cache)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.store.resolve().parent) as place:
        times = rounds(given, Path(place))
    print(machine.describe(), "\n")
    print(
        "| command | wall clock, s (range) | CPU, s | / mergekit-yaml by clock (range) "
        "| by CPU |"
    )
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        wall, cpu = zip(*taken, strict=True)
        by = [
            [
                mine[kind] / theirs[kind]
                for mine, theirs in zip(taken, times["mergekit-yaml"], strict=True)
            ]
            for kind in (0, 1)
        ]
        print(
            f"| `{name}` | {statistics.median(wall):.1f} ({min(wall):.1f} to "
            f"{max(wall):.1f}) | {statistics.median(cpu):.1f} | "
            f"{statistics.median(by[0]):.2f} ({min(by[0]):.2f} to {max(by[0]):.2f}) | "
            f"{statistics.median(by[1]):.2f} |"
        )


if __name__ == "__main__":
    main()
