"""Groups tensors that are read together, sums over them, and puts the sums together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mergekit_metagpt.arithmetic import in_parts, squared_norms
from mergekit_metagpt.arithmetic.in_parts import scratch
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.pairs import Alignment, SharedTensor
from mergekit_metagpt.checkpoints.stored import not_finite
from mergekit_metagpt.scanning.factors import Crossing
from mergekit_metagpt.scanning.pieces import Files
from mergekit_metagpt.scanning.results import ScanResult

# A worker takes a segment of a tensor and reads it piece by piece. Both have a fixed
# number of elements, so that the order of each sum does not depend on the workers.
SEGMENT = 64 * in_parts.CHUNK
PIECE = in_parts.CHUNK
# Pieces of so many models are in memory at a time.
BATCH = 8


@dataclass(frozen=True)
class Sums:
    """Sums over a part of a tensor, for K models and A adapters; all float64.

    Attributes:
        sq_norms: ||tau_t||^2, shape `(K,)`.
        base: ||theta_0||^2, shape `()`.
        gram: <tau_s, tau_t>, shape `(K, K)`, or None.
        cross: inner products with adapters, shape `(K, A)`, or None.
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
        """Return the sums as plain numbers of the same bits, to send to other ranks."""
        parts = self.sq_norms, self.base, self.gram, self.cross
        return [None if part is None else part.tolist() for part in parts]

    @classmethod
    def of(cls, numbers: Sequence[Any]) -> Sums:
        """Return the sums that `numbers` was made from."""
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
    """The models that share one stored base tensor.

    Attributes:
        name: of the tensor.
        members: positions of these models among all models of the scan.
        pairs: where base and model store the tensor, for each of these models.
        gram: whether inner products are summed too.
    """

    name: str
    members: tuple[int, ...]
    pairs: tuple[SharedTensor, ...]
    gram: bool

    @property
    def segments(self) -> list[slice]:
        """Parts of the flattened overlap; all of it if it cannot be read in part."""
        numel = self.pairs[0].numel
        step = SEGMENT if all(pair.divisible for pair in self.pairs) else numel
        starts = range(0, max(numel, 1), step or 1)
        return [slice(at, min(at + step, numel)) for at in starts]

    @property
    def bytes_per_element(self) -> int:
        """Bytes that base and models together store for one element."""
        stored = [self.pairs[0].base, *(pair.model for pair in self.pairs)]
        return sum(tensor.dtype.itemsize for tensor in stored)

    def sums(self, files: Files, part: slice, crossing: Crossing | None = None) -> Sums:
        """Sum over a part of the flattened overlap, piece by piece.

        Inner products need the pieces of all models at once; squared norms are summed
        for a few models at a time.
        """
        added = None
        if crossing and self.gram:
            columns = self.pairs[0].shape[-1] if self.pairs[0].shape else 1
            added = crossing.of(self.name, columns, files)
        base = files.source(self.pairs[0], self.pairs[0].base)
        tuned = [files.source(pair, pair.model) for pair in self.pairs]
        together = len(tuned) if self.gram else min(len(tuned), BATCH)
        widest = max(source.dtype.itemsize for source in (base, *tuned))
        size = max(1, min(PIECE, part.stop - part.start))
        totals = [0.0] * len(tuned)
        base_total, gram, cross = 0.0, None, None
        cpu = torch.device("cpu")
        with scratch(1 + together, size * widest, torch.uint8, cpu) as rooms:
            for start in range(part.start, max(part.stop, part.start + 1), size):
                piece = slice(start, min(start + size, part.stop))
                reference = base.read(piece, rooms[0])
                for first in range(0, len(tuned), together):
                    read = [
                        model.read(piece, room)
                        for model, room in zip(
                            tuned[first : first + together], rooms[1:], strict=False
                        )
                    ]
                    sums = squared_norms.flat_sq_norms(
                        reference, [] if self.gram else read, own=not first
                    )
                    if not first:
                        base_total += sums.pop()
                    if self.gram:
                        products = squared_norms.gram_matrix(reference, read)
                        gram = products if gram is None else gram + products
                        if added is not None:
                            more = added(reference, read, piece)
                            cross = more if cross is None else cross + more
                        continue
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
    """Group the pairs of all models, in reverse order of their names.

    mergekit merges tensors in the order of their names. So the tensors that it reads
    first were scanned last, and are still in the page cache. Of one name, the group
    with inner products comes first.
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
            # Inner products are over the rows that all models have. A model with more
            # rows needs all of them for its squared norm.
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
    """Sums by tensor and model, filled in group by group; see `ScanResult`.

    Attributes:
        names: of the N tensors.
        norms: squared norms of K models and of the base, shape `(2, N, K)`, float64.
        gram: inner products, shape `(N, K, K)`, float64, or None.
    """

    names: tuple[str, ...]
    norms: torch.Tensor
    gram: torch.Tensor | None

    @classmethod
    def empty(cls, groups: Sequence[Group], models: int, *, gram: bool) -> Table:
        """Return a table of zeros."""
        names = tuple(sorted({group.name for group in groups}))
        norms = torch.zeros(2, len(names), models, dtype=torch.float64, device="cpu")
        products = norms.new_zeros(len(names), models, models) if gram else None
        return cls(names, norms, products)

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each tensor."""
        return {name: at for at, name in enumerate(self.names)}

    def add(self, group: Group, sums: Sums) -> None:
        """Fill in a group's sums; later ones, over more rows, replace squared norms."""
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
        """Return the result of the scan, once all groups are filled in."""
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


def total(
    parts: Sequence[Sums],
    group: Group,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
) -> Sums:
    """Add up the sums over all segments of a group, in order.

    They are zeros if base and models have the same infinities, as in masks. Raises a
    ValueError if a weight is NaN or infinite otherwise.
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
    """Explain a squared norm that is not finite by a ValueError with tensor and model.

    Equal values of base and model, in the same places, are accepted: masks, for
    example, hold infinities that do not change.
    """
    if torch.equal(first, second):
        return
    sides = (pair.base, pair.model)
    for owner, stored, values in zip(owners, sides, (first, second), strict=True):
        if not bool(torch.isfinite(values).all()):
            raise not_finite(owner.label, stored)
    raise ValueError(squared_norms.too_far(f"{pair.name} of {owners[1].label}"))
