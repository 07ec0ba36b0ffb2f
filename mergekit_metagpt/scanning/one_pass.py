"""Reads all files of a base and its fine-tunes once, and sums over their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_metagpt.arithmetic import in_parts, squared_norms
from mergekit_metagpt.arithmetic.in_parts import scratch
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.pairs import Alignment, SharedTensor, align
from mergekit_metagpt.checkpoints.ranges import AT_ONCE, RemoteFile
from mergekit_metagpt.scanning import ranks
from mergekit_metagpt.scanning.factors import Crossing
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
class Sums:
    """Sums over a part of a tensor group of K models.

    `sq_norms` has shape `(K,)`, `base` is ||theta_0||^2, shape `()`, and `gram` has
    shape `(K, K)` or is None; `cross`, with A adapters, `(K, A)`; all float64.
    """

    sq_norms: torch.Tensor
    base: torch.Tensor
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.sq_norms + other.sq_norms,
            self.base + other.base,
            _both(self.gram, other.gram),
            _both(self.cross, other.cross),
        )

    def numbers(self) -> list[Any]:
        """The same bits as plain numbers, to be sent to other ranks."""
        parts = self.sq_norms, self.base, self.gram, self.cross
        return [None if part is None else part.tolist() for part in parts]

    @classmethod
    def of(cls, numbers: Sequence[Any]) -> Sums:
        """The sums that `numbers` tells."""
        parts: list[Any] = [
            None
            if part is None
            else torch.tensor(part, dtype=torch.float64, device="cpu")
            for part in numbers
        ]
        return cls(*parts)


def _both(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class Group:
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

    def sums(self, files: Files, part: slice, crossing: Crossing | None = None) -> Sums:
        """Sum over a part of the flattened overlap, piece by piece.

        Without inner products, the pieces of a few models are in memory at a time.
        """
        added = crossing.of(self.name, files) if crossing and self.gram else None
        columns = self.pairs[0].shape[-1] if self.pairs[0].shape else 1
        base = files.source(self.pairs[0], self.pairs[0].base)
        tuned = [files.source(pair, pair.model) for pair in self.pairs]
        together = len(tuned) if self.gram else min(len(tuned), BATCH)
        widest = max(source.dtype.itemsize for source in (base, *tuned))
        size = max(1, min(PIECE, part.stop - part.start))
        totals = [0.0] * len(tuned)
        base_total, gram, cross = 0.0, None, None
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
                        if added is not None:
                            found = added.with_taus(reference, read, columns, piece)
                            cross = found if cross is None else cross + found
                        continue
                    sums = squared_norms.flat_sq_norms(reference, read)
                    for k, value in enumerate(sums, start=first):
                        totals[k] += value
        sq_norms = torch.tensor(totals, dtype=torch.float64, device="cpu")
        return Sums(
            sq_norms if gram is None else gram.diagonal().clone(),
            torch.tensor(base_total, dtype=torch.float64, device="cpu"),
            gram,
            cross,
        )


def groups_of(alignments: Sequence[Alignment], *, gram: bool) -> list[Group]:
    """Group the pairs of all models, in the reverse of the order of a merge.

    mergekit merges tensors in the order of their names. What is scanned last is still
    in the page cache then, even where the cache does not hold all files.

    Args:
        alignments: of K models with one base.
        gram: whether inner products are needed.

    Returns:
        the groups; of one name, the group with inner products comes first.
    """
    shapes: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}
    pairs: dict[tuple[str, int], SharedTensor] = {}
    for k, alignment in enumerate(alignments):
        for pair in alignment.shared:
            pairs[pair.name, k] = pair
            by_shape = shapes.setdefault((pair.name, pair.base.name), {})
            by_shape.setdefault(pair.shape, []).append(k)

    groups: list[Group] = []
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
            Group(
                name,
                tuple(members),
                tuple(replace(pairs[name, k], shape=shape) for k in members),
                products,
            )
            for shape, members, products in calls
        ]
    return sorted(groups, key=lambda group: group.name, reverse=True)


@dataclass(frozen=True)
class Table:
    """Sums by tensor and model, filled group by group; see `ScanResult`."""

    names: tuple[str, ...]
    norms: torch.Tensor
    gram: torch.Tensor | None

    @classmethod
    def empty(cls, groups: Sequence[Group], models: int, *, gram: bool) -> Table:
        """Return one of zeros."""
        names = tuple(sorted({group.name for group in groups}))
        norms = torch.zeros(2, len(names), models, dtype=torch.float64, device="cpu")
        products = norms.new_zeros(len(names), models, models) if gram else None
        return cls(names, norms, products)

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each tensor."""
        return {name: at for at, name in enumerate(self.names)}

    def add(self, group: Group, sums: Sums) -> None:
        """Fill in a group's sums; those of a longer overlap replace the common ones."""
        row, members = self.rows[group.name], torch.tensor(group.members, device="cpu")
        self.norms[0, row, members] = sums.sq_norms
        self.norms[1, row, members] = sums.base
        if self.gram is not None:
            inner = self.gram[row]
            if sums.gram is not None:
                inner[members[:, None], members] += sums.gram
            inner[members, members] = sums.sq_norms

    def result(
        self,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        alignments: Sequence[Alignment],
    ) -> ScanResult:
        """Freeze what was filled in."""
        return ScanResult(
            base=base.label,
            models=tuple(model.label for model in models),
            names=self.names,
            sq_norms=self.norms[0],
            base_sq_norms=self.norms[1],
            counted_as=tuple(alignment.counted_as for alignment in alignments),
            layers=tuple(alignment.layers for alignment in alignments),
            gram=self.gram,
        )


