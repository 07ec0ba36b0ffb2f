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
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.scanning import sharing

LOG = logging.getLogger("mergekit_metagpt")
VARIABLE = "MERGEKIT_METAGPT_CACHE"
# Raise it when what is measured, or how it is stored, changes.
FORMAT = 3
MOST_ENTRIES = 1000
# Pattern of the names of entries.
ENTRY = "[0-9a-f]" * 64 + ".json"
MOST_BYTES = 1 << 28
# Younger model files are not trusted: with a coarse clock, a file can change twice and
# keep its modification time.
YOUNG_S = 2.0
# An entry is written under this prefix; an old one was left by a killed process.
UNFINISHED = ".metagpt-"
ABANDONED_S = 3600.0
# Read back only with exactly these fields and types.
STRICT = ConfigDict(extra="forbid", strict=True)


class Content(BaseModel):
    """What is stored."""

    model_config = STRICT
    kind: ClassVar[str]


class _Entry(BaseModel):
    """The first line of a file, which describes the content below it."""

    model_config = STRICT
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

    kind = "losses"
    losses: list[FiniteFloat]
    tokens: list[int]
    bytes: list[int]


class TaskScores(Content):
    """A model's scores on each document of a task, by metric."""

    kind = "scores"
    documents: dict[str, list[FiniteFloat]]
    higher_is_better: dict[str, bool]


C = TypeVar("C", bound=Content)


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


def _place(kind: str, models: Sequence[Checkpoint], about: str) -> Path | None:
    """The file of an entry, or None if the cache is off."""
    home = folder()
    if home is None:
        return None
    packages = ("mergekit-metagpt", "mergekit", "transformers")
    key = hashlib.sha256(
        json.dumps([FORMAT, kind, [version(package) for package in packages]]).encode()
    )
    for checkpoint in models:
        key.update(checkpoint.digest.encode())
    key.update(about.encode())
    return home / f"{key.hexdigest()}.json"


def read_entry(
    schema: type[C], models: Sequence[Checkpoint], about: str = ""
) -> C | None:
    """Look up a measurement of some models.

    Args:
        schema: of the content.
        models: base and models in the order of the measurement, or a single model.
        about: everything else that the content depends on.

    Returns:
        the content, or None if there is no usable entry.
    """
    try:
        place = _place(schema.kind, models, about)
        if place is None or place.stat().st_size > MOST_BYTES:
            return None
        head, _, payload = place.read_bytes().partition(b"\n")
        entry = _Entry.model_validate_json(head)
        expected = place.stem, schema.kind, hashlib.sha256(payload).hexdigest()
        if (entry.key, entry.kind, entry.checksum) != expected:
            raise ValueError("it belongs to other models, or its content has changed")
        content = schema.model_validate_json(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        LOG.info("cache entry not used: %s", error)
        return None
    LOG.info("%s of %s taken from %s", entry.kind, ", ".join(entry.models), place)
    return content


def write_entry(
    content: Content, models: Sequence[Checkpoint], about: str = ""
) -> None:
    """Store a measurement on rank 0, unless a model file was changed just now.

    Args:
        content: to be stored.
        models: as for `read_entry`.
        about: as for `read_entry`.
    """
    try:
        place = _place(content.kind, models, about)
        youngest = max(file.modified_ns for model in models for file in model.identity)
        young = time.time() - youngest / 1e9 < YOUNG_S
        if place is None or young or not sharing.leads():
            return
        payload = content.model_dump_json().encode()
        base, *others = (model.label for model in models)
        entry = _Entry(
            key=place.stem,
            kind=content.kind,
            base=base,
            models=others,
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


def _oldest_first(home: Path) -> list[Path]:
    # Other files in the folder are somebody else's.
    return sorted(home.glob(ENTRY), key=lambda file: file.lstat().st_mtime)


def _trim(home: Path) -> None:
    """Remove the oldest entries beyond the limit, and what killed writers left."""
    for file in home.glob(f"{UNFINISHED}*"):
        if time.time() - file.lstat().st_mtime > ABANDONED_S:
            file.unlink(missing_ok=True)
    for file in _oldest_first(home)[:-MOST_ENTRIES]:
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
    for file in _oldest_first(home):
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
