"""Reads all files of a base and its fine-tunes once, and sums over their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.pairs import align
from mergekit_metagpt.scanning import dealing, sharing
from mergekit_metagpt.scanning.factors import Crossing
from mergekit_metagpt.scanning.groups import Sums, Table, groups_of, total
from mergekit_metagpt.scanning.pieces import Files
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.threads import run


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
        workers: number of threads; see `Files` for the default.
        crossing: adapters with which inner products are summed too, if `gram`.

    Returns:
        the result.

    Raises:
        ValueError: base and model do not fit, a weight is NaN or infinite, or another
            rank sees other models.
        OSError: a file cannot be read or has changed since it was opened.
    """
    with Files((base, *models), workers) as files:
        if sharers := sharing.group():
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
        results = iter(_run_shared(tasks, files.threads))
        table = Table.empty(groups, len(models), gram=gram)
        for group in groups:
            parts = [next(results) for _ in group.segments]
            sums = total(parts, group, base, models, files)
            table.add(group, sums)
            if crossing and sums.cross is not None:
                crossing.add(group.name, group.members, sums.cross)
        if crossing:
            crossing.add_stacks(models, files)
    return table.result(base, models, alignments)


def _run_shared(
    tasks: Sequence[tuple[int, Callable[[], Sums]]], workers: int
) -> list[Sums]:
    """Run the tasks; ranks that share a scan run a part each, and get all results."""
    sharers = sharing.group()
    if sharers is None:
        return run(tasks, workers)
    owners = dealing.owners([size for size, _ in tasks], sharers.size)
    mine = [
        task for task, owner in zip(tasks, owners, strict=True) if owner == sharers.rank
    ]
    parts = sharers.gather([sums.numbers() for sums in run(mine, workers)])
    following = [iter(part) for part in parts]
    return [Sums.of(next(following[owner])) for owner in owners]