def scan_checkpoints(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    gram: bool = False,
    workers: int | None = None,
    crossing: Crossing | None = None,
) -> ScanResult:
    """Measure every model against the base in one pass over the files.

    Args:
        base: the base.
        models: K fine-tunes of it.
        gram: also sum inner products.
        workers: threads; the CPUs at hand if None.
        crossing: where to sum inner products with adapters as well, under `gram`.

    Returns:
        the result.

    Raises:
        ValueError: base and model do not fit, a weight is NaN or infinite, or another
            rank sees other models.
        OSError: a file cannot be read or has changed since it was opened.
    """
    remote = remote_files(base, *models)
    workers = workers or (AT_ONCE if remote else default_workers())
    with Files(workers, remote) as files:
        return _scan(base, models, files, gram=gram, workers=workers, crossing=crossing)


def remote_files(*checkpoints: Checkpoint) -> Mapping[Path, RemoteFile]:
    """Return what reads the files of models that were not downloaded."""
    return {path: file for c in checkpoints for path, file in c.remote.items()}


def _scan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
    *,
    gram: bool,
    workers: int,
    crossing: Crossing | None,
) -> ScanResult:
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    if sharers := ranks.group():
        # Sums over other files would be wrong, and would be kept in rank 0's cache.
        sharers.require_same([at.digest for at in (base, *models)], "models")
    alignments = [align(base, model, files.readers) for model in models]
    if crossing:
        crossing.begin(align(base, base, files.readers).counted_as)
    groups = groups_of(alignments, gram=gram)
    tasks = [
        (
            (part.stop - part.start) * group.bytes_per_element,
            functools.partial(group.sums, files, part, crossing),
        )
        for group in groups
        for part in group.segments
    ]
    results = iter(_run_shared(tasks, workers))
    table = Table.empty(groups, len(models), gram=gram)
    for group in groups:
        parts = [next(results) for _ in group.segments]
        sums = total(parts, group, base, models, files)
        table.add(group, sums)
        if crossing and sums.cross is not None:
            crossing.add(group.name, group.members, sums.cross)
    if crossing:
        crossing.add_stacks(models, files)
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    return table.result(base, models, alignments)


def _run_shared(
    tasks: Sequence[tuple[int, Callable[[], Sums]]], workers: int
) -> list[Sums]:
    """Run the tasks; where ranks share a scan, each a part, and all get all results."""
    sharers = ranks.group()
    if sharers is None:
        return run(tasks, workers)
    owners = ranks.owners([size for size, _ in tasks], sharers.size)
    mine = [
        task for task, owner in zip(tasks, owners, strict=True) if owner == sharers.rank
    ]
    parts = sharers.gather([sums.numbers() for sums in run(mine, workers)])
    following = [iter(part) for part in parts]
    return [Sums.of(next(following[owner])) for owner in owners]


def total(
    parts: Sequence[Sums],
    group: Group,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
) -> Sums:
    """Add up the sums over all segments of a group.

    Args:
        parts: in the order of the segments.
        group: of K models.
        base: the base.
        models: all models of the scan.
        files: those of the scan.

    Returns:
        the sums; zeros where base and models share infinities, as in masks.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    sums = sum(parts[1:], parts[0])
    if bool(torch.isfinite(sums.sq_norms).all()):
        return sums
    for k, pair, finite in zip(
        group.members,
        group.pairs,
        torch.isfinite(sums.sq_norms).tolist(),
        strict=True,
    ):
        if not finite:
            sides = (files.source(pair, side) for side in (pair.base, pair.model))
            require_equal(
                *(side.all(pair.numel) for side in sides),
                pair=pair,
                owners=(base, models[k]),
            )
    return Sums(torch.zeros_like(sums.sq_norms), torch.zeros_like(sums.base), None)


def require_equal(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    pair: SharedTensor,
    owners: tuple[Checkpoint, Checkpoint],
) -> None:
    """Explain a squared norm that is not finite: name the tensor and the model.

    Infinities that base and model share, as in masks, are no learning.

    Args:
        first: values of the base.
        second: values of the model, in the same places.
        pair: where they are stored.
        owners: base and model.

    Raises:
        ValueError: the values differ.
    """
    if torch.equal(first, second):
        return
    sides = (pair.base, pair.model)
    for owner, stored, values in zip(owners, sides, (first, second), strict=True):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{stored.name} of {owner.label} holds NaN or infinity (in "
                f"{stored.file}); a merge would spread it. Repair or replace it"
            )
    raise ValueError(squared_norms.too_far(f"{pair.name} of {owners[1].label}"))
