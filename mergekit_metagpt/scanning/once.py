"""Measures fine-tunes against their base, each pair once; the public `scan`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.results import Details, PairNorms, ScanResult

if TYPE_CHECKING:
    from mergekit.common import ModelReference


_Key = tuple[object, object]


_Request = tuple[object, tuple[object, ...]]


_MEMO: dict[_Key, Future[PairNorms]] = {}


_MEMO_SIZE = 1024


_FAILURES: dict[_Request, Exception] = {}


_MEMO_LOCK = threading.Lock()


_SCAN_LOCK = threading.Lock()


def pair_norms(base: Checkpoint, models: Sequence[Checkpoint]) -> list[PairNorms]:
    """Return the squared norms of each model, scanning what was not scanned before.

    One thread scans, all others that ask for the same pairs wait for it. An error of
    the scan is raised in all that ask for the same models, until `forget_failures`.

    Args:
        base: the base.
        models: fine-tunes of it.

    Returns:
        the squared norms of each model, in their order.

    Raises:
        ValueError: base and model do not fit, or a weight is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    request = base.identity, tuple(model.identity for model in models)
    keys: list[_Key] = [(base.identity, model.identity) for model in models]
    while True:
        with _MEMO_LOCK:
            if request in _FAILURES:
                raise _FAILURES[request]
            mine = {
                key: model
                for key, model in zip(keys, models, strict=True)
                if key not in _MEMO
            }
            for key in mine:
                _MEMO[key] = Future()
            futures = [_MEMO[key] for key in keys]
            while len(_MEMO) > max(_MEMO_SIZE, len(keys)):
                del _MEMO[next(iter(_MEMO))]
        if mine:
            claimed = dict(zip(keys, futures, strict=True))
            ours = {key: claimed[key] for key in mine}
            _fill(ours, base, list(mine.values()), request)
        try:
            return [future.result() for future in futures]
        except Exception:
            # Another request's scan failed, perhaps for a model that is not ours: what
            # it had claimed is free again.
            continue


def _fill(
    claimed: Mapping[_Key, Future[PairNorms]],
    base: Checkpoint,
    models: Sequence[Checkpoint],
    request: _Request,
) -> None:
    """Scan, and hand the results (or the error) to everybody who waits for them."""
    try:
        with _SCAN_LOCK:
            found = _measured(base, models)
    except BaseException as error:
        with _MEMO_LOCK:
            for key in claimed:
                _MEMO.pop(key, None)
            if isinstance(error, Exception):
                _FAILURES[request] = error
        waiting = error if isinstance(error, Exception) else RuntimeError("interrupted")
        for future in claimed.values():
            future.set_exception(waiting)
        raise
    for future, norms in zip(claimed.values(), found, strict=True):
        future.set_result(norms)


def _measured(
    base: Checkpoint, models: Sequence[Checkpoint], workers: int | None = None
) -> list[PairNorms]:
    """Squared norms of each model: from the cache, or else from one scan."""
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    found = [cache.pair_norms(base, model) for model in models]
    unknown = [k for k, norms in enumerate(found) if norms is None]
    if unknown:
        wanted = [models[k] for k in unknown]
        scanned, _ = scan_checkpoints(base, wanted, workers=workers)
        for k, norms in zip(unknown, scanned, strict=True):
            found[k] = norms
            cache.keep_pair(base, models[k], norms)
    return [norms for norms in found if norms is not None]


def _measured_in_detail(
    base: Checkpoint, models: Sequence[Checkpoint], workers: int | None = None
) -> tuple[list[PairNorms], Details]:
    """The same with the details."""
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    known = [cache.pair_norms(base, model) for model in models]
    pairs = [norms for norms in known if norms is not None]
    details = cache.details(base, models) if len(pairs) == len(models) else None
    if details is None:
        pairs, details = scan_checkpoints(base, models, detailed=True, workers=workers)
        assert details is not None
        for model, norms in zip(models, pairs, strict=True):
            cache.keep_pair(base, model, norms)
        cache.keep_details(base, models, details)
    return pairs, details


def detailed_norms(
    base: Checkpoint, models: Sequence[Checkpoint], workers: int | None = None
) -> tuple[list[PairNorms], Details]:
    """Measure all that `Details` holds; a merge of these models then scans nothing.

    Args:
        base: the base.
        models: fine-tunes of it.
        workers: threads; the CPUs at hand if None.

    Returns:
        the squared norms of each model, in their order, and the details.

    Raises:
        ValueError: as `pair_norms`.
        OSError: as `pair_norms`.
    """
    with _SCAN_LOCK:
        found, details = _measured_in_detail(base, models, workers)
    with _MEMO_LOCK:
        for model, norms in zip(models, found, strict=True):
            key = base.identity, model.identity
            if key not in _MEMO:  # another thread may be scanning the same pair
                _MEMO[key] = Future()
                _MEMO[key].set_result(norms)
    return found, details


def forget_failures() -> None:
    """Let the next merge try again what failed in an earlier one."""
    with _MEMO_LOCK:
        _FAILURES.clear()


def scan(
    base: str | os.PathLike[str] | ModelReference,
    models: Sequence[str | os.PathLike[str] | ModelReference],
    *,
    gram: bool = False,
    workers: int | None = None,
    lora_merge_cache: str | None = None,
    transformers_cache: str | None = None,
    trust_remote_code: bool = False,
) -> ScanResult:
    """Measure the task vectors of fine-tunes of one base, without merging.

    n_t = ||theta_t - theta_0||^2 over every floating-point tensor that base and model
    t both store, at the coarser of the two stored precisions; a tied weight counts
    once; of resized vocabularies the common rows count. One pass over the files.

    Args:
        base: theta_0: a folder, a hub repository or a `ModelReference`.
        models: the K fine-tunes; `model+adapter` for a LoRA.
        gram: also compute <tau_s, tau_t> for cosines, ||theta_0||^2, and what rounding
            between stored precisions takes away.
        workers: threads; by default the number of CPUs at hand.
        lora_merge_cache: folder for merged adapters, needed for LoRA models.
        transformers_cache: folder of downloaded models.
        trust_remote_code: run code that comes with a model, for its architecture.

    Returns:
        the squared norms per tensor group; the same bits for any number of workers.

    Raises:
        ValueError: no models, models that do not fit the base, quantised or bare
            adapters, a weight that is NaN or infinite.
        OSError: a file is missing, truncated, or changes during the scan.
    """
    if not models:
        raise ValueError("no models to measure against the base; give at least one")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected a number >= 1 or None")
    opened, *tuned = (
        open_checkpoint(
            model,
            lora_merge_cache=lora_merge_cache,
            transformers_cache=transformers_cache,
            trust_remote_code=trust_remote_code,
        )
        for model in (base, *models)
    )
    details: Details | None = None
    with _SCAN_LOCK:
        if gram:
            found, details = _measured_in_detail(opened, tuned, workers)
        else:
            found = _measured(opened, tuned, workers)
    return ScanResult.of(opened.label, [c.label for c in tuned], found, details)
