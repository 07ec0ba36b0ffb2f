"""Turns results into the tables of docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import numpy as np
from checks import angles, bounds, family, linearity, pairs, regime
from results import GRID_PREFIX, GROUPS, ORACLE, Results, table

BASELINES = (
    "average",
    "task arithmetic 0.3",
    ORACLE,
    "ties",
    "dare linear",
    "dare ties",
    "sce",
    "model stock",
)
VARIANTS = (
    "metagpt",
    "metagpt layer",
    "metagpt tensor",
    "metagpt power 1",
    "metagpt power 0",
    "metagpt power -1",
    "metagpt exclude",
    "metagpt weight",
    "metagpt lambda 1.5",
)
COMPOSED = (
    "ties",
    "dare linear",
    "dare ties",
    "breadcrumbs",
    "breadcrumbs ties",
    "della",
    "della linear",
)


def spread(values: list[float], digits: int = 3) -> str:
    """Write mean and standard deviation over seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.3f}"


def wins(values: list[float]) -> str:
    """Write in how many of the comparisons the first was lower (better)."""
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def headline(found: Results) -> str:
    """MetaGPT against the plain average, mixture by mixture."""
    rows = []
    for mixture in found.mixtures:
        pairs = found.differences("metagpt", "average", [mixture])
        rows.append(
            [
                mixture,
                spread(found.over_seeds(mixture, "average")),
                spread(found.over_seeds(mixture, "metagpt")),
                signed(fmean(pairs)),
                ", ".join(signed(pair) for pair in pairs),
                wins(pairs),
            ]
        )
    head = ["mixture", "average", "MetaGPT", "difference", "each seed", "MetaGPT lower"]
    return table(head, rows)


def groups(found: Results) -> str:
    """Each method against the plain average, group by group of mixtures."""
    kept = [name for name in GROUPS if found.group(name)]
    rows = []
    for method in ("base", *BASELINES[1:], *VARIANTS):
        cells = []
        for group in kept:
            pairs = found.differences(method, "average", found.group(group))
            cells.append(f"{signed(fmean(pairs))} ({wins(pairs)})")
        rows.append([method, *cells])
    return table(["method minus the average", *kept], rows)


def _by_mixture(found: Results, methods: tuple[str, ...]) -> str:
    rows = []
    for method in methods:
        cells = [f"{fmean(found.over_seeds(m, method)):.3f}" for m in found.mixtures]
        rows.append([method, *cells])
    return table(["method", *found.mixtures], rows)


def baselines(found: Results) -> str:
    """ALD of base, rivals and MetaGPT, means over seeds."""
    return _by_mixture(found, ("base", *BASELINES, "metagpt"))


def variants(found: Results) -> str:
    """ALD under MetaGPT's parameters, means over seeds."""
    return _by_mixture(found, ("average", *VARIANTS))


def every(found: Results) -> str:
    """ALD of every method with its spread over seeds."""
    rows = [
        [method, *(spread(found.over_seeds(m, method)) for m in found.mixtures)]
        for method in ("base", *found.methods, ORACLE)
    ]
    return table(["method", *found.mixtures], rows)


def paired(found: Results) -> str:
    """MetaGPT against each rival, all mixtures of the gentle regime together."""
    rows = []
    for method in (*BASELINES, *VARIANTS[1:]):
        pairs = found.differences("metagpt", method, found.gentle)
        cells = [signed(fmean(pairs)), signed(min(pairs)), signed(max(pairs))]
        rows.append([method, *cells, wins(pairs)])
    return table(["MetaGPT minus", "mean", "lowest", "highest", "MetaGPT lower"], rows)


def composed(found: Results) -> str:
    """Each composition against the same method with equal weights."""
    rows = []
    for method in COMPOSED:
        pairs = found.differences(f"metagpt + {method}", method, found.gentle)
        alone = found.differences(f"metagpt + {method}", "metagpt", found.gentle)
        rows.append(
            [
                method,
                signed(fmean(pairs)),
                f"{signed(min(pairs))} to {signed(max(pairs))}",
                wins(pairs),
                signed(fmean(alone)),
                wins(alone),
            ]
        )
    head = ["method", "with MetaGPT's weights minus with equal ones", "range", "lower"]
    return table([*head, "minus MetaGPT alone", "lower"], rows)


