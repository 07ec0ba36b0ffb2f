"""What to beware of in coefficients and task vectors: figures in, sentences out."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.scanning.pools import exclude_for

if TYPE_CHECKING:
    from mergekit_metagpt.scanning.results import ScanResult

DOMINANT = 0.9
STARVED = 0.1
MOST = 0.5
UNWRITTEN = 0.01
# Models that were trained apart are sqrt(2) apart; a fine-tune moves a few per cent.
FAR = 0.5
# An unrelated model is at least as far away as the base's own norm.
APART = 1.0
SIBLINGS = 0.5
ORTHOGONAL = 0.1


def degenerate(
    base: Hashable,
    models: Sequence[Hashable],
    shares: Sequence[float],
    where: str,
    *,
    weighted: bool = False,
    power: float = 2.0,
) -> str | None:
    """Say whether one model takes almost all, or gets almost nothing.

    Args:
        base: the base.
        models: the K models that have a weight.
        shares: their coefficients, summing to 1.
        where: the pool of tensors, for the reader.
        weighted: whether the configuration gives them different weights.
        power: of the norms.

    Returns:
        the sentence, or None if max <= 0.9 and min >= 0.1 / K.
    """
    if len(shares) < 2:
        return None
    largest = max(range(len(shares)), key=shares.__getitem__)
    smallest = min(range(len(shares)), key=shares.__getitem__)
    if shares[largest] > DOMINANT:
        found = f"{models[largest]} takes {shares[largest]:.2%}"
        correction = "a weight below 1 for it"
    elif shares[smallest] < STARVED / len(shares):
        found = f"{models[smallest]} gets only {shares[smallest]:.2%}"
        correction = "a weight above 1 for it"
    else:
        return None
    milder = "power: 1, " if power > 1 else ""
    weights = "a weight left over in the YAML, " if weighted else ""
    return (
        f"{found} of the merge ({where}). Usual causes: {weights}a LoRA beside full "
        f"fine-tunes, a wrong base (here {base}), a resized or reordered "
        f"vocabulary. Ways out: {milder}{correction}, or exclude"
    )


def nothing_moved(base: Hashable, where: str) -> str:
    """Say that all models equal the base."""
    return f"no model differs from the base {base} ({where}): the base is kept"


def nothing_counts(exclude: Sequence[str]) -> str:
    """Say that `exclude` leaves no tensor to measure."""
    return (
        f"exclude ({', '.join(exclude)}) names every tensor: nothing is measured, and "
        "the weights alone count"
    )


def left_out(
    base: Hashable, models: Sequence[Hashable], power: float, where: str
) -> str | None:
    """Say which models equal the base, whose norm has no negative power."""
    if not models:
        return None
    names = ", ".join(str(model) for model in models)
    return (
        f"{names} equals the base {base} ({where}) and has no norm to the power "
        f"{power:g}: left out"
    )


def whole_model(
    base: Hashable,
    models: Sequence[Hashable],
    result: ScanResult,
    exclude: Sequence[str],
    left: Collection[str] = (),
) -> Iterator[str]:
    """Say what is unusual about the task vectors of whole models.

    Args:
        base: the base.
        models: the K models.
        result: what was measured of them.
        exclude: parts of the names of tensors that do not count.
        left: names of tensors that the merge does not write.

    Yields:
        sentences.
    """
    pooled = result.pool("model", exclude)
    counted = set(pooled.members["model"])
    groups = (
        (result.vocabulary & counted, embeddings),
        (counted & {*left}, counts_unwritten),
    )
    for k, model in enumerate(models):
        sq_norm = float(pooled.sq_norms[k])
        if not sq_norm:
            continue
        for names, sentence in groups:
            rows = [row for row, name in enumerate(result.names) if name in names]
            share = float(result.sq_norms[rows, k].sum()) / sq_norm
            out = exclude_for(names, counted - names)
            if text := sentence(model, share, out):
                yield text
        if text := far(base, model, distance(result, k, counted)):
            yield text
    for k, model in enumerate(models):
        for other in range(k):
            ours, theirs = result.sq_norms[:, k], result.sq_norms[:, other]
            if torch.equal(ours, theirs) and bool(ours.any()):
                yield (
                    f"{models[other]} and {model} are identical (their task vectors "
                    "have the same norm on every tensor): what they learned counts "
                    "twice. Leave one of them out"
                )


def distance(result: ScanResult, model: int, counted: Collection[str]) -> float:
    """Return how far a model's tensors are from the base's, in norms of those.

    The median over tensors: of small models, norms that all have in common may hold
    most of ||theta_0||; of others, changed embeddings most of ||tau||.

    Args:
        result: what was measured.
        model: row of the model.
        counted: names of the tensors that count.

    Returns:
        median of ||tau|| / ||theta_0||; 0 without tensors.
    """
    rows = [row for row, name in enumerate(result.names) if name in counted]
    sq_norms = result.sq_norms[rows, model]
    base_sq_norms = result.base_sq_norms[rows, model]
    known = base_sq_norms > 0
    if not bool(known.any()):
        return 0.0
    return float((sq_norms[known] / base_sq_norms[known]).median().sqrt())


def embeddings(model: Hashable, share: float, exclude: str) -> str | None:
    """Say that embeddings hold most of a squared norm."""
    if share <= MOST:
        return None
    return (
        f"embeddings hold {share:.0%} of ||tau||^2 of {model}: if its vocabulary was "
        f"resized or reordered, keep them out with exclude: {exclude}"
    )


def counts_unwritten(model: Hashable, share: float, exclude: str) -> str | None:
    """Say that tensors count which the merge leaves out."""
    if share <= UNWRITTEN:
        return None
    return (
        f"tensors that mergekit does not write hold {share:.0%} of ||tau||^2 of "
        f"{model}, and count in its coefficient. Keep them out with exclude: {exclude}"
    )


def lost(base: Hashable, names: Sequence[str], count: int, share: float) -> str | None:
    """Say that mergekit does not write weights that the merged model needs.

    Args:
        base: the model whose tensors are meant.
        names: of those that are not written.
        count: of all tensors that the model stores.
        share: of the parameters that are not written.

    Returns:
        the sentence, or None if all are written.
    """
    if not names:
        return None
    return (
        f"mergekit would not write {len(names)} of {count} tensors of {base} "
        f"({share:.1%} of its parameters), such as {', '.join(sorted(names)[:3])}: it "
        "does not read them in this layout, and the merged model would have freshly "
        "initialised weights instead. Save copies of base and models by transformers "
        "with save_pretrained(..., save_original_format=False), and merge those"
    )


def far(base: Hashable, model: Hashable, relative_norm: float) -> str | None:
    """Say that a model is so far from the base that it may stem from another one."""
    if relative_norm <= FAR:
        return None
    return (
        f"the tensors of {model} are typically {relative_norm:.2f} of their norm away "
        f"from those of {base}; fine-tunes move a few hundredths (models trained apart "
        "are about 1.4 away). Is it a fine-tune of this base?"
    )


def other_bases(bases: Sequence[str]) -> str:
    """Say that adapters name different bases in their configurations."""
    return (
        f"by their adapter_config.json the adapters have different bases "
        f"({', '.join(bases)}): their coefficients mean something only if these are "
        "one model under several names"
    )


def copied_embeddings(adapter: Hashable) -> str:
    """Say that an adapter stores weights of its base, which are taken for unchanged."""
    return (
        f"{adapter} stores a copy of its base's embeddings, taken as unchanged. Give "
        "--base BASE to compare them"
    )


def siblings(base: Hashable, cosines: Sequence[float]) -> str | None:
    """Say that all task vectors point the same way.

    Args:
        base: the base.
        cosines: between every two task vectors.

    Returns:
        the sentence, or None if a pair has a cosine of 0.5 or less.
    """
    if not cosines or min(cosines) <= SIBLINGS:
        return None
    return (
        f"all task vectors point the same way (cosines from {min(cosines):.2f}): the "
        f"models share training that {base} has not seen. Is one of their common "
        "ancestors the base to take?"
    )


def cosine_reading(
    models: Sequence[Hashable], cosines: Sequence[Sequence[float]] | None
) -> str:
    """Say in plain words what the cosines between task vectors mean.

    Args:
        models: the K models.
        cosines: shape `(K, K)`, NaN for a model that equals the base; None where they
            were not measured.

    Returns:
        one sentence.
    """
    if cosines is None:
        return "Cosines were not measured; `mergekit-metagpt inspect` measures them."
    pairs = [
        (cosines[row][column], row, column)
        for row in range(len(models))
        for column in range(row)
        if cosines[row][column] == cosines[row][column]
    ]
    if len(models) < 2:
        return "One task vector alone has no angle to others."
    if not pairs:
        return "No two task vectors that are not zero: there is no angle to read."
    value, row, column = max(pairs, key=lambda pair: abs(pair[0]))
    if abs(value) <= ORTHOGONAL:
        return (
            f"Near orthogonal (at most {abs(value):.2f}), as the paper assumes: what "
            "one model learned hardly overlaps with the others."
        )
    way = (
        "share a direction: part of what they learned is the same"
        if value > 0
        else "point against each other: what one learned, the other undoes in part"
    )
    return (
        f"{models[column]} and {models[row]} {way} (cosine {value:+.2f}). The paper "
        "assumes values near 0; the coefficients do not depend on them."
    )
