"""Keeps on disk what scans found; never fails a merge: what it cannot do, it skips."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.scanning.results import ScanResult

LOG = logging.getLogger("mergekit_metagpt")
VARIABLE = "MERGEKIT_METAGPT_CACHE"
# To be raised when what a scan measures, or how it is stored, changes.
FORMAT = 3
MOST_ENTRIES = 1000
MOST_BYTES = 1 << 28
# A file may change once more within one tick of a coarse clock without showing it.
YOUNG_S = 2.0
# An entry that is being written; one that is so old was left by a killed process.
UNFINISHED = ".metagpt-"
ABANDONED_S = 3600.0
SqNorm = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Entry(BaseModel):
    """What an entry holds beside its results."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[3] = 3
    key: str
    kind: str
    base: str
    models: list[str]
    checksum: str


class _Content(BaseModel):
    """A `ScanResult` without the names of its models.

    Each row of `gram` is the upper triangle of a Gram matrix, row by row.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    names: list[str]
    sq_norms: list[list[SqNorm]]
    base_sq_norms: list[list[SqNorm]]
    counted_as: list[dict[str, str]]
    layers: list[dict[str, str]]
    gram: list[list[Finite]] | None = None


def folder() -> Path | None:
    """Return where entries lie, or None where the cache is off.

    MERGEKIT_METAGPT_CACHE names the folder, 0 switches the cache off; by default it is
    mergekit-metagpt in the user's cache directory.
    """
    given = os.environ.get(VARIABLE, "")
    if given == "0":
        return None
    if given:
        return Path(given)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home directory
        return None
    return home / "mergekit-metagpt"


def read(
    base: Checkpoint, models: Sequence[Checkpoint], *, gram: bool = False
) -> ScanResult | None:
    """Look up what an earlier scan measured.

    Args:
        base: the base.
        models: one model, or with `gram` all models of the scan, in its order.
        gram: whether inner products are needed.

    Returns:
        the result, with the same bits, or None.
    """
    content = _read("gram" if gram else "pair", base, models)
    if content is None:
        return None
    try:
        return _result(content, base, models, gram=gram)
    except (ValueError, RuntimeError) as error:
        LOG.info("cache entry not used: %s", error)
        return None


def _result(
    content: _Content, base: Checkpoint, models: Sequence[Checkpoint], *, gram: bool
) -> ScanResult:
    count, names = len(models), content.names

    def tensor(rows: list[list[float]], width: int) -> torch.Tensor:
        flat = [value for row in rows for value in row]
        return torch.tensor(flat, dtype=torch.float64, device="cpu").view(-1, width)

    upper = torch.triu_indices(count, count, device="cpu").unbind()
    products = None
    if gram:
        products = torch.zeros(
            len(names), count, count, dtype=torch.float64, device="cpu"
        )
        values = tensor(content.gram or [], len(upper[0]))
        products[:, upper[0], upper[1]] = values
        products[:, upper[1], upper[0]] = values
    sq_norms = tensor(content.sq_norms, count)
    base_sq_norms = tensor(content.base_sq_norms, count)
    if not (
        len(sq_norms) == len(base_sq_norms) == len(names)
        and len(content.counted_as) == len(content.layers) == count
    ):
        raise ValueError("it is not of as many models and tensors as it says")
    return ScanResult(
        base=base.label,
        models=tuple(model.label for model in models),
        names=tuple(names),
        sq_norms=sq_norms,
        base_sq_norms=base_sq_norms,
        counted_as=tuple(content.counted_as),
        layers=tuple(content.layers),
        gram=products,
    )


def write(base: Checkpoint, models: Sequence[Checkpoint], result: ScanResult) -> None:
    """Remember what a scan measured; with a Gram matrix, of all its models at once.

    Args:
        base: the base.
        models: one model, or all models of the scan, in its order.
        result: what it measured of them.
    """
    upper = torch.triu_indices(len(models), len(models), device="cpu").unbind()
    gram = result.gram
    content = _Content(
        names=list(result.names),
        sq_norms=result.sq_norms.tolist(),
        base_sq_norms=result.base_sq_norms.tolist(),
        counted_as=[dict(counted) for counted in result.counted_as],
        layers=[dict(layers) for layers in result.layers],
        gram=None if gram is None else gram[:, upper[0], upper[1]].tolist(),
    )
    _write("pair" if gram is None else "gram", base, models, content)


def _place(kind: str, base: Checkpoint, models: Sequence[Checkpoint]) -> Path | None:
    """The file of an entry; None where the cache is off."""
    home = folder()
    if home is None:
        return None
    packages = ("mergekit-metagpt", "mergekit", "transformers")
    key = hashlib.sha256(
        json.dumps([FORMAT, kind, [version(package) for package in packages]]).encode()
    )
    for checkpoint in (base, *models):
        key.update(checkpoint.digest.encode())
    return home / f"{key.hexdigest()}.json"


def _read(kind: str, base: Checkpoint, models: Sequence[Checkpoint]) -> _Content | None:
    try:
        place = _place(kind, base, models)
        if place is None or _size(place) > MOST_BYTES:
            return None
        head, _, payload = place.read_bytes().partition(b"\n")
        entry = _Entry.model_validate_json(head)
        checksum = hashlib.sha256(payload).hexdigest()
        if (entry.key, entry.kind, entry.checksum) != (place.stem, kind, checksum):
            raise ValueError("it is of other models, or its content has changed")
        content = _Content.model_validate_json(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        LOG.info("cache entry not used: %s", error)
        return None
    LOG.info("%s of %s taken from %s", kind, ", ".join(entry.models), place)
    return content


def _size(file: Path) -> int:
    """Size of an entry; a pipe or device, which may never end, is none."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{file} is no regular file")
    return status.st_size