def forgetting(found: Results) -> str:
    """Loss of merges on the text that the base learnt, means over seeds."""
    base = fmean(found.models[seed, "base"]["loss"][0] for seed in found.seeds)
    rows = [["base", *([f"{base:.3f}"] * len(found.mixtures))]]
    for method in ("average", "ties", "dare linear", "metagpt", "metagpt power 1"):
        cells = [
            fmean(found.merges[seed, m, method]["loss"][0] for seed in found.seeds)
            for m in found.mixtures
        ]
        rows.append([method, *(f"{cell:.3f}" for cell in cells)])
    return table(["method", *found.mixtures], rows)


def coefficients(found: Results) -> str:
    """MetaGPT's coefficients, and what they change on each domain; means over seeds."""
    rows = []
    for mixture, models in found.mixtures.items():
        each = [found.merges[s, mixture, "metagpt"]["lambda"] for s in found.seeds]
        shares, changes = [], []
        for model, share in zip(models, np.mean(each, axis=0), strict=True):
            k = found.domain(model)
            change = fmean(
                found.merges[seed, mixture, "metagpt"]["loss"][k]
                - found.merges[seed, mixture, "average"]["loss"][k]
                for seed in found.seeds
            )
            shares.append(f"{model} {share:.2f}")
            changes.append(signed(change))
        rows.append([mixture, ", ".join(shares), ", ".join(changes)])
    return table(["mixture", "lambda", "MetaGPT minus average, loss of each"], rows)


def scores(found: Results) -> str:
    """The paper's averages over the gentle mixtures, percent, and MetaGPT's lead."""
    at = [(seed, mixture) for mixture in found.gentle for seed in found.seeds]
    own = [found.averages(*where, "metagpt") for where in at]
    rows = []
    for method in (
        "base",
        *BASELINES,
        *VARIANTS,
        *(f"metagpt + {m}" for m in COMPOSED),
    ):
        each = [found.averages(*where, method) for where in at]
        cells = []
        for kind in ("absolute", "normalised"):
            values = [getattr(averages, kind) for averages in each]
            by_seed = np.reshape(values, (len(found.gentle), -1)).mean(0).tolist()
            leads = [
                getattr(averages, kind) - value
                for averages, value in zip(own, values, strict=True)
            ]
            cells.append(spread(by_seed, 1))
            higher = sum(lead > 0 for lead in leads)
            cells.append(f"{fmean(leads):+.1f}, {higher} of {len(leads)}")
        exact = [a.exact for a in each if a.exact is not None]
        rows.append([method, *cells, f"{fmean(exact):.1f}"])
    head = ["method", "absolute", "MetaGPT's lead, higher"]
    return table([*head, "normalised", head[-1], "exact match alone"], rows)


def oracle_weights(found: Results) -> str:
    """The weights that the oracle took."""
    rows = []
    for mixture, models in found.mixtures.items():
        chosen = [found.oracle(found.ald, seed, mixture) for seed in found.seeds]
        taken = [float(name.removeprefix(GRID_PREFIX)) for name in chosen]
        sums = [f"{weight * len(models):.1f}" for weight in taken]
        rows.append([mixture, ", ".join(map(str, taken)), ", ".join(sums)])
    return table(["mixture", "best weight, each seed", "times the models"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "headline": headline,
    "groups": groups,
    "baselines": baselines,
    "paired": paired,
    "composed": composed,
    "variants": variants,
    "coefficients": coefficients,
    "pairs": pairs,
    "forgetting": forgetting,
    "oracle": oracle_weights,
    "scores": scores,
    "angles": angles,
    "linearity": linearity,
    "bounds": bounds,
    "family": family,
    "regime": regime,
    "every": every,
}
