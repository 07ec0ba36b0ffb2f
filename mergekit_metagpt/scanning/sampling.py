"""Estimates the results of a scan from a seeded sample of blocks of each tensor."""

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
from mergekit_metagpt.scanning.groups import (
    PIECE,
    Group,
    Sums,
    Table,
    groups_of,
    require_equal,
    total,
)
from mergekit_metagpt.scanning.pieces import Files, Source
from mergekit_metagpt.scanning.results import Sampled, ScanResult
from mergekit_metagpt.scanning.threads import run

# A block has at least BLOCK elements. Where it has more, a tensor has at least PARTS
# blocks.
BLOCK = 1 << 12
PARTS = 64
# Smaller tensors are read whole. Of others at least LEAST blocks are read: a single
# block has no variance.
WHOLE = 1 << 16
LEAST = 2
# Every block costs a request or a seek: above this number, longer blocks are read.
MOST_READS = 4000
# Blocks read by one task, at most; few, since over a network it waits for each.
TOGETHER = 8
# Threads that read local files, at least: each waits for the disk at every block.
THREADS = 8
# Blocks in which a stored head is compared with its embedding.
COMPARED = 16
# Steps of the bisection for the share that a budget allows.
HALVINGS = 40


@dataclass(frozen=True)
class Sample:
    """How much to read: a share of each large tensor, or a budget; the other is None.

    Attributes:
        share: above 0, at most 1.
        budget: bytes of base and models together.
        seed: of the random positions.
    """

    share: float | None = None
    budget: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Stratum:
    """A group and the numbers of the blocks that are read of it.

    All of the group is read if `blocks` is None. A block has `length` elements.
    """

    group: Group
    blocks: Sequence[int] | None
    length: int

    @property
    def tail(self) -> slice:
        """The elements after the last full block, which are always read."""
        numel = self.group.pairs[0].numel
        return slice(numel - numel % self.length, numel)

    def parts(self) -> Iterator[slice | Sequence[int]]:
        """Yield what each task reads: a segment, or the numbers of some blocks."""
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
    """A share of each large tensor, read in blocks of at most `longest` elements."""

    share: float
    longest: int

    def length(self, group: Group) -> int:
        """The number of elements of a block, a power of two."""
        fitting = max(BLOCK, group.pairs[0].numel // PARTS)
        return min(self.longest, 1 << (fitting.bit_length() - 1))

    def count(self, group: Group) -> int | None:
        """Return the number of blocks to read of a group; None to read all of it."""
        numel = group.pairs[0].numel
        if numel < WHOLE or not all(pair.divisible for pair in group.pairs):
            return None
        all_blocks = numel // self.length(group)
        count = max(LEAST, math.ceil(self.share * all_blocks))
        return count if count < all_blocks else None

    def bytes(self, group: Group) -> int:
        """Return the bytes to read of a group, from base and models."""
        numel, count, length = group.pairs[0].numel, self.count(group), 1
        if count is not None:
            length = self.length(group)
            numel = count * length + numel % length
        return numel * group.bytes_per_element

    def cost(self, groups: Sequence[Group]) -> int:
        """Return the bytes to read of all groups."""
        return sum(map(self.bytes, groups))

    def reads(self, groups: Sequence[Group]) -> int:
        """Return the number of blocks to read of all groups, from base and models."""
        return sum(
            (self.count(group) or 0) * (1 + len(group.pairs)) for group in groups
        )


def _plan(sample: Sample, groups: Sequence[Group]) -> _Plan:
    """Choose the shortest blocks with which a sample takes at most `MOST_READS` reads.

    Models with many small tensors need more reads than that at any length. Then twice
    the smallest number of reads is allowed.
    """
    allowed = max(MOST_READS, 2 * _Plan(0.0, BLOCK).reads(groups))
    plan, longest = None, BLOCK
    while longest <= PIECE:
        share = sample.share
        if share is None:
            assert sample.budget is not None
            share = _share_for(sample.budget, groups, longest)
            if share is None:
                break
        plan = _Plan(share, longest)
        if plan.reads(groups) <= allowed:
            break
        longest *= 2
    if plan is None:
        raise ValueError(
            f"a budget of {sample.budget:,} bytes is too small: two blocks of each "
            f"tensor of these models are {_Plan(0.0, BLOCK).cost(groups):,} bytes. "
            "Give at least that"
        )
    return plan


def _share_for(budget: int, groups: Sequence[Group], longest: int) -> float | None:
    """The largest share within the budget, or None if there is none."""
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
    """Draw blocks of a group; they depend on plan, seed, name and shape only."""
    length, count, blocks = plan.length(group), plan.count(group), None
    if count is not None:
        shape, numel = group.pairs[0].shape, group.pairs[0].numel
        key = hashlib.sha256(f"{seed}:{group.name}:{shape}".encode()).digest()
        draw = random.Random(int.from_bytes(key, "big"))
        blocks = sorted(draw.sample(range(numel // length), count))
    return _Stratum(group, blocks, length)


def _read(source: Source, blocks: Sequence[int], length: int = BLOCK) -> torch.Tensor:
    """Read blocks of a flattened tensor, adjacent ones at once; shape `(n, length)`."""
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


def _sums_of_blocks(
    stratum: _Stratum,
    files: Files,
    owners: tuple[Checkpoint, Sequence[Checkpoint]],
    blocks: Sequence[int],
) -> Sums:
    """Sums over each of n blocks: as `Sums`, with a leading axis of length n."""
    group, length = stratum.group, stratum.length
    base = _read(files.source(group.pairs[0], group.pairs[0].base), blocks, length)
    tuned = [
        _read(files.source(pair, pair.model), blocks, length) for pair in group.pairs
    ]
    rows = [(first, rest) for first, *rest in zip(base, *tuned, strict=True)]
    gram = None
    if group.gram:
        gram = torch.stack([squared_norms.gram_matrix(*row) for row in rows])
        sq_norms = gram.diagonal(dim1=-2, dim2=-1).clone()
    else:
        norms = [squared_norms.flat_sq_norms(*row) for row in rows]
        sq_norms = torch.tensor(norms, dtype=torch.float64, device="cpu")
    squares = base.double().square().sum(dim=1)
    if not bool(torch.isfinite(sq_norms).all()):
        first, models = owners
        finite = torch.isfinite(sq_norms).all(dim=0).tolist()
        for at, pair in enumerate(group.pairs):
            if not finite[at]:
                model = models[group.members[at]]
                require_equal(base, tuned[at], pair=pair, owners=(first, model))
        # Base and models have the same infinities, which do not count, as in a scan.
        sq_norms, squares = torch.zeros_like(sq_norms), torch.zeros_like(squares)
        gram = None if gram is None else torch.zeros_like(gram)
    return Sums(sq_norms, squares, gram)


def _estimate(parts: Sequence[Sums], count: int) -> tuple[Sums, Covariances]:
    """Estimate the sums over all `count` blocks, and the covariances of the estimates.

    For a simple random sample of b of B blocks, Cov(x, y) = B^2 (1 - b/B) S_xy / b,
    where S_xy is the sample covariance of the blocks' sums.
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
    """Enter a group's covariances; with models of other groups, they are 0."""
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
    """Whether a head equals its embedding in a few blocks."""
    if not (files.in_parts(first) and files.in_parts(second)):
        return same_bits(first, second, files.readers)
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
        for some in (blocks[:1], blocks[1:])  # an untied head differs in the first
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

    Every tensor of at least `WHOLE` elements is a stratum, of which a simple random
    sample of blocks is read, at the same positions in base and models. Smaller tensors,
    and those in another layout, are read whole.

    Args:
        base: the base.
        models: K fine-tunes of it.
        sample: how much to read.
        gram: also estimate inner products.
        workers: number of threads; see `Files` for the default.

    Returns:
        unbiased estimates; exact values, without `sampled`, if everything was read.

    Raises:
        ValueError: base and model do not fit, the budget is too small, or a weight that
            was read is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    with Files((base, *models), workers, at_least=THREADS) as files:
        same = functools.cache(functools.partial(_same, files))
        alignments = [align(base, model, files.readers, same) for model in models]
        groups = groups_of(alignments, gram=gram)
        # A share means the same blocks whether inner products are needed or not.
        priced = groups if sample.share is None else groups_of(alignments, gram=False)
        plan = _plan(sample, priced)
        strata = [_stratum(group, plan, sample.seed) for group in groups]
        tasks: list[tuple[int, Callable[[], Sums]]] = []
        for stratum in strata:
            group, owners = stratum.group, (base, models)
            for part in stratum.parts():
                if isinstance(part, slice):
                    elements = part.stop - part.start
                    work = functools.partial(group.sums, files, part)
                else:
                    elements = len(part) * stratum.length
                    work = functools.partial(
                        _sums_of_blocks, stratum, files, owners, part
                    )
                tasks.append((elements * group.bytes_per_element, work))
        results = iter(run(tasks, files.threads))
        table = Table.empty(groups, len(models), gram=gram)
        covariances = Covariances.zeros(len(table.names), len(models), gram=gram)
        for stratum in strata:
            group, parts = stratum.group, [*stratum.parts()]
            found = list(zip(parts, results, strict=False))
            whole = [sums for part, sums in found if isinstance(part, slice)]
            blocks = [sums for part, sums in found if not isinstance(part, slice)]
            if whole:
                sums = total(whole, group, base, models, files)
            if blocks:
                count = group.pairs[0].numel // stratum.length
                estimate, covariance = _estimate(blocks, count)
                sums = estimate + sums if whole else estimate
                _note(covariances, table.rows[group.name], group, covariance)
            table.add(group, sums)
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
