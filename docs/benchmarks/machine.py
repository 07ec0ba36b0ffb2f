"""Describes the machine of a benchmark, and keeps its memory from affecting times."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    """Return one line: processor, usable CPUs, memory, versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model n")]
        name = models[0].partition(":")[2].strip() if models else name
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("torch", "mergekit", "transformers", "safetensors", "mergekit-metagpt")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    python = platform.python_version()
    return f"{name}, {cpus} CPUs, {memory:.0f} GiB; Python {python}, {versions}"


# Of Linux; Python has no name for it.
MAP_LOCKED = 0x2000

# Somewhat more than merges of the store need in addition to the page cache.
TOUCHED_GB = 6.0

# Touches four fifths of the free memory, or sys.argv[1] bytes if that is less.
TOUCH = """
import mmap, re, sys

free = re.search(r"MemFree: +([0-9]+)", open("/proc/meminfo").read())
size = min(int(sys.argv[1]), int(free[1]) * 1024 * 4 // 5)
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, size, mmap.PAGESIZE):
    memory[at] = 1
"""


def touch_memory(gigabytes: float = TOUCHED_GB) -> None:
    """Touch and release free memory, so that the next process gets it quickly.

    A virtual machine may give free memory back to its host. Getting it back can take
    2 s per GB, so that the time of a merge depends on what ran before it. On other
    machines this function changes nothing.

    Args:
        gigabytes: how much, in 10^9 bytes; 0 touches nothing.
    """
    if gigabytes and sys.platform == "linux":
        size = str(int(gigabytes * 1e9))
        subprocess.run([sys.executable, "-c", TOUCH, size], check=True)


_HELD: list[mmap.mmap] = []


def hold(files: Iterable[Path]) -> None:
    """Read files into the page cache and lock them there, as long as this runs.

    A virtual machine may drop what nobody has mapped for a minute, even where memory is
    free, so that a page cache said to be warm is cold. Locking as much as a store has
    needs root, or `ulimit -l unlimited`.

    Args:
        files: of checkpoints. Those of an earlier call are released.

    Raises:
        OSError: this process may not lock that much.
    """
    _HELD.clear()
    for file in files:
        with file.open("rb") as stream:
            flags = mmap.MAP_SHARED | MAP_LOCKED
            _HELD.append(mmap.mmap(stream.fileno(), 0, flags, mmap.PROT_READ))
