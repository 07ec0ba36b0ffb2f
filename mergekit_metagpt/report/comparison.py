"""Compares merges by their losses on texts: statistics, tables and words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table
from rich.text import Text as Cell

from mergekit_metagpt.scanning.cache import ChunkLosses

# Texts beside each other in a table of 80 columns.
MOST_TEXTS = 6
NOISE = "no difference beyond noise"


class Record(BaseModel):
    """What `--json` writes: plain data that never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(Record):
    """A text; `model` is its specialist, or null if it does not count in the ALD."""

    name: str
    file: str
    model: str | None
    chunks: int
    tokens: int
    bytes: int


class Loss(Record):
    """Mean loss of a model on a text, in nats, each with its standard error."""

    per_token: float
    per_token_error: float
    per_byte: float
    per_byte_error: float


class Row(Record):
    """A model and its losses, text by text; what only candidates have, else null.

    Attributes:
        name: of a model of the YAML, or the first of a candidate.
        names: all names of a candidate.
        yaml: of a candidate.
        losses: in the order of the texts.
        ald: average loss difference from the specialists on their texts.
        ald_error: its standard error, paired over chunks.
        above_best: ALD minus that of the best candidate.
        above_best_error: its standard error, paired over chunks.
        beyond_noise: whether that is more than two standard errors.
    """

    name: str
    names: tuple[str, ...] = ()
    yaml: str | None = None
    losses: tuple[Loss, ...]
    ald: float
    ald_error: float
    above_best: float | None = None
    above_best_error: float | None = None
    beyond_noise: bool | None = None


class Estimate(Record):
    """A mean and its standard error."""

    value: float
    error: float


class Task(Record):
    """A task of the EleutherAI harness, with the metric by which merges are ranked."""

    name: str
    metric: str
    higher_is_better: bool
    documents: int


class Scored(Record):
    """A model and its scores, task by task; what only candidates have, else null.

    Attributes:
        name: of a model of the YAML, or the first of a candidate.
        names: all names of a candidate.
        yaml: of a candidate.
        scores: by metric, in the order of the tasks.
        mean: over the tasks, each by its first metric; what is better when lower
            counts with the other sign.
        below_best: mean of the best candidate minus this one's.
        below_best_error: its standard error, paired over documents.
        beyond_noise: whether that is more than two standard errors.
    """

    name: str
    names: tuple[str, ...] = ()
    yaml: str | None = None
    scores: tuple[dict[str, Estimate], ...]
    mean: Estimate
    below_best: float | None = None
    below_best_error: float | None = None
    beyond_noise: bool | None = None


class Scoring(Record):
    """Merges by their scores on tasks."""

    lm_eval: str
    tasks: tuple[Task, ...]
    models: tuple[Scored, ...]
    candidates: tuple[Scored, ...]
    best: str
    verdict: str


class Comparison(Record):
    """Merges by their losses on texts; ALD and differences are in nats per `unit`.

    Without texts, `models` and `candidates` are empty, and `scoring` ranks.
    """

    schema_version: int = 1
    versions: dict[str, str]
    unit: str
    context: int
    dtype: str
    device: str
    texts: tuple[Text, ...]
    models: tuple[Row, ...]
    candidates: tuple[Row, ...]
    best: str
    verdict: str
    scoring: Scoring | None = None


def _rate(losses: ChunkLosses, unit: str) -> tuple[float, list[float]]:
    """Mean loss, and how much each chunk adds to its error (a ratio estimator)."""
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
        pairs: text by text, a model's losses and another's, or None for the loss.
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


def compare(
    texts: Sequence[Text],
    measured: Mapping[str, Sequence[ChunkLosses]],
    candidates: Mapping[str, tuple[Sequence[str], str]],
    about: Mapping[str, object],
) -> Comparison:
    """Compare candidates: average loss differences, and which is best.

    ALD = 1/K sum_t (L_t(theta) - L_t(theta_t)) over the K texts that have a model. The
    standard errors are paired: over the differences of chunks, not over chunks.

    Args:
        texts: in the order of the losses; at least one has a model, or there are none.
        measured: losses by model or candidate, text by text.
        candidates: all names and the YAML of each merge, by its first name.
        about: the other fields of `Comparison`: versions, settings and scores.

    Returns:
        candidates from the best to the worst, and the other models.
    """
    if not texts:
        ranked_by = about["scoring"]
        assert isinstance(ranked_by, Scoring)
        empty = {"unit": "token", "texts": (), "models": (), "candidates": ()}
        said = {"best": ranked_by.best, "verdict": ranked_by.verdict}
        return Comparison.model_validate({**about, **empty, **said})
    # Where models cut the same chunk into other tokens, a token is no common unit.
    same = all(
        [losses.tokens for losses in row] == [losses.tokens for losses in other]
        for row in measured.values()
        for other in measured.values()
    )
    unit = "token" if same else "byte"
    counted = [k for k, text in enumerate(texts) if text.model is not None]

    def above(name: str, others: Mapping[int, str]) -> Estimate:
        pairs = [(measured[name][k], measured[other][k]) for k, other in others.items()]
        return difference(pairs, unit)

    specialists = {k: str(texts[k].model) for k in counted}
    alds = {name: above(name, specialists) for name in measured}
    best = min(candidates, key=lambda name: alds[name].value)
    rows = {}
    for name, losses in measured.items():
        row = Row(
            name=name,
            losses=tuple(map(_loss, losses)),
            ald=alds[name].value,
            ald_error=alds[name].error,
        )
        if name in candidates:
            names, yaml = candidates[name]
            gap = above(name, dict.fromkeys(counted, best))
            row = row.model_copy(
                update={
                    "names": tuple(names),
                    "yaml": yaml,
                    "above_best": gap.value,
                    "above_best_error": gap.error,
                    "beyond_noise": abs(gap.value) > 2 * gap.error,
                }
            )
        rows[name] = row
    ranked = sorted((rows[name] for name in candidates), key=lambda row: row.ald)
    models = [row for name, row in rows.items() if name not in candidates]
    # On the text of one specialist alone, it has an ALD of 0 by definition.
    own = set(specialists.values()) if len(counted) == 1 else set()
    alone = [
        row.name
        for row in models
        if row.name not in own
        and (gap := above(row.name, dict.fromkeys(counted, best))).value
        < -2 * gap.error
    ]
    return Comparison.model_validate(
        {
            **about,
            "unit": unit,
            "texts": texts,
            "models": models,
            "candidates": ranked,
            "best": best,
            "verdict": _verdict(ranked, unit) + _better_alone(alone),
        }
    )


