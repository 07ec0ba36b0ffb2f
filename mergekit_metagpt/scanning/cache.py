"""Keeps measurements on disk; an entry that cannot be read or written is skipped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint

LOG = logging.getLogger("mergekit_metagpt")
VARIABLE = "MERGEKIT_METAGPT_CACHE"
# Raise it when what is measured, or how it is stored, changes.
FORMAT = 3
MOST_ENTRIES = 1000
MOST_BYTES = 1 << 28
# Younger model files are not trusted: with a coarse clock, a file can change twice and
# keep its modification time.
YOUNG_S = 2.0
# An entry is written under this prefix; an old one was left by a killed process.
UNFINISHED = ".metagpt-"
ABANDONED_S = 3600.0
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(BaseModel):
    """What is stored, read back only if it has exactly these fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Entry(Content):
    """The first line of a file, which describes the content below it."""

    format: Literal[3] = 3
    key: str
    kind: str
    base: str
    models: list[str]
    checksum: str


class ChunkLosses(Content):
    """A model's losses on a text, chunk by chunk.

    `losses` is the summed cross entropy of each chunk in nats, `tokens` the number of
    tokens predicted in it, and `bytes` its length.
    """

    losses: list[Finite]
    tokens: list[int]
    bytes: list[int]


class TaskScores(Content):
    """A model's scores on each document of a task, by metric."""

    documents: dict[str, list[Finite]]
    higher_is_better: dict[str, bool]


C = TypeVar("C", bound=Content)
M = TypeVar("M", ChunkLosses, TaskScores)
_KINDS = {ChunkLosses: "losses", TaskScores: "scores"}


def folder() -> Path | None:
    """Return the folder of the cache, or None if the cache is off.

    MERGEKIT_METAGPT_CACHE names the folder, or switches the cache off if it is 0. The
    default is mergekit-metagpt in the user's cache directory.
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


def read_measured(
    schema: type[M], models: Sequence[Checkpoint], about: str
) -> M | None:
    """Look up the losses or scores of a model, or of a merge.

    Args:
        schema: `ChunkLosses` for losses on a text, `TaskScores` for scores on a task.
        models: the model, or all inputs of the merge.
        about: everything else they depend on: merge, text or task, settings, versions.

    Returns:
        the losses or scores, or None if they are not in the cache.
    """
    return read_entry(_KINDS[schema], models[0], models[1:], schema, about)


def write_measured(models: Sequence[Checkpoint], about: str, measured: M) -> None:
    """Store the losses or scores of a model, or of a merge.

    Args:
        models: as for `read_measured`.
        about: as for `read_measured`.
        measured: losses on a text, or scores on a task.
    """
    write_entry(_KINDS[type(measured)], models[0], models[1:], measured, about)


def _place(
    kind: str, base: Checkpoint, models: Sequence[Checkpoint], about: str
) -> Path | None:
    """The file of an entry, or None if the cache is off."""
    home = folder()
    if home is None:
        return None
    packages = ("mergekit-metagpt", "mergekit", "transformers")
    key = hashlib.sha256(
        json.dumps([FORMAT, kind, [version(package) for package in packages]]).encode()
    )
    for checkpoint in (base, *models):
        key.update(checkpoint.digest.encode())
    key.update(about.encode())
    return home / f"{key.hexdigest()}.json"


def read_entry(
    kind: str,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    schema: type[C],
    about: str = "",
) -> C | None:
    """Look up an entry.

    Args:
        kind: of the content.
        base: the base, or a model that was measured alone.
        models: the models, in the order of the measurement.
        schema: of the content.
        about: everything else that the content depends on.

    Returns:
        the content, or None if there is no usable entry.
    """
    try:
        place = _place(kind, base, models, about)
        if place is None or place.stat().st_size > MOST_BYTES:
            return None
        head, _, payload = place.read_bytes().partition(b"\n")
        entry = _Entry.model_validate_json(head)
        checksum = hashlib.sha256(payload).hexdigest()
        if (entry.key, entry.kind, entry.checksum) != (place.stem, kind, checksum):
            raise ValueError("it belongs to other models, or its content has changed")
        content = schema.model_validate_json(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        LOG.info("cache entry not used: %s", error)
        return None
    LOG.info("%s of %s taken from %s", kind, ", ".join(entry.models), place)
    return content


def write_entry(
    kind: str,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    content: Content,
    about: str = "",
) -> None:
    """Store an entry, unless a model file was changed just now.

    Args:
        kind: of the content.
        base: as for `read_entry`.
        models: as for `read_entry`.
        content: to be stored.
        about: as for `read_entry`.
    """
    try:
        place = _place(kind, base, models, about)
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
            # Created first, so that the content is never readable by others.
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
    """Remove the oldest entries beyond the limit, and what killed writers left."""
    for file in home.glob(f"{UNFINISHED}*"):
        if time.time() - file.lstat().st_mtime > ABANDONED_S:
            file.unlink(missing_ok=True)
    files = sorted(home.glob("*.json"), key=lambda file: file.lstat().st_mtime)
    for file in files[: max(0, len(files) - MOST_ENTRIES)]:
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Remembered:
    """An entry of the cache, as the `cache` command lists it.

    Attributes:
        file: path of the entry.
        kind: `pair`, `gram`, `sample`, `losses` or `scores`; empty if unreadable.
        base: the base, as its user wrote it.
        models: the models, likewise.
        bytes: size of the file.
        written: time of the write, in seconds since 1970.
    """

    file: Path
    kind: str
    base: str
    models: tuple[str, ...]
    bytes: int
    written: float


def entries() -> Iterator[Remembered]:
    """Yield all entries, oldest first."""
    home = folder()
    if home is None or not home.is_dir():
        return
    for file in sorted(home.glob("*.json"), key=lambda file: file.lstat().st_mtime):
        try:
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
        the number of entries removed.

    Raises:
        OSError: an entry cannot be removed.
    """
    removed = list(entries())
    for entry in removed:
        entry.file.unlink(missing_ok=True)
    home = folder()
    for file in home.glob(f"{UNFINISHED}*") if home else ():
        file.unlink(missing_ok=True)
    return len(removed)
