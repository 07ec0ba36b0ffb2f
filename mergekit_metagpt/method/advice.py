"""Warnings about coefficients and task vectors: figures in, sentences out."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.arithmetic.closed_form import coefficients
from mergekit_metagpt.scanning.pools import exclude_for

if TYPE_CHECKING:
    from mergekit_metagpt.scanning.results import ScanResult

# A coefficient above DOMINANT, or below STARVED times an equal share, is reported.
DOMINANT = 0.9
STARVED = 0.1
# Shares of a squared norm that are reported: in embeddings, in tensors not written.
MOST = 0.5
UNWRITTEN = 0.01
# Relative to the norms, models trained independently are sqrt(2) apart, while a
# fine-tune moves a few per cent.
FAR = 0.5
# An unrelated model is at least as far from the base as the base's own norm.
APART = 1.0
# Cosines: of models that share training, at most of orthogonal ones, and of slightly
# similar ones (0.3 is 9% of a squared norm).
SIBLINGS = 0.5
ORTHOGONAL = 0.1
SLIGHT = 0.3
# Ratio of the largest to the smallest norm. docs/evaluation.md compares small models
# with ratios up to 1.5 and from 2.3, and Gemma 3 270M up to 1.9 and from 2.04.
APART_NORMS = 2.0
# The largest of these ratios.
FARTHEST_TRIED = 4.2


def degenerate(
    base: Hashable,
    models: Sequence[Hashable],
    shares: Sequence[float],
    weights: Sequence[float],
    where: str,
    *,
    sq_norms: Sequence[float] | None = None,
    power: float = 2.0,
    whole: ScanResult | None = None,
    exclude: Sequence[str] = (),
    by_pool: bool = False,
) -> str | None:
    """Report a model that takes almost all of a merge, or gets almost nothing.

    Args:
        base: the base.
        models: the K models.
        shares: their coefficients, summing to 1.
        weights: importance of each model; models with weight 0 are ignored.
        where: the pool of tensors, in words.
        sq_norms: n_t of the pool, or None if norms were not measured.
        power: exponent of the norms.
        whole: scan of the K models, if the pool is the whole model.
        exclude: parts of the names of tensors that do not count.
        by_pool: whether it is one of several pools, in all of which a weight counts.

    Returns:
        the sentence, or None if max <= 0.9 and min >= 0.1 / K.
    """
    rows = [k for k, weight in enumerate(weights) if weight > 0]
    if len(rows) < 2 or not any(shares):
        return None
    *_, second, largest = sorted(rows, key=shares.__getitem__)
    smallest = min(rows, key=shares.__getitem__)
    if shares[largest] > DOMINANT:
        one, other, gets = largest, second, "takes"
    elif shares[smallest] < STARVED / len(rows):
        one, other, gets = smallest, largest, "gets only"
    else:
        return None
    if sq_norms is not None and not sq_norms[one]:
        return (
            f"{models[one]} equals the base {base} in {where}: it has no task vector "
            "there and gets nothing"
        )
    moved = ""
    if sq_norms is not None and power != 0:
        moved = _moved(sq_norms[one], sq_norms[other], models[other])
        # If the distance points the other way, the share is due to the weights.
        if (" more " in moved) != ((one == largest) == (power > 0)):
            moved = ""
    causes = ["a LoRA beside full fine-tunes", f"a wrong base (here {base})"]
    heavy, light = (one, other) if one == largest else (other, one)
    if power > 2:
        causes.insert(0, "a power above 2")
    if weights[heavy] > weights[light]:
        causes.insert(0, "a weight left over in the YAML")
    # Of two, a user wants more of the one that gets little, such as a LoRA.
    meant = light if len(rows) == 2 and weights[heavy] <= weights[light] else one
    out = []
    weight = None
    if not by_pool:
        weight = _equal(shares[meant], weights[meant], len(rows))
    if weight is not None:
        out.append(f"weight: {weight} for {models[meant]} (an equal share)")
    for milder in (2.0, 1.0, 0.0):
        if sq_norms is None or power <= milder:
            continue
        changed = coefficients(sq_norms, weights, milder).tolist()
        if STARVED / len(rows) <= changed[one] <= DOMINANT:
            out.append(f"power: {milder:g} ({changed[meant]:.2%} for it)")
            break
    if whole is not None and (names := mostly_embeddings(whole, exclude, largest)):
        causes.append("a resized or reordered vocabulary")
        out.append(f"exclude: {names}")
    ways = f". Ways out: {' or '.join(out)}" if out else ""
    return (
        f"{models[one]}{moved} {gets} {_percent(shares[one])} of the merge ({where}). "
        f"Usual causes: {', '.join(causes)}{ways}"
    )


def _percent(share: float) -> str:
    """Write a share with two decimals, or with as many as show that it is not 0."""
    return f"{share:.2%}" if share >= 5e-5 or not share else f"{share * 100:.1e}%"


def _moved(sq_norm: float, other_sq_norm: float, other: Hashable) -> str:
    """Words for how many times farther one model moved than another."""
    if not sq_norm or not other_sq_norm:
        return ""
    ratio = (sq_norm / other_sq_norm) ** 0.5
    way, factor = ("more", ratio) if ratio > 1 else ("less", 1 / ratio)
    if factor < 1.05:
        return ""
    return f" moved {times(factor)} times {way} than {other} and"


def times(ratio: float) -> str:
    """Write a ratio of norms with at most three significant digits."""
    return f"{_rounded(ratio):,.15g}"


def _rounded(ratio: float) -> float:
    return float(f"{ratio:.3g}")


def _equal(share: float, weight: float, count: int) -> str | None:
    """The weight that would give a model with this share an equal one, 1 / count."""
    if not 1e-9 < share < 1:
        return None
    equal = weight * (1 - share) / (share * (count - 1))
    return f"{float(f'{equal:.2g}'):g}"


def mostly_embeddings(
    result: ScanResult, exclude: Sequence[str], model: int
) -> str | None:
    """Suggest how to exclude embeddings that hold most of a squared norm.

    Args:
        result: the scan.
        exclude: parts of the names of tensors that do not count.
        model: index of the model.

    Returns:
        an `exclude` for the embeddings, or None if they hold less.
    """
    pooled = result.pool("model", exclude)
    counted = set(pooled.members["model"])
    if float(pooled.embeddings[model]) <= MOST * float(pooled.sq_norms[model]):
        return None
    return exclude_for(result.vocabulary & counted, counted - result.vocabulary)


def nothing_moved(base: Hashable, where: str) -> str:
    """Report that all models equal the base."""
    return f"no model differs from the base {base} ({where}): the base is kept"


def nothing_counts(exclude: Sequence[str]) -> str:
    """Report that `exclude` leaves no tensor to measure."""
    return (
        f"exclude ({', '.join(exclude)}) names every tensor: nothing is measured, and "
        "the weights alone count"
    )


def for_defaults(varying: Sequence[str]) -> str:
    """Report coefficients that leave out what the YAML sets tensor by tensor."""
    return (
        f"the YAML sets {', '.join(varying)} tensor by tensor, which the coefficients "
        "here leave out. `export` writes those of each tensor"
    )


def by_tensor(varying: Sequence[str]) -> str:
    """Report that coefficients differ by tensor."""
    return (
        f"the YAML sets {', '.join(varying)} tensor by tensor: here are the smallest "
        "and the largest coefficient of each model. `export` writes those of each "
        "tensor"
    )


def base_listed(base: Hashable, weight: str | None) -> str:
    """Report that a base listed among the models gets no coefficient."""
    lost = "" if weight is None else f", and its weight {weight} does not count"
    return (
        f"{base} is the base and also listed as a model: it has no task vector, so it "
        f"gets no coefficient{lost}"
    )


def left_out(
    base: Hashable, models: Sequence[Hashable], power: float, where: str
) -> str | None:
    """Report models that equal the base: the norm 0 has no negative power."""
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
    """Report what is unusual about the task vectors of whole models.

    Args:
        base: the base.
        models: the K models.
        result: the scan of these models.
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
    """Return the median distance of a model's tensors from the base's, by their norms.

    A ratio of whole norms could mislead: normalisation weights may hold most of a small
    model's ||theta_0||, and changed embeddings most of ||tau||.

    Args:
        result: the scan.
        model: index of the model.
        counted: names of the tensors that count.

    Returns:
        median over tensors of ||tau|| / ||theta_0||; 0 without tensors.
    """
    rows = [row for row, name in enumerate(result.names) if name in counted]
    sq_norms = result.sq_norms[rows, model]
    base_sq_norms = result.base_sq_norms[rows, model]
    nonzero = base_sq_norms > 0
    if not bool(nonzero.any()):
        return 0.0
    return float((sq_norms[nonzero] / base_sq_norms[nonzero]).median().sqrt())


