"""Cuts tensors into parts for caches and threads, and lends scratch buffers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# Elements per step: enough to make Python's overhead small, few enough to keep scratch
# buffers in a CPU's cache. On other devices each step costs a kernel launch.
CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 25
# Elements that a thread takes at a time. Fixed, so that sums have the same bits for any
# number of threads.
PART = 1 << 20
# Up to this number of elements torch uses a single thread anyway.
SERIAL = 1 << 15


def chunk_size(like: torch.Tensor) -> int:
    return min(CHUNK if like.device.type == "cpu" else DEVICE_CHUNK, like.numel())


def chunks(like: torch.Tensor) -> Iterator[slice]:
    step = chunk_size(like)
    for start in range(0, like.numel(), step or 1):
        yield slice(start, min(start + step, like.numel()))


def results_of_parts(
    like: torch.Tensor, work: Callable[[slice], T], *, compiled: bool
) -> list[T]:
    """Call `work` for every part of a flat tensor, on several threads if on a CPU."""
    if like.device.type != "cpu":
        return [work(slice(0, like.numel()))]
    ends = [*range(PART, like.numel(), PART), like.numel()]
    parts = [slice(max(0, (end - 1) // PART * PART), end) for end in ends]
    alone = like.numel() <= SERIAL or (compiled and len(parts) == 1)
    if torch.get_num_threads() == 1 or alone:
        return [work(part) for part in parts]
    return spread(work, parts, compiled=compiled)


class _Value(torch.autograd.Function):
    """Gives the second argument's value to the first argument's node in the graph."""

    @staticmethod
    def forward(
        context: Any, differentiable: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(
        context: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None


def with_value(differentiable: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Give a value that was computed without autograd a gradient.

    So the bits of a result do not depend on whether an input requires a gradient.

    Args:
        differentiable: the same value but for rounding, computed with autograd.
        value: the value, of the same shape and dtype.

    Returns:
        the bits of `value`, in the graph of `differentiable`.
    """
    combined: torch.Tensor = _Value.apply(differentiable, value)  # type: ignore[no-untyped-call]
    return combined


def needs_grad(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd records operations on any of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# Buffers are reused: for a new one the kernel zeroes pages, which takes longer than the
# loop itself. They have at least LEAST bytes; those of more than MOST, as for the Gram
# matrices of hundreds of models, are freed after use.
LEAST = 1 << 22
MOST = 1 << 26
_FREE: list[torch.Tensor] = []
_LOCK = threading.Lock()


@contextmanager
def scratch(
    rows: int, numel: int, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """Lend a buffer with arbitrary content.

    Args:
        rows: number of rows.
        numel: elements per row.
        dtype: of the elements.
        device: device of the buffer; only CPU buffers are reused.

    Yields:
        shape `(rows, numel)`, contiguous; do not use it afterwards.
    """
    if device.type != "cpu":
        yield torch.empty(rows, numel, dtype=dtype, device=device)
        return
    size = rows * numel * dtype.itemsize
    with _LOCK:
        fitting = [at for at, buffer in enumerate(_FREE) if buffer.numel() >= size]
        buffer = _FREE.pop(fitting[0]) if fitting else None
    if buffer is None:
        # A buffer made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffer = torch.empty(max(size, LEAST), dtype=torch.uint8, device="cpu")
    try:
        yield buffer[:size].view(dtype).view(rows, numel)
    finally:
        if buffer.numel() <= MOST:
            with _LOCK:
                _FREE.append(buffer)


_THREADS_LOCK = threading.Lock()


def use_one_torch_thread() -> None:
    """Let torch operations of the calling thread run on this thread only.

    `torch.set_num_threads` also changes the default for threads started later, which
    a short-lived thread restores.
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

    torch would wake its own threads for every short operation on a chunk, and wait for
    all of them, which is many times slower on busy CPUs. With compiled loops, the
    calling thread works too: waking another one takes longer than a small sum.

    Args:
        work: function of a part.
        parts: the parts; each is worked on once.
        compiled: whether only compiled loops do the work, not torch.

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
                waiting.clear()  # after an error, let the other threads stop too

    threads = min(torch.get_num_threads(), len(parts))
    helpers = threads - 1 if compiled else threads
    with ThreadPoolExecutor(
        max_workers=max(1, helpers),
        thread_name_prefix="metagpt-sum",
        initializer=None if compiled else use_one_torch_thread,
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
