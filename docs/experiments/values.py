"""Works out the single figures that the prose of docs/evaluation.md quotes."""

from __future__ import annotations

from statistics import fmean

from checks import pair_curve, rank_agreement
from results import GROUPS, Results
from tables import signed, wins


def _group(found: Results, name: str) -> list[str]:
    """List the mixtures of a group, or the one mixture of that name."""
    if any(name in group for group in GROUPS.values()):
        wanted = [name] if name in found.mixtures else []
    else:
        wanted = found.group(name)
    # The tiny run has one mixture, which stands in for those that it lacks.
    return wanted or found.gentle


def _compared(found: Results, what: str, one: str, other: str, group: str) -> str:
    mixtures = _group(found, group)
    pairs = found.differences(one, other, mixtures)
    if what == "mean":
        return signed(fmean(pairs))
    if what == "wins":
        return wins(pairs)
    assert what == "percent"
    whole = fmean(found.ald[s, m, other] for m in mixtures for s in found.seeds)
    return f"{100 * fmean(pairs) / whole:+.0f} %"


def _cosine(found: Results, group: str) -> str:
    names = list(found.raw["setting"]["specialists"])
    values = []
    for mixture in _group(found, group):
        at = [names.index(model) for model in found.mixtures[mixture]]
        for record in found.raw["angles"]:
            values += [record["cosines"][i][j] for i in at for j in at if i < j]
    return f"{fmean(values):.2f}"


def _pair(found: Results, what: str, first: str, second: str) -> str:
    """Average over seeds what MetaGPT's share and the best share of a pair are."""
    figures = []
    for seed in found.seeds:
        n, m = (found.models[seed, name]["sq_norm"] for name in (first, second))
        curve = pair_curve(found, seed, (first, second))
        best = min(curve, key=lambda point: point[1])[0]
        figures.append({"share": n / (n + m), "best": best}[what])
    return f"{fmean(figures):.2f}"


def _score(found: Results, method: str, kind: str) -> str:
    values = [
        getattr(found.averages(seed, mixture, method), kind)
        for mixture in found.gentle
        for seed in found.seeds
    ]
    return f"{fmean(values):.1f}"


def _higher(found: Results, one: str, other: str, kind: str) -> str:
    pairs = [
        (found.averages(seed, mixture, one), found.averages(seed, mixture, other))
        for mixture in found.gentle
        for seed in found.seeds
    ]
    higher = sum(getattr(a, kind) > getattr(b, kind) for a, b in pairs)
    return f"{higher} of {len(pairs)}"


def _of_model(found: Results, what: str, model: str) -> str:
    own = [found.models[seed, model] for seed in found.seeds]
    if what == "embeddings":
        share = fmean(record["of_embeddings"] / record["sq_norm"] for record in own)
        return f"{100 * share:.0f} %"
    assert what == "general"
    return f"{fmean(record['loss'][0] for record in own):.2f}"


def _rank(found: Results, kind: str, group: str) -> str:
    ranks = [
        rank_agreement(found, seed, mixture, kind)
        for mixture in _group(found, group)
        for seed in found.seeds
    ]
    return f"{fmean(ranks):.2f}"


def _bend(found: Results, model: str) -> str:
    bends = [r["bend"][2] for r in found.raw["bends"] if r["model"] == model]
    return f"{100 * fmean(bends):.0f} %"


def value(found: Results, name: str) -> str:
    """Work out one figure of the prose.

    Args:
        found: the results.
        name: words separated by slashes. `mean`, `wins` or `percent`, two methods and
            a group: of ALD(one) - ALD(other). A group is a mixture, `gentle` or a key
            of `GROUPS`. `score`, a method and a field of `Averages`; `higher`, two
            methods and such a field: how often the first scores higher. `cosine` and a
            group; `rank`, `bound` or `quadratic`, and a group; `bend` and a model;
            `share` or `best` and two models; `embeddings` (their part of n_t) or
            `general` (the loss on that domain) and a model.

    Returns:
        the figure as it is printed.

    Raises:
        KeyError: there is no such figure.
    """
    what, *rest = name.split("/")
    if what in ("mean", "wins", "percent"):
        return _compared(found, what, *rest)
    if what in ("share", "best"):
        return _pair(found, what, *rest)
    if what in ("embeddings", "general"):
        return _of_model(found, what, *rest)
    figures = {
        "score": _score,
        "higher": _higher,
        "cosine": _cosine,
        "rank": _rank,
        "bend": _bend,
    }
    return figures[what](found, *rest)
