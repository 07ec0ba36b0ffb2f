"""Reads real_model.json and derives what the page shows; needs no torch, no models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from results import Results, table

PATH = Path(__file__).resolve().parent / "real_model.json"
# Mixtures of models trained for equally many steps, and all others.
EQUAL = (
    "two equal",
    "three equal",
    "code and worked",
    "code, worked, german",
)
HEADLINE = ("average", "metagpt", "power 1")


@dataclass(frozen=True)
class RealResults:
    """The records of one seed on Gemma 3 270M, and what follows from them."""

    setting: dict[str, Any]
    raw: dict[str, Any]

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """Records of base and specialists by name."""
        return {record["model"]: record for record in self.raw["models"]}

    @cached_property
    def merges(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Records of merges by mixture and method."""
        return {(r["mixture"], r["method"]): r for r in self.raw["merges"]}

    @property
    def mixtures(self) -> dict[str, list[str]]:
        """Names of the models of each mixture."""
        return self.setting["mixtures"]

    @property
    def methods(self) -> list[str]:
        """Names of all methods."""
        return list(dict.fromkeys(r["method"] for r in self.raw["merges"]))

    def of_group(self, group: str) -> list[str]:
        """List mixtures: `equal`, `unequal` or `all`; or one by its name."""
        if group in self.mixtures:
            return [group]
        return [
            name
            for name in self.mixtures
            if group == "all" or (name in EQUAL) == (group == "equal")
        ]

    @cached_property
    def domains(self) -> dict[str, str]:
        """The domain of each specialist."""
        return {
            name: plan["domain"]
            for plan in self.setting["plans"]
            for name in plan["steps"]
        }

    def chunks(self, mixture: str, method: str) -> np.ndarray:
        """Loss above the specialists', shape `(models, chunks)`."""
        merged = (
            self.models["base"]["loss"]
            if method == "base"
            else self.merges[mixture, method]["loss"]
        )
        return np.array(
            [
                np.subtract(
                    merged[self.domains[name]],
                    self.models[name]["loss"][self.domains[name]],
                )
                for name in self.mixtures[mixture]
            ]
        )

    def ald(self, mixture: str, method: str) -> float:
        """Compute ALD, nats per token."""
        return float(self.chunks(mixture, method).mean())

    def has(self, mixture: str, *methods: str) -> bool:
        """Tell whether a mixture was merged by all these methods."""
        return all(m == "base" or (mixture, m) in self.merges for m in methods)

    def difference(self, mixture: str, one: str, other: str) -> tuple[float, float]:
        """Compute ALD(one) - ALD(other) and its standard error over chunks of text."""
        pairs = self.chunks(mixture, one) - self.chunks(mixture, other)
        errors = pairs.std(axis=1, ddof=1) / np.sqrt(pairs.shape[1])
        return float(pairs.mean()), float(np.sqrt((errors**2).sum()) / len(pairs))

    def differences(self, one: str, other: str, group: str) -> list[float]:
        """List ALD(one) - ALD(other) for the mixtures of a group that have both."""
        return [
            self.difference(mixture, one, other)[0]
            for mixture in self.of_group(group)
            if self.has(mixture, one, other)
        ]

    def norms(self, mixture: str) -> list[float]:
        """List n_t of a mixture."""
        return [self.models[name]["sq_norm"] for name in self.mixtures[mixture]]


@cache
def all_seeds() -> tuple[RealResults, ...]:
    """Read the committed results of all seeds; only the first has all methods."""
    found = json.loads(PATH.read_text())
    return tuple(RealResults(found["setting"], raw) for raw in found["seeds"])


def real() -> RealResults:
    """Read the committed results of the first seed."""
    return all_seeds()[0]


@cache
def repeated() -> RealResults:
    """Read the first seed once more, trained again: other mixtures by all methods."""
    committed = json.loads(PATH.read_text())
    return RealResults(committed["setting"], committed["repeated"][0])


def of_all_seeds(one: str, other: str, group: str) -> list[float]:
    """List ALD(one) - ALD(other) for the mixtures of a group, seed by seed.

    Where the first seed lacks a merge, that of the repeated one comes last.
    """
    values = [
        value
        for results in all_seeds()
        for value in results.differences(one, other, group)
    ]
    for mixture in real().of_group(group):
        if not real().has(mixture, one, other):
            values += repeated().differences(one, other, mixture)
    return values


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.3f}"


def lower(values: list[float]) -> str:
    """Count the comparisons in which the first is lower, that is better."""
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def lambdas(sq_norms: list[float]) -> list[float]:
    """Compute MetaGPT's coefficients."""
    return [n / sum(sq_norms) for n in sq_norms]


def headline(results: RealResults) -> str:
    """MetaGPT and `power: 1` against the plain average, mixture by mixture."""
    others = [other for other in all_seeds() if other is not results]
    rows = []
    for mixture, names in results.mixtures.items():
        shares = lambdas(results.norms(mixture))
        cells = [f"{results.ald(mixture, 'average'):.3f}"]
        for method in HEADLINE[1:]:
            mean, error = results.difference(mixture, method, "average")
            cells.append(f"{signed(mean)} ± {error:.3f}")
            again = [at.difference(mixture, method, "average")[0] for at in others]
            cells.append(", ".join(map(signed, again)))
        each = ", ".join(f"{n} {x:.2f}" for n, x in zip(names, shares, strict=True))
        rows.append([mixture, each, *cells])
    head = ["mixture", "models and lambda", "average's ALD", "MetaGPT", "other seeds"]
    return table([*head, "power 1", "other seeds"], rows)


