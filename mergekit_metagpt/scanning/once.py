"""Measures fine-tunes against their base, each pair once; the public `scan`."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.scanning import cache, ranks
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.sampling import Sample, sample_checkpoints

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Results of one model each by the identities of base and model, and of all models of a
# request by its identities. Reading needs no lock; scanning and writing need `_LOCK`.
_Identities = tuple[object, ...]
_PAIRS: dict[_Identities, ScanResult] = {}
_REQUESTS: dict[_Identities, ScanResult] = {}
_FAILURES: dict[_Identities, Exception] = {}
_MOST_PAIRS = 1024
_MOST_REQUESTS = 64
_LOCK = threading.Lock()


def measure(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    gram: bool | None = False,
    workers: int | None = None,
    sample: Sample | None = None,
) -> ScanResult:
    """Measure each model against the base, scanning what was not scanned before.

    One thread scans; others that ask meanwhile wait for it. An error of the scan is
    raised in all that ask for the same models, until `forget_failures`.

    Args:
        base: the base.
        models: K fine-tunes of it.
        gram: whether inner products are needed; None takes those that an earlier scan
            left in the cache, and does without otherwise.
        workers: threads; the CPUs at hand if None.
        sample: estimate from a sample, unless an earlier exact scan is remembered.

    Returns:
        the result, with the models in their order; named as when it was measured.

    Raises:
        ValueError: base and model do not fit, or a weight is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    request = (base.identity, *(model.identity for model in models))
    if (earlier := _remembered(request, gram)) is not None:
        return earlier
    with _LOCK:
        # Another thread may have scanned for us while we waited.
        if (earlier := _remembered(request, gram)) is not None:
            return earlier
        attempt = (*request, sample)
        if attempt in _FAILURES:
            raise _FAILURES[attempt]
        try:
            measured = _measured(base, models, gram, workers, sample)
            result = replace(measured, vocabulary=base.vocabulary)
        except Exception as error:
            _FAILURES[attempt] = error
            raise
        if result.sampled is not None:
            return result  # only the cache keeps it: an exact one may be asked for next
        for at, model in enumerate(models):
            pair = replace(result.select([at]), gram=None)
            _PAIRS.setdefault((base.identity, model.identity), pair)
        _REQUESTS[request] = result
        for kept, most in ((_PAIRS, _MOST_PAIRS), (_REQUESTS, _MOST_REQUESTS)):
            while len(kept) > most:
                del kept[next(iter(kept))]
    return result


def _remembered(request: _Identities, gram: bool | None) -> ScanResult | None:
    result = _REQUESTS.get(request)
    return result if result and (gram is False or result.gram is not None) else None


def _measured(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    gram: bool | None,
    workers: int | None,
    sample: Sample | None,
) -> ScanResult:
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    # Of several ranks, rank 0 says what is known, and keeps what is new: the caches of
    # nodes may differ.
    group = ranks.group()
    leads = group is None or group.leads
    pairs = ranks.from_leader(
        lambda: [
            _PAIRS.get((base.identity, model.identity)) or cache.read_pair(base, model)
            for model in models
        ]
    )
    missing = [at for at, pair in enumerate(pairs) if pair is None]
    if gram is not False and not missing:
        result = ScanResult.joined([pair for pair in pairs if pair is not None])
        products = ranks.from_leader(
            lambda: cache.read_gram(base, models, result.names)
        )
        if products is not None or gram is None:
            return replace(result, gram=products)
    if sample is not None and (missing or gram):
        request = f"{sample.share} {sample.budget} {sample.seed} {bool(gram)}"
        return ranks.from_leader(
            lambda: _estimated(base, models, sample, request, bool(gram), workers)
        )
    scanned = list(range(len(models))) if gram else missing
    if scanned:
        new = scan_checkpoints(
            base, [models[at] for at in scanned], gram=bool(gram), workers=workers
        )
        for row, at in enumerate(scanned):
            pairs[at] = pair = replace(new.select([row]), gram=None)
            if leads:
                cache.write_pair(base, models[at], pair)
        if gram:
            if leads:
                cache.write_gram(base, models, new)
            return new
    return ScanResult.joined([pair for pair in pairs if pair is not None])


def _estimated(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    sample: Sample,
    request: str,
    gram: bool,
    workers: int | None,
) -> ScanResult:
    estimated = cache.read_sample(base, models, request)
    if estimated is None:
        estimated = sample_checkpoints(base, models, sample, gram=gram, workers=workers)
        cache.write_sample(base, models, request, estimated)
    return estimated


def forget_failures() -> None:
    """Let the next merge try again what failed in an earlier one."""
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
    t both store, at the coarser of the two stored precisions. A tied weight counts
    once; of resized vocabularies the common rows count. One pass over the files.

    Args:
        base: theta_0: a folder, a hub repository or a `ModelReference`.
        models: the K fine-tunes; `model+adapter` for a LoRA.
        gram: also compute <tau_s, tau_t>, for cosines.
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
    forget_failures()
    result = measure(opened, tuned, gram=gram, workers=workers)
    return replace(
        result,
        base=opened.label,
        models=tuple(model.label for model in tuned),
        gram=result.gram if gram else None,
    )
