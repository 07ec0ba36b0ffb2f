"""Identifies versions of a file: by its status here, and by its content anywhere."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileIdentity:
    """Identifies one version of a file.

    A file on the hub has its path there, the hub's hash as `etag`, and neither time nor
    inode.
    """

    path: str
    size: int
    modified_ns: int
    inode: int
    etag: str = ""

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


# A fingerprint reads the head of a file (enough for the safetensors header of a few
# thousand tensors) and blocks spread over the rest.
HEAD = 1 << 20
BLOCK = 1 << 12
BLOCKS = 16
# A downloaded snapshot consists of links to blobs, named by hashes of their content.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the content of a file.

    Attributes:
        name: of the file, without its folder.
        size: in bytes.
        digest: the hub's hash of the whole content, or SHA-256 of size and samples.
        whole: whether the digest is of the whole content.
    """

    name: str
    size: int
    digest: str
    whole: bool


@functools.lru_cache(maxsize=4096)
def fingerprint(file: FileIdentity) -> Fingerprint:
    """Return the fingerprint of a file; raise an OSError if it cannot be read.

    A change between the samples goes unnoticed if the size stays the same.
    """
    path = Path(file.path)
    if file.etag:
        return Fingerprint(path.name, file.size, file.etag, whole=True)
    blob = path.resolve()
    if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        return Fingerprint(path.name, file.size, blob.name, whole=True)
    digest = hashlib.sha256(f"{file.size}:".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(HEAD))
        last = max(file.size - BLOCK, 0)
        for number in range(1, BLOCKS + 1):
            stream.seek(last * number // BLOCKS)
            digest.update(stream.read(BLOCK))
    return Fingerprint(path.name, file.size, digest.hexdigest(), whole=False)


def digest_of(files: tuple[FileIdentity, ...]) -> str:
    """Return SHA-256, in hexadecimal, over the fingerprints of a model's files.

    Their folder does not matter. Raises an OSError if a file cannot be read.
    """
    prints = sorted(map(fingerprint, files), key=lambda file: file.name)
    lines = [f"{file.name}:{file.size}:{file.digest}" for file in prints]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hub_revision(folder: Path) -> str | None:
    """Return the commit of a downloaded snapshot, or of files on the hub.

    Args:
        folder: folder of the files, `.../models--OWNER--NAME/snapshots/COMMIT` or
            `OWNER/NAME/resolve/COMMIT`.

    Returns:
        the commit, or None for any other folder.

    Example:
        >>> hub_revision(Path("m/base")) is None
        True
    """
    if folder.parent.name in ("snapshots", "resolve") and re.fullmatch(
        r"[0-9a-f]{40}", folder.name
    ):
        return folder.name
    return None