def embeddings(model: Hashable, share: float, exclude: str) -> str | None:
    """Report embeddings that hold most of a squared norm."""
    if share <= MOST:
        return None
    return (
        f"embeddings hold {share:.0%} of ||tau||^2 of {model}: if its vocabulary was "
        f"resized or reordered, keep them out with exclude: {exclude}"
    )


def counts_unwritten(model: Hashable, share: float, exclude: str) -> str | None:
    """Report tensors that count in a coefficient but are not merged."""
    if share <= UNWRITTEN:
        return None
    return (
        f"tensors that mergekit does not write hold {share:.0%} of ||tau||^2 of "
        f"{model}, and count in its coefficient. Keep them out with exclude: {exclude}"
    )


def lost(base: Hashable, names: Sequence[str], count: int, share: float) -> str | None:
    """Report weights that the merged model needs and mergekit does not write.

    Args:
        base: the model that has the weights.
        names: names of these weights.
        count: number of all tensors that the model stores.
        share: share of the model's parameters in these weights.

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
    """Report a model so far from the base that it may belong to another one."""
    if relative_norm <= FAR:
        return None
    refused = ""
    if relative_norm >= APART:
        refused = " `mergekit-metagpt merge` refuses it without --allow-crimes."
    return (
        f"the tensors of {model} are typically {relative_norm:.2f} of their norm away "
        f"from those of {base}; fine-tunes move a few hundredths (models trained apart "
        f"are about 1.4 away).{refused} Is it a fine-tune of this base?"
    )


def coarser_base(base: Hashable, model: Hashable, coarse: str, fine: str) -> str:
    """Report a model that is compared in the coarser precision of its base."""
    return (
        f"{model} is stored in {fine} and the base {base} in {coarse}: they are "
        f"compared in {coarse}, where a change of less than half a rounding step "
        f"counts as none. If the base was also published in {fine}, use that. With "
        f"dtype: {coarse} in the YAML, the merge loses such changes too"
    )


def other_bases(bases: Sequence[str]) -> str:
    """Report adapters whose configurations name different bases."""
    return (
        f"by their adapter_config.json the adapters have different bases "
        f"({', '.join(bases)}): their coefficients mean something only if these are "
        "one model under several names"
    )


def copied_embeddings(adapter: Hashable) -> str:
    """Report an adapter that stores weights of its base, assumed to be unchanged."""
    return (
        f"{adapter} stores a copy of its base's embeddings, taken as unchanged. Give "
        "--base BASE to compare them"
    )


def siblings(base: Hashable, cosines: Sequence[float]) -> str | None:
    """Report task vectors that all point the same way.

    Args:
        base: the base.
        cosines: cosines between all pairs of task vectors.

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


