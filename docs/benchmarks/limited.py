"""Times merges with a page cache that is smaller than the files; prints Markdown.

    python docs/benchmarks/limited.py STORE [--models 3] [--disk-mb-s 500]

Runs in a new control group (this needs root) with a limit on memory that includes the
page cache, so that every pass over the store reads the disk; `--disk-mb-s` also limits
how fast it is read. Each round reads all files once, scans them, and merges them by
metagpt, by metagpt with a sample of 0.02 and by task_arithmetic. Ratios are taken
within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import scan
import store
import whole_process

GROUPS = Path("/sys/fs/cgroup")
SAMPLED = "metagpt, sample 0.02"
METHODS = ("metagpt", SAMPLED, "task_arithmetic")


def join_group(limit: int, disk: tuple[Path, int] | None = None) -> None:
    """Move this process to a new control group.

    Args:
        limit: bytes of memory, at most.
        disk: a folder, and bytes a second at which its disk is read at most.
    """
    many = (GROUPS / "memory").is_dir()  # version 1: a tree for each kind of limit
    limits = {"memory": ("memory.limit_in_bytes" if many else "memory.max", str(limit))}
    if disk is not None:
        number = whole_disk(disk[0])
        limits["blkio"] = (
            ("blkio.throttle.read_bps_device", f"{number} {disk[1]}")
            if many
            else ("io.max", f"{number} rbps={disk[1]}")
        )
    for kind, (name, value) in limits.items():
        home = (GROUPS / kind if many else GROUPS) / f"metagpt-{os.getpid()}"
        home.mkdir(exist_ok=True)
        (home / name).write_text(value)
        (home / "cgroup.procs").write_text(str(os.getpid()))


def whole_disk(folder: Path) -> str:
    """Return the number of the disk, not the partition, that holds a folder."""
    device = folder.stat().st_dev
    at = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    at = at.parent if (at / "partition").exists() else at
    return (at / "dev").read_text().strip()


def seconds_of_scan(base: Path, tuned: list[Path]) -> float:
    """Time one scan in a fresh process, without the start of Python."""
    code = (
        "import sys, time; from mergekit_metagpt import scan; start = "
        "time.perf_counter(); scan(sys.argv[1], sys.argv[2:]); "
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (base, *tuned))],
        env={**os.environ, "MERGEKIT_METAGPT_CACHE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--models", type=int, default=3, help="fine-tunes of the base")
    parser.add_argument("--limit-gb", type=float, default=4.5)
    parser.add_argument("--disk-mb-s", type=int, help="read the disk no faster")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    base, tuned = store.make(given.store, given.models)
    base, tuned = base.resolve(), [path.resolve() for path in tuned]
    files = store.files_of([base, *tuned])
    size = sum(file.stat().st_size for file in files)
    configs = whole_process.configurations(base, tuned)
    configs[SAMPLED] = {**configs["metagpt"], "parameters": {"sample": 0.02}}
    disk = given.disk_mb_s and (base, given.disk_mb_s * 10**6)
    join_group(int(given.limit_gb * 1e9), disk or None)
    scan.drop(files)  # cached pages of other groups do not count against the limit
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        for number in range(given.rounds):
            took = {
                "reading once": scan.seconds(lambda: scan.read(files, 2)),
                "scan": seconds_of_scan(base, tuned),
            }
            turn = number % len(METHODS)
            for method in METHODS[turn:] + METHODS[:turn]:
                took[method] = whole_process.run(
                    configs[method], Path(name), "0"
                ).wall_s
            for row, value in took.items():
                times.setdefault(row, []).append(value)
    print(machine.describe())
    speed = f", read at {given.disk_mb_s} MB/s at most" if disk else ""
    print(f"{size / 1e9:.1f} GB of files, {given.limit_gb} GB to hold them{speed}\n")
    print("| what | median, s | range |\n|---|---|---|")
    for row, values in times.items():
        middle = statistics.median(values)
        print(f"| {row} | {middle:.1f} | {min(values):.1f} to {max(values):.1f} |")
    print("\n| ratio, round by round | median | range |\n|---|---|---|")
    for other in ("metagpt", "task_arithmetic"):
        pairs = zip(times[SAMPLED], times[other], strict=True)
        ratios = [one / two for one, two in pairs]
        print(
            f"| {SAMPLED} / {other} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