def _write(
    kind: str, base: Checkpoint, models: Sequence[Checkpoint], content: _Content
) -> None:
    try:
        place = _place(kind, base, models)
        youngest = max(
            file.modified_ns for model in (base, *models) for file in model.identity
        )
        if place is None or time.time() - youngest / 1e9 < YOUNG_S:
            return
        payload = content.model_dump_json().encode()
        entry = _Entry(
            key=place.stem,
            kind=kind,
            base=base.label,
            models=[model.label for model in models],
            checksum=hashlib.sha256(payload).hexdigest(),
        )
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = place.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
        try:
            # private before it holds a word
            temporary.touch(mode=0o600, exist_ok=False)
            with temporary.open("wb") as stream:
                stream.write(entry.model_dump_json().encode() + b"\n" + payload)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
        _trim(place.parent)
    except (OSError, ValueError) as error:
        LOG.info("cache entry not written: %s", error)


def _trim(home: Path) -> None:
    """Remove the oldest entries beyond the number that is kept, and killed writes."""
    for file in home.glob(f"{UNFINISHED}*"):
        if time.time() - file.lstat().st_mtime > ABANDONED_S:
            file.unlink(missing_ok=True)
    files = sorted(home.glob("*.json"), key=lambda file: file.lstat().st_mtime)
    for file in files[: max(0, len(files) - MOST_ENTRIES)]:
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Remembered:
    """An entry of the cache, for its owner to see.

    Attributes:
        file: where it lies.
        kind: `pair` or `gram`; empty if it cannot be read.
        base: the base, as its user wrote it.
        models: the models.
        bytes: its size.
        written: when, in seconds since 1970.
    """

    file: Path
    kind: str
    base: str
    models: tuple[str, ...]
    bytes: int
    written: float


def entries() -> Iterator[Remembered]:
    """Yield all entries, the oldest first."""
    home = folder()
    if home is None or not home.is_dir():
        return
    for file in sorted(home.glob("*.json"), key=lambda file: file.lstat().st_mtime):
        try:
            _size(file)
            with file.open("rb") as stream:
                entry = _Entry.model_validate_json(stream.readline(MOST_BYTES))
            kind, base, models = entry.kind, entry.base, tuple(entry.models)
        except (OSError, ValueError, ValidationError):
            kind, base, models = "", "", ()
        status = file.lstat()
        yield Remembered(file, kind, base, models, status.st_size, status.st_mtime)


def clear() -> int:
    """Remove all entries.

    Returns:
        their number.

    Raises:
        OSError: one cannot be removed.
    """
    found = list(entries())
    for entry in found:
        entry.file.unlink(missing_ok=True)
    home = folder()
    for file in home.glob(f"{UNFINISHED}*") if home else ():
        file.unlink(missing_ok=True)
    return len(found)
