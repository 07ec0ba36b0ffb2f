"""Estimates what a scan would measure from a seeded sample of blocks of each tensor."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.arithmetic.standard_errors import Covariances
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import Stored
from mergekit_metagpt.checkpoints.pairs import align, same_bits
from mergekit_metagpt.checkpoints.ranges import AT_ONCE
from mergekit_metagpt.checkpoints.stored import StoredTensor
from mergekit_metagpt.scanning.one_pass import (
    PIECE,
    Group,
    Sums,
    Table,
    groups_of,
    remote_files,
    require_equal,
    total,
)
from mergekit_metagpt.scanning.pieces import Files, Source
from mergekit_metagpt.scanning.results import Sampled, ScanResult
from mergekit_metagpt.scanning.threads import default_workers, run

# Elements of the shortest blocks; longer ones are `PARTS` or more of a tensor. A tensor
# of fewer than `WHOLE` elements is read whole, of every other at least `LEAST` blocks:
# one has no variance.
BLOCK = 1 << 12
PARTS = 64
WHOLE = 1 << 16
LEAST = 2
# Blocks of base and models beyond which longer ones are read instead: each costs a
# request, or a seek.
MOST_READS = 4000
# Blocks that one task reads, at most; few, as over a network it waits for each.
TOGETHER = 8
# Blocks in which a stored head is compared with its embedding.
COMPARED = 16
# Halvings in the search for the share that a budget pays for.
HALVINGS = 40


@dataclass(frozen=True)
class Sample:
    """How much is to be read: a share of each large tensor, or a budget.

    Attributes:
        share: above 0, at most 1; None where the budget decides.
        budget: bytes of base and models together; None where the share decides.
        seed: of the positions.
    """

    share: float | None = None
    budget: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Stratum:
    """A group, and the blocks of it that are read; all of it where `blocks` is None."""

    group: Group
    blocks: Sequence[int] | None
    length: int

    @property
    def tail(self) -> slice:
        """What full blocks leave over; always read."""
        numel = self.group.pairs[0].numel
        return slice(numel - numel % self.length, numel)

    def parts(self) -> Iterator[slice | Sequence[int]]:
        """Yield what one task reads: a segment, or some blocks."""
        if self.blocks is None:
            yield from self.group.segments
            return
        together = min(TOGETHER, PIECE // self.length)
        for first in range(0, len(self.blocks), together):
            yield self.blocks[first : first + together]
        if self.tail.stop > self.tail.start:
            yield self.tail


@dataclass(frozen=True)
class _Plan:
    """How much is read: a share of each large tensor, in blocks of up to `longest`."""

    share: float
    longest: int

    def length(self, group: Group) -> int:
        """Elements of a block: a power of two."""
        fitting = max(BLOCK, group.pairs[0].numel // PARTS)
        return min(self.longest, 1 << (fitting.bit_length() - 1))

    def count(self, group: Group) -> int | None:
        """Number of blocks to be read of a group; None for all of it."""
        numel = group.pairs[0].numel
        if numel < WHOLE or not all(pair.divisible for pair in group.pairs):
            return None
        every = numel // self.length(group)
        count = max(LEAST, math.ceil(self.share * every))
        return count if count < every else None

    def bytes(self, group: Group) -> int:
        """Bytes that are read of a group, of base and models."""
        numel, count, length = group.pairs[0].numel, self.count(group), 1
        if count is not None:
            length = self.length(group)
            numel = count * length + numel % length
        return numel * group.bytes_per_element

    def cost(self, groups: Sequence[Group]) -> int:
        """Bytes that are read of all groups."""
        return sum(map(self.bytes, groups))

    def reads(self, groups: Sequence[Group]) -> int:
        """Number of blocks that are read of all groups, of base and models."""
        return sum(
            (self.count(group) or 0) * (1 + len(group.pairs)) for group in groups
        )


def _plan(sample: Sample, groups: Sequence[Group]) -> _Plan:
    """Choose the shortest blocks of which a sample has no more than `MOST_READS`.

    Of many small tensors no length makes them so few; blocks are not longer then than
    it takes to come near the fewest.
    """
    least = 2 * _Plan(0.0, BLOCK).reads(groups)
    chosen, longest = None, BLOCK
    while longest <= PIECE:
        share = sample.share
        if share is None:
            assert sample.budget is not None
            share = _share_for(sample.budget, groups, longest)
            if share is None:
                break
        chosen = _Plan(share, longest)
        if chosen.reads(groups) <= max(MOST_READS, least):
            break
        longest *= 2
    if chosen is None:
        raise ValueError(
            f"a budget of {sample.budget:,} bytes is too small: two blocks of each "
            f"tensor of these models are {_Plan(0.0, BLOCK).cost(groups):,} bytes. "
            "Give at least that"
        )
    return chosen


def _share_for(budget: int, groups: Sequence[Group], longest: int) -> float | None:
    """The largest share that costs no more than the budget; None if none does."""
    if _Plan(1.0, longest).cost(groups) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    if _Plan(low, longest).cost(groups) > budget:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _Plan(middle, longest).cost(groups) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def _stratum(group: Group, plan: _Plan, seed: int) -> _Stratum:
    """Draw blocks of a group: the same whatever the files, workers, other tensors."""
    length, count, blocks = plan.length(group), plan.count(group), None
    if count is not None:
        shape, numel = group.pairs[0].shape, group.pairs[0].numel
        key = hashlib.sha256(f"{seed}:{group.name}:{shape}".encode()).digest()
        draw = random.Random(int.from_bytes(key, "big"))
        blocks = sorted(draw.sample(range(numel // length), count))
    return _Stratum(group, blocks, length)


def _read(source: Source, blocks: Sequence[int], length: int = BLOCK) -> torch.Tensor:
    """Read blocks of a flattened tensor, neighbours at once; shape `(n, length)`."""
    values = torch.empty(len(blocks), length, dtype=source.dtype, device="cpu")
    first = 0
    while first < len(blocks):
        last = first + 1
        while last < len(blocks) and blocks[last] == blocks[last - 1] + 1:
            last += 1
        room = values[first:last].view(-1)
        start = blocks[first] * length
        piece = slice(start, start + room.numel())
        read = source.read(piece, room.view(torch.uint8))
        if source.whole is not None:
            room.copy_(read)
        first = last
    return values


@dataclass(frozen=True)
class _Blocks:
    """Sums over each of n blocks.

    `sq_norms` has shape `(n, K)`, `base` is ||theta_0||^2, shape `(n,)`, and `gram` has
    shape `(n, K, K)` or is None.
    """

    sq_norms: torch.Tensor
    base: torch.Tensor
    gram: torch.Tensor | None


def _sums_of_blocks(
    stratum: _Stratum,
    files: Files,
    owners: tuple[Checkpoint, Sequence[Checkpoint]],
    blocks: Sequence[int],
) -> _Blocks:
    group, length = stratum.group, stratum.length
    base = _read(files.source(group.pairs[0], group.pairs[0].base), blocks, length)
    tuned = [
        _read(files.source(pair, pair.model), blocks, length) for pair in group.pairs
    ]
    gram = squared_norms.gram_of_rows(base, tuned)
    sq_norms = gram.diagonal(dim1=-2, dim2=-1).clone()
    squares = base.double().square().sum(dim=1)
    if not bool(torch.isfinite(sq_norms).all()):
        first, models = owners
        finite = torch.isfinite(sq_norms).all(dim=0).tolist()
        for at, pair in enumerate(group.pairs):
            if not finite[at]:
                model = models[group.members[at]]
                require_equal(base, tuned[at], pair=pair, owners=(first, model))
        # Infinities that all share: no learning, as in an exact scan.
        zeros = (torch.zeros_like(values) for values in (sq_norms, squares, gram))
        sq_norms, squares, gram = zeros
    return _Blocks(sq_norms, squares, gram if group.gram else None)


def _estimate(parts: Sequence[_Blocks], count: int) -> tuple[Sums, Covariances]:
    """Expand sums of sampled blocks to all `count`; and the covariances of estimates.

    Of a simple random sample of b of B blocks, Cov(x, y) = B^2 (1 - b/B) S_xy / b, with
    the sample covariance S_xy of the blocks' sums.
    """
    sq_norms = torch.cat([part.sq_norms for part in parts])
    base = torch.cat([part.base for part in parts])
    products = [part.gram for part in parts if part.gram is not None]
    gram = torch.cat(products) if products else None
    taken = len(base)
    factor = count**2 * (1 - taken / count) / taken / (taken - 1)
    n, b = sq_norms - sq_norms.mean(dim=0), base - base.mean()
    g = None if gram is None else gram - gram.mean(dim=0)
    sums = Sums(
        count * sq_norms.mean(dim=0),
        count * base.mean(),
        None if gram is None else count * gram.mean(dim=0),
    )
    return sums, Covariances(
        sq_norms=factor * (n.T @ n),
        base_sq_norms=factor * (b @ b).expand(n.shape[1]),
        sq_norms_and_base=factor * (b @ n),
        gram=None if g is None else factor * g.square().sum(dim=0),
        gram_and_sq_norms=None if g is None else factor * (g * n[:, :, None]).sum(0),
    )


def _note(into: Covariances, row: int, group: Group, own: Covariances) -> None:
    """Enter a group's covariances; what is of independent samples does not covary."""
    members = torch.tensor(group.members, device="cpu")
    square = members[:, None], members
    for values in (into.sq_norms[row], into.sq_norms[row].T):
        values[members] = 0.0
    into.sq_norms[row][square] = own.sq_norms
    into.base_sq_norms[row][members] = own.base_sq_norms
    into.sq_norms_and_base[row][members] = own.sq_norms_and_base
    if into.gram_and_sq_norms is not None:
        into.gram_and_sq_norms[row][members] = 0.0
    if own.gram is not None and own.gram_and_sq_norms is not None:
        assert into.gram is not None and into.gram_and_sq_norms is not None
        into.gram[row][square] = own.gram
        into.gram_and_sq_norms[row][square] = own.gram_and_sq_norms


