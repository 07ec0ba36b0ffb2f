"""Runs a scan's tasks on worker threads and shows its progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mergekit_metagpt.arithmetic.in_parts import use_one_torch_thread
from mergekit_metagpt.scanning import ranks, sharing

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return the number of CPUs for this process; the ranks of a node share them."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    sharers = ranks.local()[1] if sharing.group() else 1
    return max(1, count // sharers)


def run(tasks: Sequence[tuple[int, Callable[[], T]]], workers: int) -> list[T]:
    """Run tasks on threads, each of which runs torch on one; return results in order.

    Of each task, `tasks` has the bytes that it reads, and a function to call. A bar
    shows the progress on rank 0, if stderr is a terminal.
    """
    import tqdm

    group = sharing.group()
    executor = ThreadPoolExecutor(
        max_workers=workers,
        thread_name_prefix="metagpt-scan",
        initializer=use_one_torch_thread,
    )
    bar = tqdm.tqdm(
        total=sum(size for size, _ in tasks),
        desc="metagpt: measuring task vectors",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=None if sharing.leads() else True,
        leave=False,
    )
    with executor, bar:
        futures = [executor.submit(task) for _, task in tasks]
        try:
            results = []
            for (size, _), future in zip(tasks, futures, strict=True):
                results.append(future.result())
                bar.update(size)
                if group is not None:
                    group.check()
            return results
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