def methods(results: RealResults) -> str:
    """Each method against the plain average."""
    rows = []
    for method in ("base", *(m for m in results.methods if m != "average")):
        cells = []
        for group in ("equal", "unequal"):
            pairs = of_all_seeds(method, "average", group)
            cells.append(
                f"{signed(fmean(pairs))} ({lower(pairs)}, worst {signed(max(pairs))})"
                if pairs
                else ""
            )
        rows.append([method, *cells])
    return table(["method minus the average", "trained alike", "unequal"], rows)


def family(results: RealResults) -> str:
    """Base and specialists, each on its own domain."""
    rows = []
    base = results.models["base"]
    for plan in results.setting["plans"]:
        for name, steps in plan["steps"].items():
            own, domain = results.models[name], plan["domain"]
            kind = f"LoRA, rank {plan['lora_rank']}" if plan["lora_rank"] else "full"
            rows.append(
                [
                    name,
                    f"{kind}, {steps} steps at {plan['rate']:g}",
                    f"{own['sq_norm']:.3g}",
                    f"{100 * own['of_embeddings'] / own['sq_norm']:.0f}%",
                    *(f"{fmean(m['loss'][domain]):.3f}" for m in (base, own)),
                    *(f"{100 * fmean(m['right'][domain]):.0f}" for m in (base, own)),
                ]
            )
    head = ["model", "training", "n_t", "of it embeddings", "base's loss", "loss"]
    return table([*head, "base's right tokens, percent", "right tokens"], rows)


# ---- when MetaGPT was lower than the average, by what can be known beforehand


def ratio(sq_norms: list[float]) -> float:
    """Compute the largest ||tau_t|| divided by the smallest."""
    return (max(sq_norms) / min(sq_norms)) ** 0.5


def gamma(sq_norms: list[float]) -> float:
    """Compute ACE's gamma, Var_t(log n_t) / mean_t(log n_t)^2 (arXiv 2603.02945)."""
    logs = np.log(sq_norms)
    return float(logs.var() / logs.mean() ** 2)


def excess(sq_norms: list[float]) -> float:
    """Compute the largest lambda times the number of models; 1 if all are equal."""
    return max(lambdas(sq_norms)) * len(sq_norms)


Statistic = Callable[[list[float]], float]


@dataclass(frozen=True)
class Rule:
    """Take MetaGPT if a statistic of the squared norms is at most a limit."""

    words: str
    statistic: Statistic
    limits: tuple[float, ...]


RULES = {
    "ratio": Rule("largest norm / smallest norm", ratio, (1.2, 1.5, 2.0)),
    "lambda": Rule("largest lambda x models", excess, (1.2, 1.4, 1.6)),
    "gamma": Rule("gamma", gamma, (0.01, 0.03, 0.1, 0.3)),
}
Comparison = tuple[list[float], float]  # n_t, and ALD(MetaGPT) - ALD(average)


def comparisons(small: Results) -> dict[str, list[Comparison]]:
    """List the comparisons of both families; of the small one without `harsh`."""
    of_real = [
        (results.norms(mixture), results.difference(mixture, "metagpt", "average")[0])
        for results in all_seeds()
        for mixture in results.mixtures
    ]
    of_small = [
        (
            [small.models[seed, name]["sq_norm"] for name in small.mixtures[mixture]],
            small.ald[seed, mixture, "metagpt"] - small.ald[seed, mixture, "average"],
        )
        for mixture in small.gentle
        for seed in small.seeds
    ]
    return {"real": of_real, "small": of_small}


def judged(
    pairs: list[Comparison], statistic: Statistic, limit: float
) -> tuple[int, float]:
    """Judge the rule: MetaGPT if the statistic is at most `limit`, else the average.

    Returns:
        in how many comparisons it names the better of the two, and the mean of
        ALD(chosen) - ALD(average).
    """
    right, gains = 0, []
    for sq_norms, difference in pairs:
        takes = statistic(sq_norms) <= limit
        right += takes == (difference < 0)
        gains.append(difference if takes else 0.0)
    return right, fmean(gains)


def thresholds(small: Results) -> str:
    """How often each rule names the better of MetaGPT and the average."""
    families = comparisons(small)
    rows = []
    rules: list[tuple[str, Statistic, float]] = [
        ("always MetaGPT", ratio, float("inf")),
        ("always the average", ratio, 0.0),
    ]
    for rule in RULES.values():
        for limit in rule.limits:
            rules.append((f"{rule.words} at most {limit:g}", rule.statistic, limit))
    for label, statistic, limit in rules:
        cells = []
        for pairs in families.values():
            right, gain = judged(pairs, statistic, limit)
            cells += [f"{right} of {len(pairs)}", signed(gain)]
        rows.append([label, *cells])
    head = ["MetaGPT if", "right, Gemma 3 270M", "ALD minus the average's"]
    return table([*head, "right, small models", head[-1]], rows)
