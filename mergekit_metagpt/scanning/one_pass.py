"""One pass over the files of a base and its fine-tunes: kernels in, sums out."""

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
from mergekit_metagpt.scanning.pieces import Files, Source
from mergekit_metagpt.scanning.results import Details, PairNorms
from mergekit_metagpt.scanning.threads import default_workers, run

# Elements that one worker takes at a time, and that it reads at a time. Fixed, so that
# sums are formed in the same order whatever the number of workers.
SEGMENT = 64 * in_parts.CHUNK


PIECE = in_parts.CHUNK


# Models whose pieces are held at a time: memory does not grow with their number.
BATCH = 8


@dataclass(frozen=True)
class _Sums:
    """What the kernels found on a part of a tensor group; see `Details`."""

    sq_norms: torch.Tensor
    gram: torch.Tensor | None = None
    base: torch.Tensor | None = None
    rounding: torch.Tensor | None = None

    def __add__(self, other: _Sums) -> _Sums:
        def both(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
            return None if a is None or b is None else a + b

        return _Sums(
            self.sq_norms + other.sq_norms,
            both(self.gram, other.gram),
            both(self.base, other.base),
            both(self.rounding, other.rounding),
        )


@dataclass(frozen=True)
class _Group:
    """Models that share one stored base tensor, and what is summed over it."""

    name: str
    members: tuple[int, ...]
    pairs: tuple[SharedTensor, ...]
    gram: bool
    detailed: bool

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
        """Run the kernels over a part of the flattened overlap, piece by piece."""
        base = files.source(self.pairs[0], self.pairs[0].base)
        tuned = [files.source(pair, pair.model) for pair in self.pairs]
        together = len(tuned) if self.detailed else min(len(tuned), BATCH)
        widest = max(source.dtype.itemsize for source in (base, *tuned))
        size = max(1, min(PIECE, part.stop - part.start))
        starts = range(part.start, max(part.stop, part.start + 1), size)
        pieces = [slice(at, min(at + size, part.stop)) for at in starts]
        cpu = torch.device("cpu")
        with scratch(1 + together, size * widest, torch.uint8, cpu) as rooms:
            if not self.detailed:
                return _Sums(_sq_norms(base, tuned, pieces, rooms))
            found = [
                self._details(
                    base.read(piece, rooms[0]),
                    [
                        model.read(piece, room)
                        for model, room in zip(tuned, rooms[1:], strict=True)
                    ],
                )
                for piece in pieces
            ]
        return sum(found[1:], found[0])

    def _details(self, base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> _Sums:
        """What is measured of one piece in a detailed scan."""
        gram = squared_norms.accumulate_gram(base, tuned) if self.gram else None
        return _Sums(
            squared_norms.sq_norms(base, tuned)
            if gram is None
            else gram.diagonal().clone(),
            gram,
            base=squared_norms.sq_norm(base),
            rounding=squared_norms.rounding_sq_norms(base, tuned),
        )


def _sq_norms(
    base: Source, tuned: Sequence[Source], pieces: Sequence[slice], rooms: torch.Tensor
) -> torch.Tensor:
    """Squared norms alone, with the pieces of a few models in memory at a time."""
    sums = [0.0] * len(tuned)
    for piece in pieces:
        reference = base.read(piece, rooms[0])
        for first in range(0, len(tuned), BATCH):
            batch = tuned[first : first + BATCH]
            read = [
                model.read(piece, room)
                for model, room in zip(batch, rooms[1:], strict=False)
            ]
            found = squared_norms.flat_sq_norms(reference, read)
            for k, value in enumerate(found, start=first):
                sums[k] += value
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def _groups(alignments: Sequence[Alignment], *, detailed: bool) -> list[_Group]:
    """Group the pairs of all models, in the reverse of the order of a merge.

    mergekit merges tensors in the order of their names. What is scanned last is still
    in the page cache then, also where it does not hold all files.
    """
    found: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}
    pairs: dict[tuple[str, int], SharedTensor] = {}
    for k, alignment in enumerate(alignments):
        for pair in alignment.shared:
            pairs[pair.name, k] = pair
            by_shape = found.setdefault((pair.name, pair.base.name), {})
            by_shape.setdefault(pair.shape, []).append(k)

    groups: list[_Group] = []
    for (name, _), by_shape in found.items():
        calls = [(s, ks, False) for s, ks in by_shape.items()]
        if detailed:
            # Task vectors of different lengths meet on the rows that all of them have.
            common = tuple(map(min, zip(*by_shape, strict=True)))
            everyone = [k for ks in by_shape.values() for k in ks]
            longer = [call for call in calls if call[0] != common]
            calls = [(common, everyone, True), *longer]
        groups += [
            _Group(
                name,
                tuple(ks),
                tuple(replace(pairs[name, k], shape=shape) for k in ks),
                gram,
                detailed,
            )
            for shape, ks, gram in calls
        ]
    return sorted(groups, key=lambda group: group.name, reverse=True)


def scan_checkpoints(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    detailed: bool = False,
    workers: int | None = None,
) -> tuple[list[PairNorms], Details | None]:
    """Measure every model against the base in one pass over the files.

    Args:
        base: the base.
        models: K fine-tunes of it.
        detailed: also measure what `Details` holds.
        workers: threads; the CPUs at hand if None.

    Returns:
        the squared norms of each pair, and the details or None.

    Raises:
        ValueError: base and model do not fit, or a weight is NaN or infinite.
        OSError: a file cannot be read or has changed since it was opened.
    """
    workers = workers or default_workers()
    with Files(workers) as files:
        return _scan(base, models, files, detailed=detailed, workers=workers)


def _scan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
    *,
    detailed: bool,
    workers: int,
) -> tuple[list[PairNorms], Details | None]:
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    alignments = [align(base, model, files.readers) for model in models]
    groups = _groups(alignments, detailed=detailed)
    tasks = [
        (
            (part.stop - part.start) * group.bytes_per_element,
            functools.partial(group.sums, files, part),
        )
        for group in groups
        for part in group.segments
    ]
    results = iter(run(tasks, workers))
    norms: list[dict[str, float]] = [{} for _ in models]
    details = Details.empty(len(models)) if detailed else None
    for group in groups:
        parts = [next(results) for _ in group.segments]
        sums = sum(parts[1:], parts[0])
        _check_finite(sums.sq_norms, group, base, models, files.readers)
        for k, value in zip(group.members, sums.sq_norms.tolist(), strict=True):
            norms[k][group.name] = value
        if details is not None:
            _note(details, group, sums)
    for checkpoint in (base, *models):
        checkpoint.verify_unchanged()
    return [
        PairNorms(
            sq_norms={pair.name: found[pair.name] for pair in alignment.shared},
            counted_as=alignment.counted_as,
            layers=alignment.layers,
        )
        for found, alignment in zip(norms, alignments, strict=True)
    ], details


def _note(details: Details, group: _Group, sums: _Sums) -> None:
    """Add what was found on one group."""
    count = details.count
    members = torch.tensor(group.members, device="cpu")
    empty = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    gram = details.gram.setdefault(group.name, empty)
    if sums.gram is not None:
        gram[members[:, None], members] += sums.gram
    gram[members, members] = sums.sq_norms
    if sums.base is not None and sums.rounding is not None:
        for found, values in (
            (details.base_sq_norms, sums.base),
            (details.rounding, sums.rounding),
        ):
            found.setdefault(group.name, empty.new_zeros(count))[members] = values


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
