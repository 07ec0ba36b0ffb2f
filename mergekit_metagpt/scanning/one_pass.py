"""Reads all files of a base and its fine-tunes once, and sums over their tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_metagpt.arithmetic import in_parts, squared_norms
from mergekit_metagpt.arithmetic.in_parts import scratch
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.files import Readers
from mergekit_metagpt.checkpoints.pairs import Alignment, SharedTensor, align
from mergekit_metagpt.scanning.pieces import Files
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.threads import default_workers, run

# Elements that one worker takes at a time, and that it reads at a time. Fixed, so that
# sums are formed in the same order whatever the number of workers.
SEGMENT = 64 * in_parts.CHUNK
PIECE = in_parts.CHUNK
# Models whose pieces are held at a time: memory does not grow with their number.
BATCH = 8


@dataclass(frozen=True)
class _Sums:
    """Sums over a part of a tensor group of K models.

    `sq_norms` has shape `(K,)`, `base` is ||theta_0||^2, shape `()`, and `gram` has
    shape `(K, K)` or is None; all float64.
    """

    sq_norms: torch.Tensor
    base: torch.Tensor
    gram: torch.Tensor | None = None

    def __add__(self, other: _Sums) -> _Sums:
        both = self.gram is not None and other.gram is not None
        return _Sums(
            self.sq_norms + other.sq_norms,
            self.base + other.base,
            self.gram + other.gram if both else None,  # type: ignore[operator]
        )


@dataclass(frozen=True)
class _Group:
    """Models that share one stored base tensor, and what is summed over it."""

    name: str
    members: tuple[int, ...]
    pairs: tuple[SharedTensor, ...]
    gram: bool

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

    def sums(self, files: Files, part: slice) -> _Sums:
        """Sum over a part of the flattened overlap, piece by piece.

        Without inner products, the pieces of a few models are in memory at a time.
        """
        base = files.source(self.pairs[0], self.pairs[0].base)
        tuned = [files.source(pair, pair.model) for pair in self.pairs]
        together = len(tuned) if self.gram else min(len(tuned), BATCH)
        widest = max(source.dtype.itemsize for source in (base, *tuned))
        size = max(1, min(PIECE, part.stop - part.start))
        totals = [0.0] * len(tuned)
        base_total, gram = 0.0, None
        cpu = torch.device("cpu")
        with (
            scratch(1 + together, size * widest, torch.uint8, cpu) as rooms,
            scratch(1, size, base.dtype, cpu) as zeros,
        ):
            zeros.zero_()
            for start in range(part.start, max(part.stop, part.start + 1), size):
                piece = slice(start, min(start + size, part.stop))
                reference = base.read(piece, rooms[0])
                nothing = zeros[0, : reference.numel()]
                base_total += squared_norms.flat_sq_norms(nothing, [reference])[0]
                for first in range(0, len(tuned), together):
                    read = [
                        model.read(piece, room)
                        for model, room in zip(
                            tuned[first : first + together], rooms[1:], strict=False
                        )
                    ]
                    if self.gram:
                        products = squared_norms.gram_matrix(reference, read)
                        gram = products if gram is None else gram + products
                        continue
                    sums = squared_norms.flat_sq_norms(reference, read)
                    for k, value in enumerate(sums, start=first):
                        totals[k] += value
        sq_norms = torch.tensor(totals, dtype=torch.float64, device="cpu")
        return _Sums(
            sq_norms if gram is None else gram.diagonal().clone(),
            torch.tensor(base_total, dtype=torch.float64, device="cpu"),
            gram,
        )


def _groups(alignments: Sequence[Alignment], *, gram: bool) -> list[_Group]:
    """Group the pairs of all models, in the reverse of the order of a merge.

    mergekit merges tensors in the order of their names. What is scanned last is still
    in the page cache then, even where the cache does not hold all files.
    """
    shapes: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}
    pairs: dict[tuple[str, int], SharedTensor] = {}
    for k, alignment in enumerate(alignments):
        for pair in alignment.shared:
            pairs[pair.name, k] = pair
            by_shape = shapes.setdefault((pair.name, pair.base.name), {})
            by_shape.setdefault(pair.shape, []).append(k)

    groups: list[_Group] = []
    for (name, _), by_shape in shapes.items():
        calls = [(shape, members, False) for shape, members in by_shape.items()]
        if gram:
            # Inner products need the rows that all models have; the squared norm of a
            # longer task vector needs all of its rows.
            common = tuple(map(min, zip(*by_shape, strict=True)))
            everyone = [k for members in by_shape.values() for k in members]
            longer = [call for call in calls if call[0] != common]
            calls = [(common, everyone, True), *longer]
        groups += [
            _Group(
                name,
                tuple(members),
                tuple(replace(pairs[name, k], shape=shape) for k in members),
                products,
            )
            for shape, members, products in calls
        ]
    return sorted(groups, key=lambda group: group.name, reverse=True)


def scan_checkpoints(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    gram: bool = False,
    workers: int | None = None,
) -> ScanResult:
    """Measure every model against the base in one pass over the files.

    Args:
        base: the base.
        models: K fine-tunes of it.
        gram: also sum inner products.
        workers: threads; the CPUs at hand if None.

    Returns:
        the result.

    Raises:
        ValueError: base and model do not fit, or a weight is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    workers = workers or default_workers()
    with Files(workers) as files:
        return _scan(base, models, files, gram=gram, workers=workers)


