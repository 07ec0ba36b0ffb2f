"""Measures what autoload adds to imports, in fresh processes; prints Markdown tables.

    python docs/benchmarks/import_time.py [PAIRS]

Each round starts one process per statement and switch, so that other load on the
machine affects all of them alike. On a busy machine, noise hides the differences
between whole imports, which take a second or more. The last table therefore times only
the calls that autoload adds, inside one import. Bytecode is cached in a folder of the
benchmark, as it is for any package that pip has installed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

STATEMENTS = ("import torch", "import mergekit.merge_methods")
SWITCHES = ("MERGEKIT_METAGPT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
CONDITIONS = {"on": {}, **{f"`{name}=0`": {name: "0"} for name in SWITCHES}}

CLOCK = """
import time

def clock():
    return time.perf_counter(), time.process_time()
"""

# Prints wall clock and CPU time of one statement, in seconds.
WHOLE = """
before = clock()
{statement}
print(*(now - then for now, then in zip(clock(), before)))
"""

# The same for each call that autoload adds, with torch's own autoload off.
PARTS = """
import sys, torch
from importlib.metadata import entry_points

def took(before):
    return [now - then for now, then in zip(clock(), before)]

assert not {"wrapt", "mergekit_metagpt"} & sys.modules.keys()
before = clock()
entries = entry_points(group="torch.backends")
lookup = took(before)

before = clock()
entry = entries["mergekit_metagpt"].load()
loading = took(before)

from mergekit_metagpt import autoload

def timed_hook(registry, hook=autoload._register):
    global hooked
    before = clock()
    hook(registry)
    hooked = took(before)

autoload._register = timed_hook
before = clock()
entry()
calling = took(before)

import mergekit.merge_methods

assert autoload.failure is None, autoload.failure
ours = [sum(both) for both in zip(loading, calling)]
print(*lookup, *ours, *hooked, *(sum(both) for both in zip(ours, hooked)))
"""
PART_NAMES = (
    "torch's own look-up of entry points, in every environment",
    "ours within `import torch`",
    "our hook within `import mergekit.merge_methods`",
    "ours, both",
)

Times = list[float]


def measure(code: str, switches: Mapping[str, str], bytecode: str) -> Times:
    """Run code in a fresh process; return its milliseconds: wall, CPU, wall, ..."""
    dropped = (*SWITCHES, "PYTHONDONTWRITEBYTECODE")
    clean = {key: value for key, value in os.environ.items() if key not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", CLOCK + code],
        env={**clean, **switches, "PYTHONPYCACHEPREFIX": bytecode},
        cwd=sys.prefix,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [1e3 * float(seconds) for seconds in done.stdout.split()]


def spread(values: Sequence[float]) -> str:
    """Write the median, the quartiles and the minimum."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f}; {min(values):.1f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measure_all(pairs: int, bytecode: str) -> Iterator[tuple[tuple[str, str], Times]]:
    """Measure everything in turn, `pairs` times; yield each key with its times."""
    for number in range(-1, pairs):  # round -1 fills the caches
        for statement in STATEMENTS:
            for label, switches in CONDITIONS.items():
                times = measure(WHOLE.format(statement=statement), switches, bytecode)
                if number >= 0:
                    yield (statement, label), times
        parts = measure(PARTS, {SWITCHES[1]: "0"}, bytecode)
        if number >= 0:
            for at, name in enumerate(PART_NAMES):
                yield ("parts", name), parts[2 * at : 2 * at + 2]
        print(f"round {number + 1} of {pairs}", file=sys.stderr)


def main(pairs: int) -> None:
    """Measure and print the tables."""
    measured: dict[tuple[str, str], list[Times]] = {}
    with tempfile.TemporaryDirectory() as bytecode:
        for key, times in measure_all(pairs, bytecode):
            measured.setdefault(key, []).append(times)

    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {version('torch')}, mergekit "
        f"{version('mergekit')}; {pairs} pairs, bytecode and page cache warm. "
        "Milliseconds: median (quartiles; least).\n"
    )
    whole, differences = [], []
    for statement in STATEMENTS:
        on = measured[statement, "on"]
        for label in CONDITIONS:
            times = measured[statement, label]
            columns = map(spread, zip(*times, strict=True))
            whole.append([f"`{statement}`", label, *columns])
            if label != "on":
                pairwise = [
                    [a - b for a, b in zip(*pair, strict=True)]
                    for pair in zip(on, times, strict=True)
                ]
                columns = map(spread, zip(*pairwise, strict=True))
                differences.append([f"`{statement}`", f"on less {label}", *columns])
    clocks = ["wall clock", "CPU"]
    print(table(["statement", "autoload", *clocks], whole))
    print(table(["statement", "difference, pair by pair", *clocks], differences))
    parts = [
        [name, *map(spread, zip(*measured["parts", name], strict=True))]
        for name in PART_NAMES
    ]
    print(table(["added by autoload, timed alone", *clocks], parts))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
