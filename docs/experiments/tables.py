"""Turns results into the tables of docs/evaluation.md and tables.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import numpy as np
import real_results
from checks import angles, bounds, family, linearity, pairs, regime
from real_results import real
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
    """Count the comparisons in which the first is lower, that is better."""
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def headline(results: Results) -> str:
    """MetaGPT against the plain average, mixture by mixture."""
    rows = []
    for mixture in results.mixtures:
        pairs = results.differences("metagpt", "average", [mixture])
        rows.append(
            [
                mixture,
                spread(results.over_seeds(mixture, "average")),
                spread(results.over_seeds(mixture, "metagpt")),
                signed(fmean(pairs)),
                ", ".join(signed(pair) for pair in pairs),
                wins(pairs),
            ]
        )
    head = ["mixture", "average", "MetaGPT", "difference", "each seed", "MetaGPT lower"]
    return table(head, rows)


def groups(results: Results) -> str:
    """Each method against the plain average, group by group of mixtures."""
    kept = [name for name in GROUPS if results.group(name)]
    rows = []
    for method in ("base", *BASELINES[1:], *VARIANTS):
        cells = []
        for group in kept:
            pairs = results.differences(method, "average", results.group(group))
            cells.append(f"{signed(fmean(pairs))} ({wins(pairs)})")
        rows.append([method, *cells])
    return table(["method minus the average", *kept], rows)


def _by_mixture(results: Results, methods: tuple[str, ...]) -> str:
    rows = []
    for method in methods:
        cells = [
            f"{fmean(results.over_seeds(m, method)):.3f}" for m in results.mixtures
        ]
        rows.append([method, *cells])
    return table(["method", *results.mixtures], rows)


def baselines(results: Results) -> str:
    """ALD of the base, the other methods and MetaGPT, means over seeds."""
    return _by_mixture(results, ("base", *BASELINES, "metagpt"))


def variants(results: Results) -> str:
    """ALD under MetaGPT's parameters, means over seeds."""
    return _by_mixture(results, ("average", *VARIANTS))


def every(results: Results) -> str:
    """ALD of every method with its spread over seeds."""
    rows = [
        [method, *(spread(results.over_seeds(m, method)) for m in results.mixtures)]
        for method in ("base", *results.methods, ORACLE)
    ]
    return table(["method", *results.mixtures], rows)


def paired(results: Results) -> str:
    """MetaGPT against each other method, over all mixtures of the gentle regime."""
    rows = []
    for method in (*BASELINES, *VARIANTS[1:]):
        pairs = results.differences("metagpt", method, results.gentle)
        cells = [signed(fmean(pairs)), signed(min(pairs)), signed(max(pairs))]
        rows.append([method, *cells, wins(pairs)])
    return table(["MetaGPT minus", "mean", "lowest", "highest", "MetaGPT lower"], rows)


def composed(results: Results) -> str:
    """Each composed method against the same method with equal weights."""
    rows = []
    for method in COMPOSED:
        pairs = results.differences(f"metagpt + {method}", method, results.gentle)
        alone = results.differences(f"metagpt + {method}", "metagpt", results.gentle)
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


def forgetting(results: Results) -> str:
    """Loss of merges on the base's own text, means over seeds."""
    base = fmean(results.models[seed, "base"]["loss"][0] for seed in results.seeds)
    rows = [["base", *([f"{base:.3f}"] * len(results.mixtures))]]
    for method in ("average", "ties", "dare linear", "metagpt", "metagpt power 1"):
        cells = [
            fmean(results.merges[seed, m, method]["loss"][0] for seed in results.seeds)
            for m in results.mixtures
        ]
        rows.append([method, *(f"{cell:.3f}" for cell in cells)])
    return table(["method", *results.mixtures], rows)


def coefficients(results: Results) -> str:
    """MetaGPT's coefficients, and what they change on each domain; means over seeds."""
    rows = []
    for mixture, models in results.mixtures.items():
        each = [results.merges[s, mixture, "metagpt"]["lambda"] for s in results.seeds]
        shares, changes = [], []
        for model, share in zip(models, np.mean(each, axis=0), strict=True):
            k = results.domain(model)
            change = fmean(
                results.merges[seed, mixture, "metagpt"]["loss"][k]
                - results.merges[seed, mixture, "average"]["loss"][k]
                for seed in results.seeds
            )
            shares.append(f"{model} {share:.2f}")
            changes.append(signed(change))
        rows.append([mixture, ", ".join(shares), ", ".join(changes)])
    return table(["mixture", "lambda", "MetaGPT minus average, loss of each"], rows)


def scores(results: Results) -> str:
    """The paper's averages over the gentle mixtures, percent, and MetaGPT's lead."""
    at = [(seed, mixture) for mixture in results.gentle for seed in results.seeds]
    own = [results.averages(*where, "metagpt") for where in at]
    rows = []
    for method in (
        "base",
        *BASELINES,
        *VARIANTS,
        *(f"metagpt + {m}" for m in COMPOSED),
    ):
        each = [results.averages(*where, method) for where in at]
        cells = []
        for kind in ("absolute", "normalised"):
            values = [getattr(averages, kind) for averages in each]
            by_seed = np.reshape(values, (len(results.gentle), -1)).mean(0).tolist()
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


def oracle_weights(results: Results) -> str:
    """The weights that the oracle selected."""
    rows = []
    for mixture, models in results.mixtures.items():
        best = [results.oracle(results.ald, seed, mixture) for seed in results.seeds]
        taken = [float(name.removeprefix(GRID_PREFIX)) for name in best]
        sums = [f"{weight * len(models):.1f}" for weight in taken]
        rows.append([mixture, ", ".join(map(str, taken)), ", ".join(sums)])
    return table(["mixture", "best weight, each seed", "times the models"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "real-headline": lambda _: real_results.headline(real()),
    "real-methods": lambda _: real_results.methods(real()),
    "real-family": lambda _: real_results.family(real()),
    "thresholds": real_results.thresholds,
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
