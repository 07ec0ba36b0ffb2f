"""Ranks merges by what was measured of them: paired errors, tables and words."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text as Cell

from mergekit_metagpt.report.schema import Record
from mergekit_metagpt.scanning.cache import ChunkLosses

NOISE = "no difference beyond noise"


class Estimate(Record):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """Write four decimals, or as many as show two digits of a small error."""
        digits = 1 - math.floor(math.log10(self.error)) if self.error else 4
        digits = min(max(4, digits), 7)
        return f"{self.value:.{digits}f}±{self.error:.{digits}f}"


@dataclass(frozen=True)
class Merge:
    """A merge to rank: all its names, its YAML, and what it is in words."""

    names: Sequence[str]
    yaml: str
    meaning: str = ""


class Ranked(Record):
    """A candidate, or a model of the YAML, which has only a name.

    Attributes:
        name: the model's, or the candidate's first.
        names: all names of the candidate.
        meaning: the candidate in words.
        yaml: the candidate's.
        beyond_noise: whether the best is better by more than two standard errors.
    """

    name: str
    names: tuple[str, ...] = ()
    meaning: str = ""
    yaml: str | None = None
    beyond_noise: bool | None = None

    @property
    @abstractmethod
    def by(self) -> Estimate:
        """The figure by which candidates are ranked."""

    @property
    @abstractmethod
    def gap(self) -> Estimate:
        """How much better the best candidate is; 0 for a model of the YAML."""


R = TypeVar("R", bound=Ranked)


def _rate(losses: ChunkLosses, unit: str) -> tuple[float, list[float]]:
    """The mean loss, and each chunk's part in its error (a ratio estimator)."""
    sizes = losses.tokens if unit == "token" else losses.bytes
    total = sum(sizes)
    mean = sum(losses.losses) / total
    parts = zip(losses.losses, sizes, strict=True)
    return mean, [(loss - mean * size) / total for loss, size in parts]


def difference(
    pairs: Sequence[tuple[ChunkLosses, ChunkLosses | None]], unit: str
) -> Estimate:
    """Mean over texts of one model's loss minus another's on the same chunks.

    Args:
        pairs: text by text, a model's losses and another's; None takes the mean loss.
        unit: `token` or `byte`.

    Returns:
        the difference, with a standard error that is paired over chunks.
    """
    value = variance = 0.0
    for one, other in pairs:
        mean, residuals = _rate(one, unit)
        if other is not None:
            less, others = _rate(other, unit)
            mean -= less
            residuals = [a - b for a, b in zip(residuals, others, strict=True)]
        count = len(residuals)
        value += mean
        variance += count / (count - 1) * sum(r * r for r in residuals)
    return Estimate(value=value / len(pairs), error=math.sqrt(variance) / len(pairs))


def rank(
    losses: Mapping[str, Estimate],
    merges: Mapping[str, Merge],
    gap: Callable[[str, str], Estimate],
    row: Callable[[str, Mapping[str, Any]], R],
    gap_field: str,
) -> tuple[list[R], list[R]]:
    """Sort candidates, and find which are worse than the best one beyond noise.

    Args:
        losses: of candidates and models of the YAML; less is better.
        merges: the candidates among them.
        gap: loss of one candidate minus that of another, paired.
        row: makes a row from a name, and the fields that only candidates have.
        gap_field: name of the field for the gap to the best candidate.

    Returns:
        the candidates from the best to the worst, and the other models.
    """
    best = min(merges, key=lambda name: losses[name].value)
    candidates, models = [], []
    for name in losses:
        if name not in merges:
            models.append(row(name, {}))
            continue
        merge, behind = merges[name], gap(name, best)
        fields = {
            "names": tuple(merge.names),
            "meaning": merge.meaning,
            "yaml": merge.yaml,
            "beyond_noise": abs(behind.value) > 2 * behind.error,
            gap_field: behind.value,
            f"{gap_field}_error": behind.error,
        }
        candidates.append(row(name, fields))
    candidates.sort(key=lambda each: losses[each.name].value)
    return candidates, models


def in_words(by: str, others: Sequence[Ranked]) -> str:
    """Say in a sentence that begins with `by` whether the best differs from others."""
    near = [row.name for row in others if not row.beyond_noise]
    second = others[0]
    by = f"{by}{second.name}: "
    if not near:
        return f"{by}beyond noise."
    if near == [second.name]:
        return f"{by}{NOISE}."
    names = ", ".join(name for name in near if name != second.name)
    if second.name not in near:
        return f"{by}beyond noise; but {NOISE} with {names}."
    return f"{by}{NOISE}, as with {names}."


def listed(names: Sequence[str]) -> str:
    """List names: `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def table_of_ranks(
    candidates: Sequence[Ranked], models: Sequence[Ranked], by: str, gap: str
) -> Table:
    """Tabulate candidates from the best to the worst, and the other models below."""
    table = _table("candidate", by, gap, "")
    for place, row in enumerate(candidates):
        same = f" (= {', '.join(row.names[1:])})" if row.names[1:] else ""
        words = "beyond noise" if row.beyond_noise else NOISE
        table.add_row(
            Cell(row.name + same),
            str(row.by),
            str(row.gap) if place else "",
            words if place else "best",
        )
    table.add_section()
    for row in models:
        table.add_row(Cell(row.name), str(row.by), "", "")
    return table


def tables_of_parts(
    models: Sequence[R],
    candidates: Sequence[R],
    cell: Callable[[R, int], str],
    count: int,
    most: int,
) -> Iterator[Table]:
    """Tabulate all models by texts or tasks: `count` of them, `most` in one table."""
    for first in range(0, count, most):
        numbers = range(first, min(first + most, count))
        table = _table("model", *(str(number + 1) for number in numbers))
        for rows in (models, candidates):
            for row in rows:
                table.add_row(Cell(row.name), *(cell(row, k) for k in numbers))
            table.add_section()
        yield table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        # Numbers have a heading and are aligned to the right, words to the left.
        table.add_column(heading, justify="right" if heading else "left")
    return table
