"""Measures each pair of base and model once in a process; has the public `scan`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from mergekit_metagpt.checkpoints.adapters import is_adapter
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import (
    is_adapter_of,
    open_checkpoint,
    unopened,
)
from mergekit_metagpt.checkpoints.pairs import check_pair
from mergekit_metagpt.checkpoints.remote import open_adapter
from mergekit_metagpt.scanning import at_hand, factors, scan_cache, sharing
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.sampling import Sample, sample_checkpoints

if TYPE_CHECKING:
    from mergekit.common import ModelReference

    Model: TypeAlias = (
        str
        | os.PathLike[str]
        | ModelReference
        | torch.nn.Module
        | Mapping[str, torch.Tensor]
    )

# Results of single models by the identities of base and model, and results of requests
# by the identities of all their models, for estimates with the sample. Reading needs no
# lock; scanning and writing need `_LOCK`.
_Identities = tuple[object, ...]
_PAIRS: dict[_Identities, ScanResult] = {}
_REQUESTS: dict[_Identities, ScanResult] = {}
_SAMPLES: dict[_Identities, ScanResult] = {}
_FAILURES: dict[_Identities, Exception] = {}
_MOST_PAIRS = 1024
_MOST_REQUESTS = 64
_LOCK = threading.Lock()
# How to answer requests for a sample: True by a sample, False by an exact scan, None by
# an exact result where there is one. Not thread-local: mergekit may merge on threads.
_estimated: bool | None = None


def measure(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    gram: bool | None = False,
    workers: int | None = None,
    sample: Sample | None = None,
) -> ScanResult:
    """Measure each model against the base, scanning only what was not scanned before.

    One thread scans while others that call this wait. An error of the scan is raised
    again for every request for the same models, until `forget_failures`.

    Adapters are measured from their factors, and never from a sample. The base is read
    for the norms of its own tensors, unless there is a sample or it was not opened.

    Args:
        base: the base.
        models: K fine-tunes of it, or adapters.
        gram: whether inner products are needed; with None they are returned if an
            earlier scan left them in the cache.
        workers: number of threads; see `Files` for the default.
        sample: estimate from a sample, unless there is an earlier exact scan. Later
            requests in this process get the same estimates: a merge has one result.

    Returns:
        the result, with the models in the given order, named as when first measured.

    Raises:
        ValueError: base and model do not fit, a weight is NaN or infinite, or both
            adapters and a sample of other models are asked for.
        OSError: a file cannot be read or has changed since it was opened.
    """
    if sample is not None and (sample.share == 1 or _estimated is False):
        sample = None
    if sample is not None and any(model.adapter for model in models):
        base, sample = _without(base, models), None
    request = (base.identity, *(model.identity for model in models))
    if (earlier := _remembered(request, sample, gram)) is not None:
        return earlier
    with _LOCK:
        # Another thread may have scanned the same models meanwhile.
        if (earlier := _remembered(request, sample, gram)) is not None:
            return earlier
        attempt = (*request, sample, bool(gram))
        if attempt in _FAILURES:
            raise _FAILURES[attempt]
        try:
            measured = _measured(base, models, gram, workers, sample)
            adapted = (model.vocabulary for model in models if model.adapter)
            result = replace(measured, vocabulary=base.vocabulary.union(*adapted))
        except Exception as error:
            _FAILURES[attempt] = error
            raise
        if sample is not None:
            _SAMPLES[attempt] = result
        if result.sampled is None:
            for at, model in enumerate(models):
                pair = replace(result.select([at]), gram=None)
                _PAIRS.setdefault((base.identity, model.identity), pair)
            _REQUESTS[request] = result
        for kept in (_PAIRS, _REQUESTS, _SAMPLES):
            while len(kept) > (_MOST_PAIRS if kept is _PAIRS else _MOST_REQUESTS):
                del kept[next(iter(kept))]
    return result


def _without(base: Checkpoint, models: Sequence[Checkpoint]) -> Checkpoint:
    """A base without tensors, so that adapters are measured without reading it."""
    if full := [model.label for model in models if not model.adapter]:
        raise ValueError(
            f"{full[0]} would be estimated from a sample, and adapters beside it are "
            "measured exactly: their inner products cannot be. Measure all of them "
            "without --remote, --sample and --budget, or the adapters alone"
        )
    return unopened(base.label)


@contextmanager
def again(*, estimated: bool) -> Iterator[None]:
    """Repeat a merge with the same kind of norms.

    Args:
        estimated: whether its norms were estimates. If so, requests for a sample are
            answered by a sample, else by an exact scan.

    Yields:
        while the merge is repeated.
    """
    global _estimated
    before, _estimated = _estimated, estimated
    try:
        yield
    finally:
        _estimated = before


def _remembered(
    request: _Identities, sample: Sample | None, gram: bool | None
) -> ScanResult | None:
    if sample is not None:
        answer = _SAMPLES.get((*request, sample, bool(gram)))
        if answer is not None or _estimated:
            return answer
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
    only_estimates = sample is not None and _estimated
    # Rank 0 reads and writes the cache for all ranks: those of nodes may differ.
    pairs = sharing.from_leader(
        lambda: [None if only_estimates else _known(base, model) for model in models]
    )
    missing = [at for at, pair in enumerate(pairs) if pair is None]
    if gram is not False and not missing:
        result = ScanResult.joined([pair for pair in pairs if pair is not None])
        products = sharing.from_leader(
            lambda: scan_cache.read_gram(base, models, result.names)
        )
        if products is not None or gram is None:
            return replace(result, gram=products)
    if sample is not None and (missing or gram):
        return sharing.from_leader(
            lambda: _sampled(base, models, sample, bool(gram), workers)
        )
    scanned = list(range(len(models))) if gram else missing
    if scanned:
        new = _scanned(base, [models[at] for at in scanned], bool(gram), workers)
        for row, at in enumerate(scanned):
            pairs[at] = pair = replace(new.select([row]), gram=None)
            scan_cache.write_pair(base, models[at], pair)
        if gram:
            scan_cache.write_gram(base, models, new)
            return new
    return ScanResult.joined([pair for pair in pairs if pair is not None])


def _scanned(
    base: Checkpoint, models: Sequence[Checkpoint], gram: bool, workers: int | None
) -> ScanResult:
    """Measure fine-tunes in one pass over the files, adapters from their factors."""
    full = [at for at, model in enumerate(models) if not model.adapter]
    tuned = [models[at] for at in full]
    if len(full) == len(models):
        return scan_checkpoints(base, tuned, gram=gram, workers=workers)
    added = [at for at, model in enumerate(models) if model.adapter]
    adapters = [models[at] for at in added]
    own = sharing.from_leader(lambda: _known(base, base))
    crossing = factors.Crossing(base, adapters) if gram and full else None
    result = None
    if full or (own is None and base.tensors):
        # All adapters need the tensors of the base that count, and their norms. Unless
        # an earlier scan has them, measure the base against itself.
        itself = [] if own else [base]
        result = scan_checkpoints(
            base,
            [*tuned, *itself],
            gram=gram and bool(full),
            workers=workers,
            crossing=crossing,
        )
        if own is None:
            own = replace(result.select([len(tuned)]), gram=None)
            _PAIRS[base.identity, base.identity] = own
            scan_cache.write_pair(base, base, own)
        result = result.select(range(len(tuned))) if full else None
    exact = factors.scan_adapters(
        base, adapters, own if base.tensors else None, workers=workers
    )
    order = [[*full, *added].index(at) for at in range(len(models))]
    products = crossing.found if crossing else {}
    return factors.joined(result, exact, products, order, gram=gram)


def _is_adapter(model: ModelReference, base: ModelReference) -> bool:
    """Whether a model is an adapter of this base, with or without its name."""
    alone = model is not base and is_adapter(Path(model.model.path))
    return alone or is_adapter_of(model, base)


def _known(base: Checkpoint, model: Checkpoint) -> ScanResult | None:
    return _PAIRS.get((base.identity, model.identity)) or scan_cache.read_pair(
        base, model
    )


def _sampled(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    sample: Sample,
    gram: bool,
    workers: int | None,
) -> ScanResult:
    request = f"{sample} {gram}"
    estimated = scan_cache.read_sample(base, models, request)
    if estimated is None:
        estimated = sample_checkpoints(base, models, sample, gram=gram, workers=workers)
        scan_cache.write_sample(base, models, request, estimated)
    return estimated


def forget_failures() -> None:
    """Let the next merge retry what failed in an earlier one."""
    _FAILURES.clear()


def _state_of(model: Model) -> Mapping[str, torch.Tensor] | None:
    """The tensors of a model in memory, or None for a model on disk."""
    if isinstance(model, torch.nn.Module):
        return model.state_dict()
    return model if isinstance(model, Mapping) else None


def scan(
    base: Model,
    models: Sequence[Model],
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
    once. If vocabularies differ in size, their common rows count. Each file is read
    once.

    In memory, tensors that share storage count once, shapes must be equal, and the
    result has the bits of a merge by mergekit's `merge_state_dicts`.

    Args:
        base: theta_0: a folder, a hub repository, a `ModelReference`, or a module or
            state dict in memory.
        models: the K fine-tunes, likewise. A LoRA adapter (`base+adapter`, or only its
            folder) is measured from its factors.
        gram: also compute <tau_s, tau_t>, for cosines.
        workers: number of threads; by default one per CPU of this process.
        lora_merge_cache: folder for merged adapters. With it, `base+adapter` is
            measured as a merge does it: from the merged copy, which is made if needed.
        transformers_cache: folder of downloaded models.
        trust_remote_code: run code that comes with a model, for its architecture.

    Returns:
        the squared norms by tensor group; the same bits for any number of workers.

    Raises:
        TypeError: some models are in memory, and some are not.
        ValueError: no models, models that do not fit the base, quantised models,
            adapters that need a merged copy, a weight that is NaN or infinite.
        OSError: a file is missing, truncated, or changes during the scan.
    """
    if not models:
        raise ValueError("there is no model to measure against the base; give one")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected a number >= 1 or None")
    states = [_state_of(model) for model in (base, *models)]
    held = [state for state in states if state is not None]
    if len(held) == len(states):
        return at_hand.measure_states(held[0], held[1:], gram=gram)
    if held:
        raise TypeError(
            f"{len(held)} of {len(states)} models are in memory; expected all of them, "
            "or none: give the others as state dicts, or these as folders"
        )
    from mergekit.common import ModelReference

    references = [
        model if isinstance(model, ModelReference) else ModelReference.parse(f"{model}")
        for model in (base, *models)
    ]
    opened, *tuned = (
        open_adapter(model)
        if lora_merge_cache is None and _is_adapter(model, references[0])
        else open_checkpoint(
            model,
            lora_merge_cache=lora_merge_cache,
            transformers_cache=transformers_cache,
            trust_remote_code=trust_remote_code,
        )
        for model in references
    )
    for model in tuned:
        if model.adapter:
            check_pair(opened, model)
    forget_failures()
    result = measure(opened, tuned, gram=gram, workers=workers)
    return replace(
        result,
        base=opened.label,
        models=tuple(model.label for model in tuned),
        gram=result.gram if gram else None,
    )