def _loss(losses: ChunkLosses) -> Loss:
    token, byte = (difference([(losses, None)], unit) for unit in ("token", "byte"))
    return Loss(
        per_token=token.value,
        per_token_error=token.error,
        per_byte=byte.value,
        per_byte_error=byte.error,
    )


def _verdict(ranked: Sequence[Row], unit: str) -> str:
    """Say which candidate is best, by how much, and whether that is beyond noise."""
    best, *others = ranked
    if not others:
        return f"Only one merge was compared: {best.name}, ALD {best.ald:.4f}."
    gap = with_error(others[0].above_best or 0.0, others[0].above_best_error or 0.0)
    by = f"Best on these texts: {best.name}, lower by {gap} nats per {unit} than "
    return in_words(by, others)


def in_words(by: str, others: Sequence[Row | Scored]) -> str:
    """Say which candidates differ from the best beyond noise.

    Args:
        by: how much better the best is, up to the name of the second best.
        others: all but the best, in their order.

    Returns:
        one sentence.
    """
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


def _better_alone(names: Sequence[str]) -> str:
    """Say so where models alone do better than every merge, beyond noise."""
    if not names:
        return ""
    return (
        f" But without any merge, {' and '.join(names)} alone "
        f"{'has' if len(names) == 1 else 'have'} a lower ALD: do not merge for these "
        "texts."
    )


def lay_out(found: Comparison) -> Iterator[str | Table]:
    """Lay out a comparison for a terminal of 80 columns.

    Args:
        found: the comparison.

    Yields:
        tables, and lines of text.
    """
    yield f"Average loss difference (ALD) and standard errors, nats per {found.unit}"
    if found.unit == "byte":
        yield "Tokens are not the same in all models: only losses per byte compare."
    table = table_of("candidate", "ALD", "above best", "")
    for row in found.candidates:
        same = f" (= {', '.join(row.names[1:])})" if row.names[1:] else ""
        words = "beyond noise" if row.beyond_noise else NOISE
        gap = with_error(row.above_best or 0.0, row.above_best_error or 0.0)
        best = row.name == found.best
        table.add_row(
            Cell(row.name + same),
            with_error(row.ald, row.ald_error),
            "" if best else gap,
            "best" if best else words,
        )
    table.add_section()
    for row in found.models:
        table.add_row(Cell(row.name), with_error(row.ald, row.ald_error), "", "")
    yield table
    yield f"Loss on each text, nats per {found.unit}"
    for first in range(0, len(found.texts), MOST_TEXTS):
        numbers = range(first, min(first + MOST_TEXTS, len(found.texts)))
        table = table_of("model", *(str(number + 1) for number in numbers))
        for rows in (found.models, found.candidates):
            for row in rows:
                table.add_row(Cell(row.name), *(_shown(found, row, k) for k in numbers))
            table.add_section()
        yield table
    for number, text in enumerate(found.texts, 1):
        counts = "" if text.model else ", not in the ALD"
        yield (
            f"{number}: {text.name}, {text.file}, {text.tokens:,} tokens, "
            f"{text.bytes:,} bytes{counts}"
        )


def with_error(value: float, error: float) -> str:
    """Write four decimals, or as many as show two digits of a small error."""
    digits = 1 - math.floor(math.log10(error)) if error else 4
    digits = min(max(4, digits), 7)
    return f"{value:.{digits}f}±{error:.{digits}f}"


def _shown(found: Comparison, row: Row, text: int) -> str:
    loss = row.losses[text]
    return f"{loss.per_token if found.unit == 'token' else loss.per_byte:.4f}"


def table_of(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        # What is explained in words stands at the left, numbers at the right.
        table.add_column(heading, justify="right" if heading else "left")
    return table
