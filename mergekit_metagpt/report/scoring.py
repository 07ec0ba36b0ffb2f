"""Ranks merges by their scores on tasks: scores by document in, tables out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text as Cell

from mergekit_metagpt.report.comparison import (
    NOISE,
    Estimate,
    Scored,
    Scoring,
    Task,
    difference,
    in_words,
    table_of,
    with_error,
)
from mergekit_metagpt.scanning.cache import ChunkLosses, TaskScores

# Tasks beside each other in a table of 80 columns.
MOST_TASKS = 3


def compare(
    tasks: Sequence[str],
    measured: Mapping[str, Sequence[TaskScores]],
    candidates: Mapping[str, tuple[Sequence[str], str]],
    lm_eval: str,
) -> Scoring:
    """Rank candidates by the mean of their scores, each task by its first metric.

    Standard errors are those of means over documents. Those of differences are paired:
    over the differences of documents.

    Args:
        tasks: names, in the order of the scores.
        measured: scores by model or candidate, task by task.
        candidates: all names and the YAML of each merge, by its first name.
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
    best = min(candidates, key=lambda name: means[name].value)
    rows = {}
    for name, of_tasks in measured.items():
        mean = means[name]
        row = Scored(
            name=name,
            scores=tuple(_estimates(scores) for scores in of_tasks),
            mean=Estimate(value=-mean.value + 0.0, error=mean.error),
        )
        if name in candidates:
            names, yaml = candidates[name]
            gap = above(name, best)
            row = row.model_copy(
                update={
                    "names": tuple(names),
                    "yaml": yaml,
                    "below_best": gap.value,
                    "below_best_error": gap.error,
                    "beyond_noise": abs(gap.value) > 2 * gap.error,
                }
            )
        rows[name] = row
    ranked = sorted(
        (rows[name] for name in candidates), key=lambda row: -row.mean.value
    )
    models = [row for name, row in rows.items() if name not in candidates]
    return Scoring(
        lm_eval=lm_eval,
        tasks=tuple(described),
        models=tuple(models),
        candidates=tuple(ranked),
        best=best,
        verdict=_verdict(ranked, models),
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


def _verdict(ranked: Sequence[Scored], models: Sequence[Scored]) -> str:
    best, *others = ranked
    if others:
        gap = with_error(others[0].below_best or 0.0, others[0].below_best_error or 0.0)
        by = f"Best on these tasks: {best.name}, mean score better by {gap} than "
        text = in_words(by, others)
    else:
        mean = best.mean.value
        text = f"Only one merge was scored: {best.name}, mean score {mean:.4f}."
    alone = [row.name for row in models if row.mean.value > best.mean.value]
    if alone:
        text += f" But without any merge, {' and '.join(alone)} alone scored better."
    return text


def lay_out(found: Scoring) -> Iterator[str | Table]:
    """Lay out scores for a terminal of 80 columns.

    Args:
        found: the scores.

    Yields:
        tables, and lines of text.
    """
    yield f"Mean score and standard error, by lm-eval {found.lm_eval}"
    table = table_of("candidate", "score", "below best", "")
    for row in found.candidates:
        same = f" (= {', '.join(row.names[1:])})" if row.names[1:] else ""
        words = "beyond noise" if row.beyond_noise else NOISE
        gap = with_error(row.below_best or 0.0, row.below_best_error or 0.0)
        best = row.name == found.best
        table.add_row(
            Cell(row.name + same),
            with_error(row.mean.value, row.mean.error),
            "" if best else gap,
            "best" if best else words,
        )
    table.add_section()
    for row in found.models:
        table.add_row(
            Cell(row.name), with_error(row.mean.value, row.mean.error), "", ""
        )
    yield table
    yield "Score on each task"
    for first in range(0, len(found.tasks), MOST_TASKS):
        numbers = range(first, min(first + MOST_TASKS, len(found.tasks)))
        table = table_of("model", *(str(number + 1) for number in numbers))
        for rows in (found.models, found.candidates):
            for row in rows:
                cells = (_shown(row, found.tasks[k].metric, k) for k in numbers)
                table.add_row(Cell(row.name), *cells)
            table.add_section()
        yield table
    for number, task in enumerate(found.tasks, 1):
        way = "" if task.higher_is_better else ", lower is better"
        yield f"{number}: {task.name}, {task.metric}{way}, {task.documents:,} documents"
    yield found.verdict


def _shown(row: Scored, metric: str, task: int) -> str:
    score = row.scores[task][metric]
    return with_error(score.value, score.error)
