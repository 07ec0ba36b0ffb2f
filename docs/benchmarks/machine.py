"""Names the machine behind a benchmark's figures, and brings its memory to hand."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    """Return one line: processor, CPUs at hand, memory, versions."""
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


# What merges of the store need beside its page cache, and some more.
TOUCHED_GB = 6.0

# Allocates, touches and frees as many bytes as are free, but at most sys.argv[1].
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
    """Have the next process find free memory that is at hand.

    A virtual machine may give free memory back to its host, which takes its time to
    bring it again, up to 2 s a GB: what a merge takes then depends on what ran before
    it. Changes nothing on other machines.

    Args:
        gigabytes: how much, in 10^9 bytes; 0 to leave memory as it is.
    """
    if gigabytes and sys.platform == "linux":
        size = str(int(gigabytes * 1e9))
        subprocess.run([sys.executable, "-c", TOUCH, size], check=True)
