"""Names the machine and the versions behind a benchmark's figures."""

from __future__ import annotations

import os
import platform
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
