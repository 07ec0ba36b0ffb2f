"""Times merges of two sizes: what a further GB of checkpoints costs; prints Markdown.

    python docs/benchmarks/marginal.py STORE [--rounds 5]

Whole processes of `mergekit-yaml` on a base and three fine-tunes of 0.22 and of 1.1 B
parameters. The marginal cost is the slope between the two: seconds per GB, without
imports and the rest of a start. Each round runs every method on both sizes, and ratios
of slopes are taken within a round. The files are locked in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import machine
import store
import whole_process

SCALES = (0.1, 1.0)
METHODS = ("metagpt", "task_arithmetic", "passthrough")


def slopes(given: argparse.Namespace) -> dict[str, list[float]]:
    """Measure seconds per GB of checkpoints by method, round by round."""
    sizes, configs, held = [], [], []
    for scale in SCALES:
        folder = given.store if scale == 1 else given.store / f"scale-{scale:g}"
        base, tuned = store.make(folder, 3, scale)
        models = [path.resolve() for path in (base, *tuned)]
        files = store.files_of(models)
        sizes.append(sum(file.stat().st_size for file in files) / 1e9)
        held += files
        configs.append(whole_process.configurations(models[0], models[1:]))
    machine.hold(held)
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        for number in range(given.rounds + 1):
            turn = number % len(METHODS)
            for method in METHODS[turn:] + METHODS[:turn]:
                times = []
                for config in configs:
                    machine.touch_memory(given.touch_gb)
                    took = whole_process.run(config[method], Path(name), "0")
                    times.append(took.wall_s)
                if number:  # the first round reads Python's and mergekit's files
                    slope = (times[1] - times[0]) / (sizes[1] - sizes[0])
                    found[method].append(slope)
    return found


def shown(values: list[float]) -> str:
    """Write the median and the range."""
    middle = statistics.median(values)
    return f"{middle:.2f} | {min(values):.2f} to {max(values):.2f} |"


def main() -> None:
    """Measure in rounds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--touch-gb", type=float, default=machine.TOUCHED_GB)
    given = parser.parse_args()
    found = slopes(given)
    print(machine.describe())
    print("\n| merge | s per GB of checkpoints | range |\n|---|---|---|")
    for method, values in found.items():
        print(f"| {method} | {shown(values)}")
    print("\n| ratio, round by round | median | range |\n|---|---|---|")
    for other in METHODS[1:]:
        pairs = zip(found["metagpt"], found[other], strict=True)
        print(f"| metagpt / {other} | {shown([one / two for one, two in pairs])}")


if __name__ == "__main__":
    main()
