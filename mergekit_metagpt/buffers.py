"""Buffers for the loops over elements, kept for the next loop that needs one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Bytes of a kept buffer, at least. What a loop allocates anew for each tensor costs the
# kernel more time, in pages to be zeroed, than the loop itself.
LEAST = 1 << 22
# Larger ones, as for the Gram matrices of hundreds of models, are given back.
MOST = 1 << 26

_FREE: list[torch.Tensor] = []
_LOCK = threading.Lock()


@contextmanager
def scratch(
    rows: int, numel: int, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """Lend a buffer of any content.

    Args:
        rows: number of rows.
        numel: elements of a row.
        dtype: of the elements.
        device: where they lie; only the CPU's buffers are kept.

    Yields:
        shape `(rows, numel)`, contiguous; not to be used afterwards.
    """
    if device.type != "cpu":
        yield torch.empty(rows, numel, dtype=dtype, device=device)
        return
    size = rows * numel * dtype.itemsize
    with _LOCK:
        fitting = [at for at, buffer in enumerate(_FREE) if buffer.numel() >= size]
        buffer = _FREE.pop(fitting[0]) if fitting else None
    if buffer is None:
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(max(size, LEAST), dtype=torch.uint8, device="cpu")
    try:
        yield buffer[:size].view(dtype).view(rows, numel)
    finally:
        if buffer.numel() <= MOST:
            with _LOCK:
                _FREE.append(buffer)
