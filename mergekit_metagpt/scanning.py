"""Measures fine-tunes against their base: one pass over the files, one scan a pair."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt import kernels
from mergekit_metagpt.alignment import Alignment, SharedTensor, align
from mergekit_metagpt.checkpoints import Checkpoint, open_checkpoint
from mergekit_metagpt.files import Readers
from mergekit_metagpt.results import PairNorms, ScanResult
from mergekit_metagpt.workers import run

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Elements that one worker takes at a time. Fixed, as are the kernel's chunks, so that
# sums are formed in the same order whatever the number of workers.
SEGMENT = 64 * kernels.CHUNK


@dataclass(frozen=True)
class _Group:
    """Models that share one stored base tensor, and what is summed over it."""

    name: str
    members: tuple[int, ...]
    pairs: tuple[SharedTensor, ...]
    kernel: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]

    @property
    def segments(self) -> list[slice]:
        """Parts of the flattened overlap; one where a tensor cannot be read in part."""
        numel = self.pairs[0].numel
        step = SEGMENT if all(pair.divisible for pair in self.pairs) else numel
        starts = range(0, max(numel, 1), step or 1)
        return [slice(at, min(at + step, numel)) for at in starts]

    @property
    def bytes_per_element(self) -> int:
        """Stored bytes, of base and models, behind one element of the overlap."""
        stored = [self.pairs[0].base, *(pair.model for pair in self.pairs)]
        return sum(tensor.dtype.itemsize for tensor in stored)

    def sums(self, readers: Readers, part: slice) -> torch.Tensor:
        """Run the kernel over a part of the flattened overlap."""
        base = self.pairs[0].cut(readers.read(self.pairs[0].base))
        tuned = [pair.cut(readers.read(pair.model)) for pair in self.pairs]
        return self.kernel(base[part], [tensor[part] for tensor in tuned])


def _groups(
    base: Checkpoint, alignments: Sequence[Alignment], *, gram: bool
) -> list[_Group]:
    """Group the pairs of all models, in the order in which the base stores them."""
    found: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}
    pairs: dict[tuple[str, int], SharedTensor] = {}
    for k, alignment in enumerate(alignments):
        for pair in alignment.shared:
            pairs[pair.name, k] = pair
            by_shape = found.setdefault((pair.name, pair.base.name), {})
            by_shape.setdefault(pair.shape, []).append(k)

    groups = []
    for (name, _), by_shape in found.items():
        calls = [(s, ks, kernels.sq_norms) for s, ks in by_shape.items()]
        if gram:
            # Task vectors of different lengths meet on the rows that all of them have.
            common = tuple(map(min, zip(*by_shape, strict=True)))
            everyone = [k for ks in by_shape.values() for k in ks]
            longer = [call for call in calls if call[0] != common]
            calls = [(common, everyone, kernels.accumulate_gram), *longer]
        groups += [
            _Group(
                name,
                tuple(ks),
                tuple(replace(pairs[name, k], shape=shape) for k in ks),
                kernel,
            )
            for shape, ks, kernel in calls
        ]
    position = {name: at for at, name in enumerate(base.tensors)}
    return sorted(groups, key=lambda group: position.get(group.name, -1))


def _scan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    gram: bool = False,
    workers: int | None = None,
) -> tuple[list[PairNorms], dict[str, torch.Tensor]]:
    """Measure every model against the base in one pass over the files.

    Args:
        base: the base.
        models: K fine-tunes of it.
        gram: also sum the Gram matrices.
        workers: threads; the CPUs at hand if None.

    Returns:
        the squared norms of each pair, and (with `gram`) by output name the Gram
        matrix, shape `(K, K)`.
    """
    readers = Readers()
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    alignments = [align(base, model, readers) for model in models]
    groups = _groups(base, alignments, gram=gram)
    tasks = [
        (
            (part.stop - part.start) * group.bytes_per_element,
            functools.partial(group.sums, readers, part),
        )
        for group in groups
        for part in group.segments
    ]
    results = iter(run(tasks, workers))
    norms: list[dict[str, float]] = [{} for _ in models]
    grams: dict[str, torch.Tensor] = {}
    for group in groups:
        parts = [next(results) for _ in group.segments]
        sums = sum(parts[1:], parts[0])
        values = sums
        if sums.ndim == 2:
            index = torch.tensor(group.members, device="cpu")
            whole = grams.setdefault(
                group.name,
                torch.zeros(len(models), len(models), dtype=sums.dtype, device="cpu"),
            )
            whole[index[:, None], index] += sums
            values = sums.diagonal()
        _check_finite(values, group, base, models, readers)
        for k, value in zip(group.members, values.tolist(), strict=True):
            norms[k][group.name] = value
            if gram:
                grams[group.name][k, k] = value
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    return [
        PairNorms(
            sq_norms={pair.name: found[pair.name] for pair in alignment.shared},
            counted_as=alignment.counted_as,
            layers=alignment.layers,
        )
        for found, alignment in zip(norms, alignments, strict=True)
    ], grams


def _check_finite(
    values: torch.Tensor,
    group: _Group,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    readers: Readers,
) -> None:
    """Explain a squared norm that is not finite: name the tensor and the model."""
    for k, pair, finite in zip(
        group.members, group.pairs, torch.isfinite(values).tolist(), strict=True
    ):
        if finite:
            continue
        for owner, stored in ((base, pair.base), (models[k], pair.model)):
            if not bool(torch.isfinite(pair.cut(readers.read(stored))).all()):
                raise ValueError(
                    f"{stored.name} of {owner.label} holds NaN or infinity (in "
                    f"{stored.file}); a merge would spread it. Repair or replace it"
                )
        raise ValueError(
            f"||tau||^2 of {pair.name} of {models[k].label} exceeds float64: its "
            "weights differ from the base's by more than 1e150"
        )


_Request = tuple[object, tuple[object, ...]]

_MEMO: dict[tuple[object, object], Future[PairNorms]] = {}
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
    keys = [(base.identity, model.identity) for model in models]
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
            _fill({key: claimed[key] for key in mine}, base, mine.values(), request)
        try:
            return [future.result() for future in futures]
        except Exception:
            # Another request's scan failed, perhaps for a model that is not ours: what
            # it had claimed is free again.
            continue


def _fill(
    claimed: Mapping[tuple[object, object], Future[PairNorms]],
    base: Checkpoint,
    models: Iterable[Checkpoint],
    request: _Request,
) -> None:
    """Scan, and hand the results (or the error) to everybody who waits for them."""
    try:
        with _SCAN_LOCK:
            found, _ = _scan(base, list(models))
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
    with _SCAN_LOCK:
        found, grams = _scan(opened, tuned, gram=gram, workers=workers)
    names = sorted({name for norms in found for name in norms.sq_norms})
    rows = [[norms.sq_norms.get(name, 0.0) for norms in found] for name in names]
    return ScanResult(
        base=opened.label,
        models=tuple(checkpoint.label for checkpoint in tuned),
        names=tuple(names),
        sq_norms=torch.tensor(rows, dtype=torch.float64, device="cpu"),
        gram=torch.stack([grams[name] for name in names]) if gram else None,
    )