def which_weights(
    disparity: float,
    weights: Collection[float] = (),
    power: float = 2.0,
    *,
    about: str = "",
) -> str:
    """Say which weights were better at this ratio of norms, by docs/evaluation.md.

    Args:
        disparity: ratio of the largest to the smallest norm of the merged models.
        weights: the models' weights.
        power: of the norms.
        about: stands before the ratio, if it is an estimate.

    Returns:
        sentences.
    """
    if len({*weights} - {0}) > 1:
        return (
            f"Norms are {about}{times(disparity)} to 1 apart, before the weights that "
            "are set here. Our experiment had no such weights, so it says nothing of "
            "this merge."
        )
    if power == 0:
        return f"Norms are {about}{times(disparity)} to 1 apart, which power 0 ignores."
    experience = (
        "Up to 2 to 1, MetaGPT and the plain average were close in our experiment on "
        "small models: MetaGPT was better in 7 of 9 comparisons, by 0.003 on average. "
        "At such ratios on Gemma 3 270M, the average was better in 21 of 21."
    )
    # What is said depends on the ratio that is shown.
    disparity = _rounded(disparity)
    if disparity > APART_NORMS:
        experience = (
            "Above 2 to 1, MetaGPT was worse than the plain average in 16 of 18 "
            "comparisons of our experiment on small models, and power: 1 was better "
            "than MetaGPT in 18 of 18. At such ratios on Gemma 3 270M, MetaGPT was "
            "worse than the average in 3 of 6, and power: 1 was better than MetaGPT "
            "in 6 of 6."
        )
        if power == 2:
            experience += " Try power: 1 and power: 0."
    farther = ""
    if disparity > FARTHEST_TRIED:
        farther = f", farther than any that we tried (at most {FARTHEST_TRIED} to 1)"
    return f"Norms are {about}{times(disparity)} to 1 apart{farther}. {experience}"


def cosine_reading(
    models: Sequence[Hashable],
    cosines: Sequence[Sequence[float]] | None,
    *,
    about: str = "",
) -> str:
    """Explain the cosines between task vectors.

    Args:
        models: the K models.
        cosines: shape `(K, K)`, NaN for a model that equals the base; None if they
            were not measured.
        about: stands before a cosine, if it is an estimate.

    Returns:
        one or two sentences.
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
        most = (
            f"at most {about}{abs(value):.2f}" if abs(value) >= 0.005 else "below 0.01"
        )
        return (
            f"Near orthogonal ({most}), as the paper assumes: what "
            "one model learned hardly overlaps with the others."
        )
    if abs(value) <= SLIGHT:
        way = f"are slightly {'similar' if value > 0 else 'opposed'}"
    elif value > 0:
        way = "share a direction: part of what they learned is the same"
    else:
        way = "point against each other: what one learned, the other undoes in part"
    return (
        f"{models[column]} and {models[row]} {way} (cosine {about}{value:+.2f}). The "
        "paper assumes values near 0; the coefficients do not depend on them."
    )
