"""Reads pieces of stored tensors into buffers that are used again; maps nothing."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from mergekit_metagpt.files import ConvertedTensor, StoredTensor

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

    def __init__(self, threads: int = 1) -> None:
        self._most = max(1, min(OPEN_FILES, _allowed() // SHARE // threads))
        self._here = threading.local()
        self._lock = threading.Lock()
        self._open: list[OrderedDict[Path, int]] = []
        self._starts: dict[Path, dict[str, tuple[int, int]]] = {}

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
                self._starts[stored.file] = _starts(stored.file)
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
            f"{file} cannot be read: {error}. It is truncated or corrupt: fetch it "
            "again"
        ) from error


def _unreadable(stored: StoredTensor, why: str) -> OSError:
    return OSError(f"cannot read {stored.name} from {stored.file}: {why}")