def _scan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
    *,
    gram: bool,
    workers: int,
) -> ScanResult:
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    alignments = [align(base, model, files.readers) for model in models]
    groups = _groups(alignments, gram=gram)
    tasks = [
        (
            (part.stop - part.start) * group.bytes_per_element,
            functools.partial(group.sums, files, part),
        )
        for group in groups
        for part in group.segments
    ]
    results = iter(run(tasks, workers))
    names = sorted({group.name for group in groups})
    row = {name: at for at, name in enumerate(names)}
    count = len(models)
    norms = torch.zeros(2, len(names), count, dtype=torch.float64, device="cpu")
    products = norms.new_zeros(len(names), count, count) if gram else None
    for group in groups:
        parts = [next(results) for _ in group.segments]
        sums = sum(parts[1:], parts[0])
        if not bool(torch.isfinite(sums.sq_norms).all()):
            _require_equal(sums.sq_norms, group, base, models, files.readers)
            sums = _Sums(
                torch.zeros_like(sums.sq_norms), torch.zeros_like(sums.base), None
            )
        members = torch.tensor(group.members, device="cpu")
        norms[0, row[group.name], members] = sums.sq_norms
        norms[1, row[group.name], members] = sums.base
        if products is not None:
            inner = products[row[group.name]]
            if sums.gram is not None:
                inner[members[:, None], members] += sums.gram
            inner[members, members] = sums.sq_norms
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    return ScanResult(
        base=base.label,
        models=tuple(model.label for model in models),
        names=tuple(names),
        sq_norms=norms[0],
        base_sq_norms=norms[1],
        counted_as=tuple(alignment.counted_as for alignment in alignments),
        layers=tuple(alignment.layers for alignment in alignments),
        gram=products,
    )


def _require_equal(
    values: torch.Tensor,
    group: _Group,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    readers: Readers,
) -> None:
    """Explain squared norms that are not finite: name the tensor and the model.

    Infinities that base and models share, as in masks, are no learning.
    """
    for k, pair, finite in zip(
        group.members, group.pairs, torch.isfinite(values).tolist(), strict=True
    ):
        if finite:
            continue
        owners = ((base, pair.base), (models[k], pair.model))
        first, second = (pair.cut(readers.read(stored)) for _, stored in owners)
        if torch.equal(first, second):
            continue
        for owner, stored in owners:
            if not bool(torch.isfinite(pair.cut(readers.read(stored))).all()):
                raise ValueError(
                    f"{stored.name} of {owner.label} holds NaN or infinity (in "
                    f"{stored.file}); a merge would spread it. Repair or replace it"
                )
        raise ValueError(squared_norms.too_far(f"{pair.name} of {models[k].label}"))
