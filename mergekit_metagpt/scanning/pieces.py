"""Reads stored tensors piece by piece, into buffers that are reused."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.files import Readers
from mergekit_metagpt.checkpoints.layouts import Stored
from mergekit_metagpt.checkpoints.pairs import SharedTensor
from mergekit_metagpt.checkpoints.ranges import AT_ONCE, RemoteFile, places_in
from mergekit_metagpt.checkpoints.stored import StoredTensor, corrupt
from mergekit_metagpt.scanning.threads import default_workers

# A thread keeps at most OPEN_FILES files open, and all threads together at most 1/SHARE
# of the process's limit. With more models, a file is opened again for each piece, which
# costs less than reading the piece.
OPEN_FILES = 16
SHARE = 4


class Streams:
    """The safetensors files of one scan, on any number of threads; to be closed.

    The kernel copies each piece from its page cache into a buffer. That is as fast as
    mapping the file. Mapped pages are expensive to drop when memory is short, and a
    mapped file that shrinks would kill the process instead of raising an error.
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
        """Fill a buffer with consecutive elements of a tensor, from `start` on.

        Raises an OSError if the file is missing, truncated or corrupt.
        """
        first, size = self._place(stored)
        at = start * stored.dtype.itemsize
        if at + len(into) > size:
            raise ValueError(f"{stored.name} has {size} bytes; asked for more")
        position, filled = first + at, 0
        if stored.file in self.remote:
            into[:] = self.remote[stored.file].read(position, position + len(into) - 1)
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
        """A tensor's first byte in its file, and its size in bytes."""
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
        """A file descriptor that only this thread uses."""
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
    """The number of files that this process may have open."""
    try:
        import resource
    except ImportError:  # not on Windows
        return OPEN_FILES * SHARE
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit if limit != resource.RLIM_INFINITY else sys.maxsize


def _opened(file: Path, others: OrderedDict[Path, int]) -> int:
    """Open a file, closing others if too many are open."""
    while True:
        try:
            return os.open(file, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE or not others:
                raise OSError(f"{file} cannot be read: {error}") from error
            os.close(others.popitem(last=False)[1])


def _starts(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and size of every tensor in a safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return places_in(json.loads(stream.read(length)), 8 + length)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise corrupt(file, error) from error


def _unreadable(stored: StoredTensor, why: str) -> OSError:
    return OSError(f"cannot read {stored.name} from {stored.file}: {why}")


@dataclass(frozen=True, eq=False)
class Source:
    """One side of a shared tensor, the base's or the model's, flattened.

    Attributes:
        dtype: of its elements.
        whole: all elements, if they cannot be read in pieces.
        streamed: otherwise the open files, and the tensor to read from them.
    """

    dtype: torch.dtype
    whole: torch.Tensor | None = None
    streamed: tuple[Streams, StoredTensor] | None = None

    def read(self, piece: slice, room: torch.Tensor) -> torch.Tensor:
        """Return a piece of the flattened overlap.

        It is in `room`, a buffer of at least as many bytes, or mapped from the file:
        not to be written to, nor used once `room` is reused. Raises an OSError if the
        file is missing, truncated or corrupt.
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
    """The files of one scan: read piece by piece where possible, else mapped.

    As a context, it raises an OSError if one has changed since it was opened, at the
    beginning and at the end.

    Args:
        checkpoints: base and models.
        workers: threads; by default one per CPU, more for files on the hub.
        at_least: threads by default, for short reads, each of which waits for the disk.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint] = (),
        workers: int | None = None,
        *,
        at_least: int = 1,
    ) -> None:
        self._checkpoints = checkpoints
        remote = {path: file for c in checkpoints for path, file in c.remote.items()}
        by_default = AT_ONCE if remote else max(default_workers(), at_least)
        self.threads = workers or by_default
        self.readers = Readers()
        self.streams = Streams(self.threads, remote)

    def __enter__(self) -> Files:
        self._verify_unchanged()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.streams.close()
        if kind is None:
            self._verify_unchanged()

    def _verify_unchanged(self) -> None:
        for checkpoint in self._checkpoints:
            checkpoint.verify_unchanged()

    def in_parts(self, stored: Stored) -> TypeGuard[StoredTensor]:
        """Whether a tensor can be read in parts, from a local file or from the hub."""
        local = stored.file.suffix == ".safetensors" and hasattr(os, "preadv")
        lies = local or stored.file in self.streams.remote
        return lies and isinstance(stored, StoredTensor)

    def source(self, pair: SharedTensor, stored: Stored) -> Source:
        """Prepare one side of a pair, `pair.base` or `pair.model`, for reading.

        Raises an OSError if the file is missing, truncated or corrupt; a ValueError if
        it is on the hub, and the tensor is not in one piece.
        """
        # The overlap is contiguous if only the first axis is cut.
        if self.in_parts(stored) and stored.shape[1:] == pair.shape[1:]:
            return Source(stored.dtype, streamed=(self.streams, stored))
        if stored.file in self.streams.remote:
            raise ValueError(
                f"{stored.name} of {stored.file.parent} and the other model's have "
                "different layouts, so that it cannot be read in part. Download both "
                "models, or give --sample 0"
            )
        return Source(stored.dtype, whole=pair.cut(self.readers.read(stored)))
