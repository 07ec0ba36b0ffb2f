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
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.identity import fingerprint
from mergekit_metagpt.checkpoints.memo import while_open
from mergekit_metagpt.scanning.results import Details, PairNorms

LOG = logging.getLogger("mergekit_metagpt")


VARIABLE = "MERGEKIT_METAGPT_CACHE"


# To be raised when what a scan measures, or how it is stored, changes.
FORMAT = 2


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

    format: Literal[2] = 2
    key: str
    kind: str
    base: str
    models: list[str]
    checksum: str


class _Pair(BaseModel):
    """`PairNorms`; `counted_as` without the names that count as themselves."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sq_norms: dict[str, SqNorm]
    counted_as: dict[str, str]
    layers: dict[str, str]


class _Details(BaseModel):
    """`Details`; of each Gram matrix the upper triangle, row by row."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: int
    gram: dict[str, list[Finite]]
    base_sq_norms: dict[str, list[SqNorm]]
    rounding: dict[str, list[SqNorm]]


M = TypeVar("M", bound=BaseModel)


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


def pair_norms(base: Checkpoint, model: Checkpoint) -> PairNorms | None:
    """Look up the squared norms of one model.

    Args:
        base: the base.
        model: a fine-tune of it.

    Returns:
        what an earlier scan found, with the same bits, or None.
    """
    found = _read("pair", base, [model], _Pair)
    if found is None:
        return None
    own = {name: name for name in found.sq_norms}
    return PairNorms(found.sq_norms, {**own, **found.counted_as}, found.layers)


def keep_pair(base: Checkpoint, model: Checkpoint, norms: PairNorms) -> None:
    """Remember the squared norms of one model.

    Args:
        base: the base.
        model: a fine-tune of it.
        norms: what a scan found.
    """
    others = {n: other for n, other in norms.counted_as.items() if n != other}
    kept = _Pair(
        sq_norms=dict(norms.sq_norms), counted_as=others, layers=dict(norms.layers)
    )
    _write("pair", base, [model], kept)


def details(base: Checkpoint, models: Sequence[Checkpoint]) -> Details | None:
    """Look up what a detailed scan of these models found.

    Args:
        base: the base.
        models: fine-tunes of it, in the order of the scan.

    Returns:
        the details, with the same bits, or None.
    """
    found, count = _read("details", base, models, _Details), len(models)
    if found is None or found.count != count:
        return None
    upper = torch.triu_indices(count, count, device="cpu").unbind()
    gram = {}
    for name, values in found.gram.items():
        rows = found.base_sq_norms.get(name, ()), found.rounding.get(name, ())
        if len(values) != len(upper[0]) or {len(row) for row in rows} != {count}:
            return None
        matrix = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        matrix[upper] = torch.tensor(values, dtype=torch.float64, device="cpu")
        gram[name] = matrix + matrix.T - matrix.diag().diag()
    if not gram.keys() == found.base_sq_norms.keys() == found.rounding.keys():
        return None
    base_sq_norms, rounding = (
        {
            name: torch.tensor(values, dtype=torch.float64, device="cpu")
            for name, values in rows.items()
        }
        for rows in (found.base_sq_norms, found.rounding)
    )
    return Details(count, gram, base_sq_norms, rounding)


def keep_details(
    base: Checkpoint, models: Sequence[Checkpoint], found: Details
) -> None:
    """Remember what a detailed scan found.

    Args:
        base: the base.
        models: fine-tunes of it, in the order of the scan.
        found: the details.
    """
    upper = torch.triu_indices(found.count, found.count, device="cpu").unbind()
    kept = _Details(
        count=found.count,
        gram={name: gram[upper].tolist() for name, gram in found.gram.items()},
        base_sq_norms={n: norms.tolist() for n, norms in found.base_sq_norms.items()},
        rounding={name: lost.tolist() for name, lost in found.rounding.items()},
    )
    _write("details", base, models, kept)


@while_open
def _identity(checkpoint: Checkpoint) -> str:
    """Everything about a checkpoint that a scan depends on, as text."""
    files = []
    for file in checkpoint.identity:
        found = fingerprint(file)
        changed = 0 if found.whole else file.modified_ns
        files.append([found.name, found.size, found.digest, changed])
    header = [
        [name, tensor.name, tensor.file.name, str(tensor.dtype), tensor.shape]
        for name, tensor in sorted(checkpoint.tensors.items())
    ]
    ties = sorted(checkpoint.tied_names.items())
    return json.dumps([files, header, ties, checkpoint.model_type])


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
        key.update(hashlib.sha256(_identity(checkpoint).encode()).digest())
    return home / f"{key.hexdigest()}.json"


def _read(
    kind: str, base: Checkpoint, models: Sequence[Checkpoint], schema: type[M]
) -> M | None:
    try:
        place = _place(kind, base, models)
        if place is None or _size(place) > MOST_BYTES:
            return None
        head, _, payload = place.read_bytes().partition(b"\n")
        entry = _Entry.model_validate_json(head)
        checksum = hashlib.sha256(payload).hexdigest()
        if (entry.key, entry.kind, entry.checksum) != (place.stem, kind, checksum):
            raise ValueError("it is of other models, or its content has changed")
        found = schema.model_validate_json(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        LOG.info("cache entry not used: %s", error)
        return None
    LOG.info("%s of %s taken from %s", kind, ", ".join(entry.models), place)
    return found


def _size(file: Path) -> int:
    """Size of an entry; a pipe or device, which may never end, is none."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{file} is no regular file")
    return status.st_size


def _write(
    kind: str, base: Checkpoint, models: Sequence[Checkpoint], content: BaseModel
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
        kind: `pair` or `details`; empty if it cannot be read.
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
