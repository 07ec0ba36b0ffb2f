"""Hands out what base and model share of a tensor, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch

from mergekit_metagpt.alignment import SharedTensor, Stored
from mergekit_metagpt.files import Readers, StoredTensor
from mergekit_metagpt.streams import Streams, can_stream


@dataclass(frozen=True, eq=False)
class Source:
    """One side of a shared tensor, the base's or the model's, flattened.

    Attributes:
        dtype: of its elements.
        whole: all of them, where they cannot be read in pieces.
        streamed: else, what reads which tensor.
    """

    dtype: torch.dtype
    whole: torch.Tensor | None = None
    streamed: tuple[Streams, StoredTensor] | None = None

    def read(self, piece: slice, room: torch.Tensor) -> torch.Tensor:
        """Return a piece of the flattened overlap.

        Args:
            piece: its elements.
            room: bytes, at least as many as the piece has; may be written to.

        Returns:
            the elements, flat, in `room` or mapped from the file: not to be written
            to, nor used after `room` was given away.

        Raises:
            OSError: the file is missing, truncated or corrupt.
        """
        if self.streamed is None:
            assert self.whole is not None
            return self.whole[piece]
        streams, stored = self.streamed
        into = room[: (piece.stop - piece.start) * self.dtype.itemsize]
        streams.read(stored, piece.start, memoryview(into.numpy().data))
        return into.view(self.dtype)


class Files:
    """The files of one scan: read piece by piece where possible, else mapped."""

    def __init__(self, threads: int = 1) -> None:
        self.readers = Readers()
        self.streams = Streams(threads)

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.streams.close()

    def source(self, pair: SharedTensor, stored: Stored) -> Source:
        """Prepare one side of a shared tensor for reading.

        Args:
            pair: the tensor, and what both sides have of it.
            stored: the side, `pair.base` or `pair.model`.

        Returns:
            the source of its pieces.

        Raises:
            OSError: the file is missing, truncated or corrupt.
        """
        # The overlap lies in one row where the first axis alone is cut.
        in_order = stored.shape[1:] == pair.shape[1:]
        if isinstance(stored, StoredTensor) and can_stream(stored) and in_order:
            return Source(stored.dtype, streamed=(self.streams, stored))
        return Source(stored.dtype, whole=pair.cut(self.readers.read(stored)))
