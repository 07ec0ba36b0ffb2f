"""Compares merges by their losses on texts: statistics, tables and words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from mergekit_metagpt.report import ranking
from mergekit_metagpt.report.ranking import Estimate, Merge, difference
from mergekit_metagpt.report.schema import Record
from mergekit_metagpt.report.scoring import Scoring
from mergekit_metagpt.scanning.cache import ChunkLosses

# Texts in a table of 80 columns, at most.
MOST_TEXTS = 6


class Text(Record):
    """A text; `model` is its specialist, or null for a text not counted in the ALD."""

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


class Row(ranking.Ranked):
    """A model and its losses, text by text.

    Attributes:
        losses: in the order of the texts.
        ald: average loss difference from the specialists on their texts.
        ald_error: its standard error, paired over chunks.
        above_best: ALD minus that of the best candidate.
        above_best_error: its standard error, paired over chunks.
    """

    losses: tuple[Loss, ...]
    ald: float
    ald_error: float
    above_best: float | None = None
    above_best_error: float | None = None

    @property
    def by(self) -> Estimate:
        """The average loss difference."""
        return Estimate(value=self.ald, error=self.ald_error)

    @property
    def gap(self) -> Estimate:
        """How much lower the best candidate's is."""
        error = self.above_best_error or 0.0
        return Estimate(value=self.above_best or 0.0, error=error)


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


def compare(
    texts: Sequence[Text],
    measured: Mapping[str, Sequence[ChunkLosses]],
    merges: Mapping[str, Merge],
    about: Mapping[str, object],
) -> Comparison:
    """Compare candidates: average loss differences, and which is best.

    ALD = 1/K sum_t (L_t(theta) - L_t(theta_t)) over the K texts that have a model. The
    standard errors are paired: over the differences of chunks, not over chunks.

    Args:
        texts: in the order of the losses; at least one has a model, or there are none.
        measured: losses by model or candidate, text by text; the base comes first.
        merges: the candidates, by their first names.
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
    # If models cut a chunk into different tokens, a token is no common unit.
    tokens = {tuple(tuple(each.tokens) for each in row) for row in measured.values()}
    unit = "token" if len(tokens) == 1 else "byte"
    specialists = {k: text.model for k, text in enumerate(texts) if text.model}

    def above(name: str, others: Mapping[int, str]) -> Estimate:
        pairs = [(measured[name][k], measured[other][k]) for k, other in others.items()]
        return difference(pairs, unit)

    alds = {name: above(name, specialists) for name in measured}

    def gap(name: str, other: str) -> Estimate:
        return above(name, dict.fromkeys(specialists, other))

    def row(name: str, fields: Mapping[str, Any]) -> Row:
        return Row(
            name=name,
            losses=tuple(map(_loss, measured[name])),
            ald=alds[name].value,
            ald_error=alds[name].error,
            **fields,
        )

    ranked, models = ranking.rank(alds, merges, gap, row, "above_best")
    return Comparison.model_validate(
        {
            **about,
            "unit": unit,
            "texts": texts,
            "models": models,
            "candidates": ranked,
            "best": ranked[0].name,
            "verdict": " ".join(_verdict(texts, ranked, models, above, unit)),
        }
    )


def loss_in(loss: Loss, unit: str) -> float:
    """Return a loss per `token` or `byte`."""
    return loss.per_token if unit == "token" else loss.per_byte


def _loss(losses: ChunkLosses) -> Loss:
    token, byte = (difference([(losses, None)], unit) for unit in ("token", "byte"))
    return Loss(
        per_token=token.value,
        per_token_error=token.error,
        per_byte=byte.value,
        per_byte_error=byte.error,
    )


def _verdict(
    texts: Sequence[Text],
    ranked: Sequence[Row],
    models: Sequence[Row],
    above: Callable[[str, Mapping[int, str]], Estimate],
    unit: str,
) -> Iterator[str]:
    """Say which candidate is best, and what speaks against merging, beyond noise."""
    (best, *others), base = ranked, models[0].name
    specialists = {k: text.model for k, text in enumerate(texts) if text.model}

    def above_base(name: str, text: int) -> Estimate | None:
        """How much worse than the base a model is, if it is."""
        gap = above(name, {text: base})
        return gap if gap.value > 2 * gap.error else None

    # If one text counts, its specialist has an ALD of 0 by definition.
    own = set(specialists.values()) if len(specialists) == 1 else set()
    gaps = {
        row.name: above(row.name, dict.fromkeys(specialists, best.name))
        for row in models
        if row.name not in own
    }
    alone = [name for name, ahead in gaps.items() if ahead.value < -2 * ahead.error]
    if alone:
        yield (
            f"Do not merge for these texts: {ranking.listed(alone)} alone "
            f"{'has' if len(alone) == 1 else 'have'} a lower ALD than any merge."
        )
    if others:
        gap = f"lower by {others[0].gap} nats per {unit}"
        words = f"Best on these texts: {best.name}, {gap} than "
        yield ranking.in_words(words, others)
    else:
        yield f"Only one merge was compared: {best.name}, ALD {best.ald:.4f}."
    forgotten = [
        f"{text.name} (by {worse})"
        for k, text in enumerate(texts)
        if (worse := above_base(best.name, k))
    ]
    if forgotten and base not in alone:
        yield f"But {best.name} is worse than the base on {', '.join(forgotten)}."
    for k, name in specialists.items():
        if worse := above_base(name, k):
            yield (
                f"{name} is worse than the base on its own text, by {worse}: its "
                "training did harm there, or the text is not of its kind."
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
        yield "The models have different tokens: only losses per byte can be compared."
    yield ranking.table_of_ranks(found.candidates, found.models, "ALD", "above best")
    yield f"Loss on each text, nats per {found.unit}"
    yield from ranking.tables_of_parts(
        found.models,
        found.candidates,
        lambda row, text: f"{loss_in(row.losses[text], found.unit):.4f}",
        len(found.texts),
        MOST_TEXTS,
    )
    for number, text in enumerate(found.texts, 1):
        counts = "" if text.model else ", not in the ALD"
        yield (
            f"{number}: {text.name}, {text.file}, {text.tokens:,} tokens, "
            f"{text.bytes:,} bytes{counts}"
        )
