"""Keeps on disk what was measured; never fails a merge: what it cannot do, it skips."""

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

from mergekit_metagpt.arithmetic.standard_errors import Covariances
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.scanning.results import Sampled, ScanResult

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


class _Pair(BaseModel):
    """A `ScanResult` of one model; `counted_as` leaves out names of their own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sq_norms: dict[str, SqNorm]
    base_sq_norms: dict[str, SqNorm]
    counted_as: dict[str, str]
    layers: dict[str, str]


class _Gram(BaseModel):
    """Gram matrices by tensor: of each the upper triangle, row by row."""

    model_config = ConfigDict(extra="forbid", strict=True)

    gram: dict[str, list[Finite]]


class _Estimates(BaseModel):
    """A `ScanResult` from a sample: nested lists by tensor and model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    names: list[str]
    sq_norms: list[list[SqNorm]]
    base_sq_norms: list[list[SqNorm]]
    gram: list[list[list[Finite]]] | None
    counted_as: list[dict[str, str]]
    layers: list[dict[str, str]]
    share: float
    seed: int
    bytes_read: int
    bytes_stored: int
    of_models: list[list[list[Finite]]]
    of_pairs: list[list[list[list[Finite]]]]


class ChunkLosses(BaseModel):
    """What a model loses on a text, chunk by chunk.

    `losses` holds the summed cross entropy of each chunk in nats, `tokens` how many
    were predicted, `bytes` how much of the text they spell.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    losses: list[Finite]
    tokens: list[int]
    bytes: list[int]


class TaskScores(BaseModel):
    """How a model scores on the documents of a task, by metric."""

    model_config = ConfigDict(extra="forbid", strict=True)

    documents: dict[str, list[Finite]]
    higher_is_better: dict[str, bool]


C = TypeVar("C", _Pair, _Gram, _Estimates, ChunkLosses, TaskScores)


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


def read_pair(base: Checkpoint, model: Checkpoint) -> ScanResult | None:
    """Look up what an earlier scan measured of one model.

    Args:
        base: the base.
        model: a fine-tune of it.

    Returns:
        the result, with the same bits, or None.
    """
    pair = _read("pair", base, [model], _Pair)
    if pair is None or pair.sq_norms.keys() != pair.base_sq_norms.keys():
        return None
    names = tuple(pair.sq_norms)
    sums = [[pair.sq_norms[name], pair.base_sq_norms[name]] for name in names]
    columns = torch.tensor(sums, dtype=torch.float64, device="cpu").reshape(-1, 2)
    return ScanResult(
        base=base.label,
        models=(model.label,),
        names=names,
        sq_norms=columns[:, :1],
        base_sq_norms=columns[:, 1:],
        counted_as=({**dict(zip(names, names, strict=True)), **pair.counted_as},),
        layers=(pair.layers,),
    )


def write_pair(base: Checkpoint, model: Checkpoint, result: ScanResult) -> None:
    """Remember what a scan measured of one model.

    Args:
        base: the base.
        model: a fine-tune of it.
        result: of this model alone.
    """
    if not bool(torch.isfinite(result.base_sq_norms).all()):
        return  # of weights beyond 1e150, which JSON has no number for
    names = result.names
    (counted_as,), (layers,) = result.counted_as, result.layers
    pair = _Pair(
        sq_norms=dict(zip(names, result.sq_norms[:, 0].tolist(), strict=True)),
        base_sq_norms=dict(
            zip(names, result.base_sq_norms[:, 0].tolist(), strict=True)
        ),
        counted_as={name: other for name, other in counted_as.items() if name != other},
        layers=dict(layers),
    )
    _write("pair", base, [model], pair)


def read_gram(
    base: Checkpoint, models: Sequence[Checkpoint], names: Sequence[str]
) -> torch.Tensor | None:
    """Look up the inner products that an earlier scan of these models summed.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        names: of the N tensors that count.

    Returns:
        shape `(N, K, K)`, float64, with the same bits, or None.
    """
    content, count = _read("gram", base, models, _Gram), len(models)
    rows, columns = torch.triu_indices(count, count, device="cpu").unbind()
    if content is None or content.gram.keys() != set(names):
        return None
    if any(len(values) != len(rows) for values in content.gram.values()):
        return None
    upper = torch.tensor(
        [content.gram[name] for name in names], dtype=torch.float64, device="cpu"
    )
    gram = upper.new_zeros(len(names), count, count)
    gram[:, rows, columns] = upper
    gram[:, columns, rows] = upper
    return gram


def write_gram(
    base: Checkpoint, models: Sequence[Checkpoint], result: ScanResult
) -> None:
    """Remember the inner products that a scan summed.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        result: of the scan.
    """
    assert result.gram is not None
    rows, columns = torch.triu_indices(len(models), len(models), device="cpu").unbind()
    upper = result.gram[:, rows, columns].tolist()
    content = _Gram(gram=dict(zip(result.names, upper, strict=True)))
    _write("gram", base, models, content)


def read_sample(
    base: Checkpoint, models: Sequence[Checkpoint], request: str
) -> ScanResult | None:
    """Look up what an earlier sample of these models estimated.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        request: what was asked for: share or budget, seed, inner products.

    Returns:
        the estimates, with the same bits, or None.
    """
    content = _read("sample", base, models, _Estimates, request)
    if content is None:
        return None
    n, k = len(content.names), len(models)

    def tensor(values: Sequence[object], *shape: int) -> torch.Tensor:
        made = torch.tensor(values, dtype=torch.float64, device="cpu")
        return made.reshape(shape)

    try:
        of_models = tensor(content.of_models, 2, n, k)
        of_pairs = tensor(content.of_pairs, len(content.of_pairs), n, k, k)
        return ScanResult(
            base=base.label,
            models=tuple(model.label for model in models),
            names=tuple(content.names),
            sq_norms=tensor(content.sq_norms, n, k),
            base_sq_norms=tensor(content.base_sq_norms, n, k),
            counted_as=tuple(content.counted_as),
            layers=tuple(content.layers),
            gram=None if content.gram is None else tensor(content.gram, n, k, k),
            sampled=Sampled(
                share=content.share,
                seed=content.seed,
                bytes_read=content.bytes_read,
                bytes_stored=content.bytes_stored,
                covariances=Covariances(of_pairs[0], *of_models, *of_pairs[1:]),
            ),
        )
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        LOG.info("cache entry not used: %s", error)
        return None


def write_sample(
    base: Checkpoint, models: Sequence[Checkpoint], request: str, result: ScanResult
) -> None:
    """Remember what a sample estimated.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        request: as for `read_sample`.
        result: of the sample.
    """
    sampled = result.sampled
    if sampled is None or not bool(torch.isfinite(result.base_sq_norms).all()):
        return
    own = sampled.covariances
    of_pairs = [own.sq_norms, own.gram, own.gram_and_sq_norms]
    content = _Estimates(
        names=list(result.names),
        sq_norms=result.sq_norms.tolist(),
        base_sq_norms=result.base_sq_norms.tolist(),
        gram=None if result.gram is None else result.gram.tolist(),
        counted_as=[dict(names) for names in result.counted_as],
        layers=[dict(names) for names in result.layers],
        share=sampled.share,
        seed=sampled.seed,
        bytes_read=sampled.bytes_read,
        bytes_stored=sampled.bytes_stored,
        of_models=[own.base_sq_norms.tolist(), own.sq_norms_and_base.tolist()],
        of_pairs=[values.tolist() for values in of_pairs if values is not None],
    )
    _write("sample", base, models, content, request)


M = TypeVar("M", ChunkLosses, TaskScores)
_KINDS = {ChunkLosses: "losses", TaskScores: "scores"}


def read_measured(
    schema: type[M], models: Sequence[Checkpoint], about: str
) -> M | None:
    """Look up what an earlier run measured of a model, or of a merge.

    Args:
        schema: `ChunkLosses` on a text, or `TaskScores` on a task.
        models: the model, or those that are merged.
        about: all else that it depends on: merge, text or task, settings, versions.

    Returns:
        what was measured, or None.
    """
    return _read(_KINDS[schema], models[0], models[1:], schema, about)


def write_measured(models: Sequence[Checkpoint], about: str, measured: M) -> None:
    """Remember what was measured of a model, or of a merge.

    Args:
        models: the model, or those that are merged.
        about: as for `read_measured`.
        measured: losses on a text, or scores on a task.
    """
    _write(_KINDS[type(measured)], models[0], models[1:], measured, about)


def _place(
    kind: str, base: Checkpoint, models: Sequence[Checkpoint], about: str
) -> Path | None:
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
    key.update(about.encode())
    return home / f"{key.hexdigest()}.json"


def _read(
    kind: str,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    schema: type[C],
    about: str = "",
) -> C | None:
    try:
        place = _place(kind, base, models, about)
        if place is None or _size(place) > MOST_BYTES:
            return None
        head, _, payload = place.read_bytes().partition(b"\n")
        entry = _Entry.model_validate_json(head)
        checksum = hashlib.sha256(payload).hexdigest()
        if (entry.key, entry.kind, entry.checksum) != (place.stem, kind, checksum):
            raise ValueError("it is of other models, or its content has changed")
        content = schema.model_validate_json(payload)
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
    kind: str,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    content: BaseModel,
    about: str = "",
) -> None:
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
        kind: `pair`, `gram`, `sample`, `losses` or `scores`; empty if unreadable.
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