def _same(files: Files, first: Stored, second: Stored) -> bool:
    """Whether a head is its embedding, as far as a few blocks tell."""
    streamed = isinstance(first, StoredTensor) and isinstance(second, StoredTensor)
    if not (streamed and all(map(files.in_parts, (first, second)))):
        return same_bits(first, second, files.readers)
    assert isinstance(first, StoredTensor) and isinstance(second, StoredTensor)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    sides = [Source(s.dtype, streamed=(files.streams, s)) for s in (first, second)]
    if first.numel < COMPARED * BLOCK:
        ours, theirs = (side.all(first.numel) for side in sides)
        return torch.equal(ours, theirs)
    count = first.numel // BLOCK
    blocks = [count * at // COMPARED for at in range(COMPARED)]
    return all(
        torch.equal(*(_read(side, some) for side in sides))
        for some in (blocks[:1], blocks[1:])  # heads of their own differ in the first
    )


def sample_checkpoints(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    sample: Sample,
    *,
    gram: bool = False,
    workers: int | None = None,
) -> ScanResult:
    """Estimate what `scan_checkpoints` would measure, with standard errors.

    Every tensor of at least `WHOLE` elements is a stratum: a simple random sample of
    its blocks of `BLOCK` elements or more, at the same positions in base and models.
    All smaller ones, and those in another layout, are read whole.

    Args:
        base: the base.
        models: K fine-tunes of it.
        sample: how much to read.
        gram: also estimate inner products.
        workers: threads; the CPUs at hand if None.

    Returns:
        the estimates, unbiased; exact, and without `sampled`, where all was read.

    Raises:
        ValueError: base and model do not fit, the budget is too small, or a weight that
            was read is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    remote = remote_files(base, *models)
    workers = workers or (AT_ONCE if remote else default_workers())
    with Files(workers, remote) as files:
        return _sample(base, models, sample, files, gram=gram, workers=workers)


def _sample(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    sample: Sample,
    files: Files,
    *,
    gram: bool,
    workers: int,
) -> ScanResult:
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    same = functools.cache(functools.partial(_same, files))
    alignments = [align(base, model, files.readers, same) for model in models]
    groups = groups_of(alignments, gram=gram)
    # With inner products, a share is read in the same blocks as without.
    priced = groups if sample.share is None else groups_of(alignments, gram=False)
    plan = _plan(sample, priced)
    strata = [_stratum(group, plan, sample.seed) for group in groups]
    tasks: list[tuple[int, Callable[[], Sums | _Blocks]]] = []
    for stratum in strata:
        group = stratum.group
        for part in stratum.parts():
            work: Callable[[], Sums | _Blocks]
            if isinstance(part, slice):
                elements = part.stop - part.start
                work = functools.partial(group.sums, files, part)
            else:
                elements, owners = len(part) * stratum.length, (base, models)
                work = functools.partial(_sums_of_blocks, stratum, files, owners, part)
            tasks.append((elements * group.bytes_per_element, work))
    results = iter(run(tasks, workers))
    table = Table.empty(groups, len(models), gram=gram)
    covariances = Covariances.zeros(len(table.names), len(models), gram=gram)
    for stratum in strata:
        group = stratum.group
        parts = [next(results) for _ in stratum.parts()]
        whole = [part for part in parts if isinstance(part, Sums)]
        blocks = [part for part in parts if isinstance(part, _Blocks)]
        if whole:
            sums = total(whole, group, base, models, files)
        if blocks:
            count = group.pairs[0].numel // stratum.length
            estimate, covariance = _estimate(blocks, count)
            sums = estimate + sums if whole else estimate
            _note(covariances, table.rows[group.name], group, covariance)
        table.add(group, sums)
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    result = table.result(base, models, alignments)
    if all(stratum.blocks is None for stratum in strata):
        return result
    return replace(
        result,
        sampled=Sampled(
            share=plan.share,
            seed=sample.seed,
            bytes_read=sum(size for size, _ in tasks),
            bytes_stored=_Plan(1.0, BLOCK).cost(groups),
            covariances=covariances,
        ),
    )
