"""Runs work on threads that each do torch's work alone; shows how far a scan is."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_THREADS_LOCK = threading.Lock()


def _use_one_torch_thread() -> None:
    """Run torch operations of this worker on the worker alone.

    `torch.set_num_threads` sets the calling thread's own number and, as a side effect,
    the default of threads started later: a short-lived thread puts that back.
    """
    with _THREADS_LOCK:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()


def spread(
    work: Callable[[T], R], parts: Sequence[T], *, compiled: bool = False
) -> list[R]:
    """Run work on parts of one tensor, on as many threads as torch would use.

    torch's own threads would be woken for every short operation on a chunk, and wait
    for each other: on busy CPUs many times slower than operations of one thread each.
    The calling thread is one of them where compiled loops do the work: waking another
    takes longer than the sum of a small tensor.

    Args:
        work: called once with every part.
        parts: its arguments.
        compiled: whether compiled loops do the work, and no operation of torch.

    Returns:
        the results, in the order of the parts.
    """
    inference = torch.is_inference_mode_enabled()
    waiting = deque(enumerate(parts))
    results: dict[int, R] = {}

    def next_part() -> tuple[int, T] | None:
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def take_turns() -> None:
        with torch.inference_mode(inference):
            try:
                while turn := next_part():
                    results[turn[0]] = work(turn[1])
            finally:
                waiting.clear()  # after an error, nobody goes on

    threads = min(torch.get_num_threads(), len(parts))
    helpers = threads - 1 if compiled else threads
    with ThreadPoolExecutor(
        max_workers=max(1, helpers),
        thread_name_prefix="metagpt-sum",
        initializer=None if compiled else _use_one_torch_thread,
    ) as executor:
        futures = [executor.submit(take_turns) for _ in range(helpers)]
        try:
            if compiled:
                take_turns()
            for future in futures:
                future.result()
        finally:
            waiting.clear()
    return [results[at] for at in range(len(parts))]


def run(tasks: Sequence[tuple[int, Callable[[], T]]], workers: int) -> list[T]:
    """Run tasks on threads that each do torch's work alone; show progress in bytes.

    The bar goes to stderr, only if that is a terminal.

    Args:
        tasks: pairs of the bytes that a task reads and the task.
        workers: threads.

    Returns:
        the tasks' results, in their order.
    """
    import tqdm

    executor = ThreadPoolExecutor(
        max_workers=workers,
        thread_name_prefix="metagpt-scan",
        initializer=_use_one_torch_thread,
    )
    bar = tqdm.tqdm(
        total=sum(size for size, _ in tasks),
        desc="metagpt: measuring task vectors",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=None,
        leave=False,
    )
    with executor, bar:
        futures = [executor.submit(task) for _, task in tasks]
        try:
            results = []
            for (size, _), future in zip(tasks, futures, strict=True):
                results.append(future.result())
                bar.update(size)
            return results
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
