"""Ranks merges by their scores on tasks: scores by document in, tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from mergekit_metagpt.report import ranking
from mergekit_metagpt.report.ranking import Estimate, Merge, difference
from mergekit_metagpt.report.schema import Record
from mergekit_metagpt.scanning.cache import ChunkLosses, TaskScores

# Tasks in a table of 80 columns, at most.
MOST_TASKS = 3


class Task(Record):
    """A task of the EleutherAI harness, with the metric by which merges are ranked."""

    name: str
    metric: str
    higher_is_better: bool
    documents: int


class Scored(ranking.Ranked):
    """A model and its scores, task by task.

    Attributes:
        scores: by metric, in the order of the tasks.
        mean: over the tasks, each by its first metric, with the other sign if lower
            is better.
        below_best: mean of the best candidate minus this one's.
        below_best_error: its standard error, paired over documents.
    """

    scores: tuple[dict[str, Estimate], ...]
    mean: Estimate
    below_best: float | None = None
    below_best_error: float | None = None

    @property
    def by(self) -> Estimate:
        """The mean score."""
        return self.mean

    @property
    def gap(self) -> Estimate:
        """How much better the best candidate's is."""
        error = self.below_best_error or 0.0
        return Estimate(value=self.below_best or 0.0, error=error)


class Scoring(Record):
    """Merges by their scores on tasks."""

    lm_eval: str
    tasks: tuple[Task, ...]
    models: tuple[Scored, ...]
    candidates: tuple[Scored, ...]
    best: str
    verdict: str


def compare(
    tasks: Sequence[str],
    measured: Mapping[str, Sequence[TaskScores]],
    merges: Mapping[str, Merge],
    lm_eval: str,
) -> Scoring:
    """Rank candidates by the mean of their scores, each task by its first metric.

    Standard errors are over documents; those of differences are paired, over the
    differences of documents.

    Args:
        tasks: names, in the order of the scores.
        measured: scores by model or candidate, task by task.
        merges: the candidates, by their first names.
        lm_eval: version of the harness.

    Returns:
        candidates from the best to the worst, and the other models.
    """
    first = next(iter(measured.values()))
    described = []
    for name, scores in zip(tasks, first, strict=True):
        metric = next(iter(scores.documents))
        higher = scores.higher_is_better[metric]
        count = len(scores.documents[metric])
        described.append(
            Task(name=name, metric=metric, higher_is_better=higher, documents=count)
        )
    lost = {
        name: [
            _lost(scores, task.metric)
            for scores, task in zip(row, described, strict=True)
        ]
        for name, row in measured.items()
    }

    def above(name: str, other: str | None) -> Estimate:
        others = lost[other] if other else [None] * len(tasks)
        return difference(list(zip(lost[name], others, strict=True)), "token")

    means = {name: above(name, None) for name in measured}

    def row(name: str, fields: Mapping[str, Any]) -> Scored:
        mean = means[name]
        return Scored(
            name=name,
            scores=tuple(map(_estimates, measured[name])),
            mean=Estimate(value=-mean.value + 0.0, error=mean.error),
            **fields,
        )

    ranked, models = ranking.rank(means, merges, above, row, "below_best")
    return Scoring(
        lm_eval=lm_eval,
        tasks=tuple(described),
        models=tuple(models),
        candidates=tuple(ranked),
        best=ranked[0].name,
        verdict=_verdict(ranked, models, above),
    )


def _lost(scores: TaskScores, metric: str) -> ChunkLosses:
    """Scores as losses, of which lower is better: each document is one chunk."""
    values = scores.documents[metric]
    sign = -1.0 if scores.higher_is_better[metric] else 1.0
    ones = [1] * len(values)
    return ChunkLosses(losses=[sign * v for v in values], tokens=ones, bytes=ones)


def _estimates(scores: TaskScores) -> dict[str, Estimate]:
    """The mean of each metric, and its standard error."""
    found = {}
    for metric, values in scores.documents.items():
        ones = [1] * len(values)
        losses = ChunkLosses(losses=values, tokens=ones, bytes=ones)
        found[metric] = difference([(losses, None)], "token")
    return found


def _verdict(
    ranked: Sequence[Scored],
    models: Sequence[Scored],
    above: Callable[[str, str], Estimate],
) -> str:
    best, *others = ranked
    if others:
        by = f"{best.name}, mean score better by {others[0].gap} than "
        text = ranking.in_words(f"Best on these tasks: {by}", others)
    else:
        mean = best.mean.value
        text = f"Only one merge was scored: {best.name}, mean score {mean:.4f}."
    gaps = {row.name: above(row.name, best.name) for row in models}
    better = [name for name, gap in gaps.items() if gap.value < 0]
    beyond = [name for name in better if gaps[name].value < -2 * gaps[name].error]
    if better:
        text += f" But without any merge, {ranking.listed(beyond or better)} alone "
        text += "scored better" + ("." if beyond else ", but not beyond noise.")
    return text


def lay_out(found: Scoring) -> Iterator[str | Table]:
    """Lay out scores for a terminal of 80 columns.

    Args:
        found: the scores.

    Yields:
        tables, and lines of text.
    """
    yield f"Mean score and standard error, by lm-eval {found.lm_eval}"
    yield ranking.table_of_ranks(found.candidates, found.models, "score", "below best")
    yield "Score on each task"
    yield from ranking.tables_of_parts(
        found.models,
        found.candidates,
        lambda row, task: str(row.scores[task][found.tasks[task].metric]),
        len(found.tasks),
        MOST_TASKS,
    )
    for number, task in enumerate(found.tasks, 1):
        way = "" if task.higher_is_better else ", lower is better"
        yield f"{number}: {task.name}, {task.metric}{way}, {task.documents:,} documents"
    yield found.verdict
