"""Works out the single figures that the sentences of docs/evaluation.md quote."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from checks import pair_curve, rank_agreement
from real_results import RULES, comparisons, judged, of_all_seeds, real
from results import GROUPS, Averages, Results
from tables import signed, wins


def _mixtures(results: Results, name: str) -> list[str]:
    """List the mixtures of a group, or the one mixture of that name."""
    if any(name in group for group in GROUPS.values()):
        mixtures = [name] if name in results.mixtures else []
    else:
        mixtures = results.group(name)
    # `run.py --tiny` has a single mixture, which stands in for all others.
    return mixtures or results.gentle


def _mean(results: Results, one: str, other: str, group: str) -> str:
    pairs = results.differences(one, other, _mixtures(results, group))
    return signed(fmean(pairs))


def _wins(results: Results, one: str, other: str, group: str) -> str:
    return wins(results.differences(one, other, _mixtures(results, group)))


def _percent(results: Results, one: str, other: str, group: str) -> str:
    mixtures = _mixtures(results, group)
    pairs = results.differences(one, other, mixtures)
    whole = fmean(ald for m in mixtures for ald in results.over_seeds(m, other))
    return f"{100 * fmean(pairs) / whole:+.0f}%"


def _cosine(results: Results, group: str) -> str:
    cosines = [
        cosine
        for mixture in _mixtures(results, group)
        for cosine in results.cosines(mixture)
    ]
    return f"{fmean(cosines):.2f}"


def _share(results: Results, first: str, second: str) -> str:
    sq_norms = [
        [results.models[seed, name]["sq_norm"] for name in (first, second)]
        for seed in results.seeds
    ]
    return f"{fmean(n / (n + m) for n, m in sq_norms):.2f}"


def _best(results: Results, first: str, second: str) -> str:
    curves = [pair_curve(results, seed, (first, second)) for seed in results.seeds]
    best = [min(curve, key=lambda point: point[1]) for curve in curves]
    return f"{fmean(share for share, _ in best):.2f}"


def _averages(results: Results, method: str) -> list[Averages]:
    return [
        results.averages(seed, mixture, method)
        for mixture in results.gentle
        for seed in results.seeds
    ]


def _score(results: Results, method: str, kind: str) -> str:
    return f"{fmean(getattr(a, kind) for a in _averages(results, method)):.1f}"


def _higher(results: Results, one: str, other: str, kind: str) -> str:
    pairs = zip(_averages(results, one), _averages(results, other), strict=True)
    higher = [getattr(a, kind) > getattr(b, kind) for a, b in pairs]
    return f"{sum(higher)} of {len(higher)}"


def _embeddings(results: Results, model: str) -> str:
    records = [results.models[seed, model] for seed in results.seeds]
    return f"{100 * fmean(r['of_embeddings'] / r['sq_norm'] for r in records):.0f}%"


def _general(results: Results, model: str) -> str:
    return f"{fmean(results.models[s, model]['loss'][0] for s in results.seeds):.2f}"


def _rank(results: Results, kind: str, group: str) -> str:
    ranks = [
        rank_agreement(results, seed, mixture, kind)
        for mixture in _mixtures(results, group)
        for seed in results.seeds
    ]
    return f"{fmean(ranks):.2f}"


def _bend(results: Results, model: str) -> str:
    bends = [r["bend"][2] for r in results.raw["bends"] if r["model"] == model]
    return f"{100 * fmean(bends):.0f}%"


def _real_mean(_: Results, one: str, other: str, group: str) -> str:
    return signed(fmean(of_all_seeds(one, other, group)))


def _real_lower(_: Results, one: str, other: str, group: str) -> str:
    return wins(of_all_seeds(one, other, group))


def _real_loss(_: Results, model: str, domain: str) -> str:
    return f"{fmean(real().models[model]['loss'][domain]):.2f}"


def _judged(results: Results, rule: str, limit: str, family: str) -> tuple[str, float]:
    pairs = comparisons(results)[family]
    right, gain = judged(pairs, RULES[rule].statistic, float(limit))
    return f"{right} of {len(pairs)}", gain


def _beyond(results: Results, rule: str, limit: str, family: str) -> str:
    statistic = RULES[rule].statistic
    pairs = comparisons(results)[family]
    return wins([d for n, d in pairs if statistic(n) > float(limit)])


def _right(results: Results, rule: str, limit: str, family: str) -> str:
    return _judged(results, rule, limit, family)[0]


def _gain(results: Results, rule: str, limit: str, family: str) -> str:
    return signed(_judged(results, rule, limit, family)[1])


_KINDS: dict[str, Callable[..., str]] = {
    "mean": _mean,
    "wins": _wins,
    "percent": _percent,
    "cosine": _cosine,
    "share": _share,
    "best": _best,
    "score": _score,
    "higher": _higher,
    "embeddings": _embeddings,
    "general": _general,
    "rank": _rank,
    "bend": _bend,
    "real-mean": _real_mean,
    "real-lower": _real_lower,
    "real-loss": _real_loss,
    "beyond": _beyond,
    "right": _right,
    "gain": _gain,
}


def value(results: Results, key: str) -> str:
    """Work out one figure.

    A group in a key is a mixture, `gentle` or a key of `GROUPS`.

    Args:
        results: where the figure comes from.
        key: words separated by slashes:

            - `mean`, `wins` or `percent`, two methods, a group: ALD(one) - ALD(other),
              its mean, how often it is negative, or its mean in percent of ALD(other);
            - `score`, a method, a field of `Averages`: its mean;
            - `higher`, two methods, such a field: how often the first is higher;
            - `cosine`, a group: mean cosine between task vectors;
            - `rank`, `bound` or `quadratic`, a group: rank correlation with ALD;
            - `bend`, a model: how far its outputs leave the line halfway;
            - `share` or `best`, two models: MetaGPT's share of the first, or the best;
            - `embeddings`, a model: their part of n_t;
            - `general`, a model: its loss on that domain;
            - `real-mean` or `real-lower`, two methods, a group of `RealResults`: as
              `mean` and `wins`, on Gemma 3 270M;
            - `real-loss`, a model of Gemma 3 270M, a domain: its loss;
            - `right` or `gain`, one of `RULES`, a limit, `real` or `small`: `judged`;
            - `beyond`, the same: how often MetaGPT is lower beyond the limit.

    Returns:
        the figure as it is printed.

    Raises:
        KeyError: the key starts with another word.
    """
    kind, *words = key.split("/")
    return _KINDS[kind](results, *words)
