"""Reads stored tensors piece by piece into buffers that are used again."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from mergekit_metagpt.checkpoints.files import Readers
from mergekit_metagpt.checkpoints.layouts import Stored
from mergekit_metagpt.checkpoints.pairs import SharedTensor
from mergekit_metagpt.checkpoints.ranges import RemoteFile
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor

# Files that one thread keeps open, at most, and the share of those allowed that all
# threads take together. With more models than that files are opened again for each
# piece, which costs less than reading it.
OPEN_FILES = 16
SHARE = 4


def can_stream(stored: StoredTensor | ConvertedTensor) -> bool:
    """Whether a tensor's elements lie one after the other in a file."""
    return (
        isinstance(stored, StoredTensor)
        and stored.file.suffix == ".safetensors"
        and hasattr(os, "preadv")
    )


class Streams:
    """The safetensors files of one scan, on any number of threads; to be closed.

    A buffer is filled by the kernel from its cache of the file: as fast as mapping the
    file, whose pages are dear to drop when memory is short, and a file that shrinks is
    an error instead of the end of the process.
    """

    def __init__(
        self, threads: int = 1, remote: Mapping[Path, RemoteFile] | None = None
    ) -> None:
        self.remote = remote or {}
        self._most = max(1, min(OPEN_FILES, _allowed() // SHARE // threads))
        self._here = threading.local()
        self._lock = threading.Lock()
        self._open: list[OrderedDict[Path, int]] = []
        self._starts: dict[Path, Mapping[str, tuple[int, int]]] = {}

    def close(self) -> None:
        """Close all files; no thread may be reading."""
        with self._lock:
            for files in self._open:
                while files:
                    os.close(files.popitem()[1])

    def read(self, stored: StoredTensor, start: int, into: memoryview) -> None:
        """Fill a buffer with consecutive elements of a tensor that can be streamed.

        Args:
            stored: the tensor, from `read_header`.
            start: its first element to be read.
            into: bytes to be written to, as many as these elements have.

        Raises:
            OSError: the file is missing, truncated or corrupt.
        """
        first, size = self._place(stored)
        at = start * stored.dtype.itemsize
        if at + len(into) > size:
            raise ValueError(f"{stored.name} has {size} bytes; asked for more")
        position, filled = first + at, 0
        if stored.file in self.remote:
            self.remote[stored.file].read_into(position, into)
            return
        handle = self._handle(stored.file)
        while filled < len(into):
            try:
                got = os.preadv(handle, [into[filled:]], position + filled)
            except OSError as error:
                raise _unreadable(stored, str(error)) from error
            if not got:
                raise _unreadable(stored, "it ends before this tensor does")
            filled += got

    def _place(self, stored: StoredTensor) -> tuple[int, int]:
        """First byte of a tensor in its file, and their number."""
        with self._lock:
            if stored.file not in self._starts:
                remote = self.remote.get(stored.file)
                starts = remote.starts if remote else _starts(stored.file)
                self._starts[stored.file] = starts
        place = self._starts[stored.file].get(stored.name)
        if place is None or place[1] != stored.numel * stored.dtype.itemsize:
            raise _unreadable(stored, "its header has changed or is corrupt")
        return place

    def _handle(self, file: Path) -> int:
        """A file descriptor of this thread's own."""
        if not hasattr(self._here, "files"):
            self._here.files = OrderedDict()
            with self._lock:
                self._open.append(self._here.files)
        files: OrderedDict[Path, int] = self._here.files
        if file in files:
            files.move_to_end(file)
            return files[file]
        if len(files) >= self._most:
            os.close(files.popitem(last=False)[1])
        files[file] = handle = _opened(file, files)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return handle


def _allowed() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # not on Windows
        return OPEN_FILES * SHARE
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit if limit != resource.RLIM_INFINITY else sys.maxsize


def _opened(file: Path, others: OrderedDict[Path, int]) -> int:
    """Open a file; where too many are open, close others for it."""
    while True:
        try:
            return os.open(file, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE or not others:
                raise OSError(f"{file} cannot be read: {error}") from error
            os.close(others.popitem(last=False)[1])


def _starts(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and size of every tensor, by a header that safetensors has checked."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        return {
            name: (8 + length + start, end - start)
            for name, (start, end) in places.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(
            f"{file} cannot be read: {error}. It is truncated or corrupt: fetch or "
            "save it again"
        ) from error


def _unreadable(stored: StoredTensor, why: str) -> OSError:
    return OSError(f"cannot read {stored.name} from {stored.file}: {why}")


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

    def all(self, numel: int) -> torch.Tensor:
        """Return the whole flattened overlap, of `numel` elements."""
        size = numel * self.dtype.itemsize
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.read(slice(0, numel), room)


class Files:
    """The files of one scan: read piece by piece where possible, else mapped."""

    def __init__(
        self, threads: int = 1, remote: Mapping[Path, RemoteFile] | None = None
    ) -> None:
        self.readers = Readers()
        self.streams = Streams(threads, remote)

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.streams.close()

    def in_parts(self, stored: Stored) -> bool:
        """Whether a tensor can be read in parts: from a file here, or on the hub."""
        return can_stream(stored) or stored.file in self.streams.remote

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
        if isinstance(stored, StoredTensor) and in_order and self.in_parts(stored):
            return Source(stored.dtype, streamed=(self.streams, stored))
        if stored.file in self.streams.remote:
            raise ValueError(
                f"{stored.name} of {stored.file.parent} is stored in another layout "
                "than in the other model, and cannot be read in part. Download both, "
                "or give --sample 0"
            )
        return Source(stored.dtype, whole=pair.cut(self.readers.read(stored)))
