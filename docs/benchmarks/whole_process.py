"""Times whole merges by `mergekit-yaml`, side by side; prints Markdown tables.

    python docs/benchmarks/whole_process.py STORE [--rounds 5] [--touch-gb 6]

If STORE does not exist, store.py makes it. Each round runs every configuration once.
The order rotates from round to round, so that other load on the machine affects all of
them alike; ratios are taken within a round. So that a run does not depend on the one
before it, checkpoints are locked in the page cache, an untimed round reads all other
files, and free memory is touched before each run. Own memory is the memory of a process
that is not mapped from files (anonymous pages), sampled every 20 ms. Resident memory
includes mapped checkpoint files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import store
import yaml

# Of each model; its value does not affect the time.
WEIGHT = 0.2


@dataclass(frozen=True)
class Run:
    """One process: wall clock and CPU time in seconds, peak memory in bytes."""

    wall_s: float
    cpu_s: float
    own: int
    resident: int


def configurations(base: Path, tuned: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the merges to compare, by the names of their rows."""

    def merge(method: str, *, weights: bool = False, **settings: Any) -> dict[str, Any]:
        models: list[dict[str, Any]] = [{"model": str(path)} for path in tuned]
        if weights:
            for model in models:
                model["parameters"] = {"weight": WEIGHT}
        config = {"merge_method": method, "base_model": str(base), "models": models}
        return {**config, "dtype": "bfloat16", "parameters": settings}

    def linear() -> dict[str, Any]:
        config = merge("linear", weights=True)
        config["models"].append({"model": str(base), "parameters": {"weight": 0.0}})
        return config

    alone = {"merge_method": "passthrough", "models": [{"model": str(base)}]}
    return {
        "metagpt": merge("metagpt"),
        "metagpt, granularity tensor": merge("metagpt", granularity="tensor"),
        "task_arithmetic": merge("task_arithmetic", weights=True),
        "linear": linear(),
        "passthrough": {**alone, "dtype": "bfloat16"},
        "metagpt_ties": merge("metagpt_ties", density=0.55),
        "ties": merge("ties", weights=True, density=0.55),
        "metagpt, second merge": merge("metagpt"),
    }


def run(config: Mapping[str, Any], folder: Path, cache: str) -> Run:
    """Merge in a fresh process and remove the output."""
    file, out = folder / "config.yml", folder / "out"
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    script = Path(sysconfig.get_path("scripts"), "mergekit-yaml")
    command = [script, file, out, "--no-copy-tokenizer", "--quiet"]
    settings = {"MERGEKIT_METAGPT_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    before = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
        )
        own = 0
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            own = max(own, anonymous(process.pid))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - before
    if process.returncode:
        raise RuntimeError((folder / "log").read_text())
    shutil.rmtree(out)
    os.sync()  # so that pending writes do not slow the next run
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, own, usage.ru_maxrss * 1024)


def anonymous(process: int) -> int:
    """Return the bytes of a process that are not mapped from files; 0 after its end."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(next(sizes, "0")) * 1024


def measure(
    configs: Mapping[str, Mapping[str, Any]], rounds: int, touch_gb: float
) -> dict[str, list[Run]]:
    """Run everything `rounds` times, after one untimed round."""
    runs: dict[str, list[Run]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        cache_folder = str(folder / "cache")
        names = list(configs)
        for number in range(rounds + 1):
            turn = number % len(names)
            for row in names[turn:] + names[:turn]:
                cache = cache_folder if row.endswith("second merge") else "0"
                machine.touch_memory(touch_gb)
                done = run(configs[row], folder, cache)
                if number:
                    runs[row].append(done)
    return runs


def tables(measured: Mapping[str, Sequence[Run]]) -> str:
    """Write the medians of every row, and the ratios within rounds."""
    lines = [
        "| merge | wall clock, s (range) | CPU, s | own memory, GB | resident, GB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in measured.items():
        walls = [run.wall_s for run in runs]
        cpu = statistics.median(run.cpu_s for run in runs)
        own = max(run.own for run in runs) / 1e9
        resident = max(run.resident for run in runs) / 1e9
        lines.append(
            f"| {name} | {statistics.median(walls):.2f} ({min(walls):.2f} to "
            f"{max(walls):.2f}) | {cpu:.1f} | {own:.2f} | {resident:.2f} |"
        )
    lines += [
        "",
        "| ratio, round by round | median | range | own memory | resident |",
        "|---|---|---|---|---|",
    ]
    for first, second in (
        ("metagpt", "task_arithmetic"),
        ("metagpt", "linear"),
        ("metagpt", "passthrough"),
        ("metagpt", "metagpt, granularity tensor"),
        ("metagpt, second merge", "metagpt"),
        ("metagpt, second merge", "task_arithmetic"),
        ("metagpt_ties", "ties"),
    ):
        if first not in measured or second not in measured:
            continue
        ratios = [
            one.wall_s / other.wall_s
            for one, other in zip(measured[first], measured[second], strict=True)
        ]
        pair = [measured[first], measured[second]]
        own = [max(run.own for run in runs) for runs in pair]
        resident = [max(run.resident for run in runs) for runs in pair]
        lines.append(
            f"| {first} / {second} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {own[0] / own[1]:.2f} | "
            f"{resident[0] / resident[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure in rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=int, default=3, help="number of fine-tunes")
    parser.add_argument("--only", nargs="*", help="rows to run")
    parser.add_argument("--touch-gb", type=float, default=machine.TOUCHED_GB)
    given = parser.parse_args()
    base, tuned = store.make(given.store, given.models)
    configs = configurations(base.resolve(), [path.resolve() for path in tuned])
    machine.hold(store.files_of([base, *tuned]))
    if given.only:
        configs = {name: configs[name] for name in given.only}
    print(machine.describe())
    print(
        f"{given.models + 1} checkpoints; {given.rounds} rounds; {given.touch_gb:g} GB "
        "of free memory touched before each run\n"
    )
    print(tables(measure(configs, given.rounds, given.touch_gb)))


if __name__ == "__main__":
    main()
