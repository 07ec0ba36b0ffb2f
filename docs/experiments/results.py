"""Reads results.json and derives what the tables show; needs no torch, no models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from corpora import ANSWER_AFTER

# Groups of similar mixtures; all but `harsh` are of the gentle regime.
GROUPS = {
    "equal": ("two equal", "three equal", "four equal"),
    "mixed": ("four, one slow", "code long", "one LoRA", "one fast LoRA"),
    "narrow": ("arithmetic long", "markup long"),
    "harsh": ("harsh",),
}
GRID_PREFIX = "task arithmetic "
ORACLE = "task arithmetic, best of grid"
Key = tuple[int, str, str]  # seed, mixture, method


@dataclass(frozen=True)
class Averages:
    """Averages of one merge over the tasks of its mixture, as in the paper.

    Attributes:
        absolute: of the scores, percent.
        normalised: of score / score of the task's specialist, percent.
        exact: of the scores that are exact matches, percent; None if there is none.
    """

    absolute: float
    normalised: float
    exact: float | None


def correlation(xs: list[float], ys: list[float]) -> float:
    """Compute Spearman's rank correlation; equal values get their mean rank."""
    ranks = []
    for values in map(np.asarray, (xs, ys)):
        below = (values[:, None] > values).sum(1)
        ranks.append(below + (values[:, None] == values).sum(1) / 2)
    return float(np.corrcoef(*ranks)[0, 1])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [
        "| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Results:
    """The records of one experiment, and what follows from them."""

    raw: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that run.py wrote."""
        return cls(json.loads(path.read_text()))

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the order of the records' lists."""
        return self.raw["setting"]["domains"]

    @property
    def mixtures(self) -> dict[str, list[str]]:
        """Names of the models of each mixture."""
        return self.raw["setting"]["mixtures"]

    def group(self, name: str) -> list[str]:
        """List the mixtures of a group that were run; `gentle` is all but `harsh`."""
        if name == "gentle":
            return [each for each in self.mixtures if each not in GROUPS["harsh"]]
        return [each for each in self.mixtures if each in GROUPS[name]]

    @property
    def gentle(self) -> list[str]:
        """Mixtures of the gentle regime."""
        return self.group("gentle")

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds that were run."""
        return sorted({record["seed"] for record in self.raw["models"]})

    @cached_property
    def models(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Records of base and specialists by seed and name."""
        return {(r["seed"], r["model"]): r for r in self.raw["models"]}

    @cached_property
    def merges(self) -> dict[Key, dict[str, Any]]:
        """Records of merges by seed, mixture and method."""
        return {(r["seed"], r["mixture"], r["method"]): r for r in self.raw["merges"]}

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods, without the oracle."""
        return list(dict.fromkeys(r["method"] for r in self.raw["merges"]))

    def domain(self, model: str) -> int:
        """Return the index of a specialist's domain."""
        name = self.raw["setting"]["specialists"][model]["domain"]
        return self.domains.index(name)

    def difference(self, seed: int, models: list[str], loss: list[float]) -> float:
        """Compute ALD: the mean over tasks of L_t(merged) - L_t(theta_t)."""
        return fmean(
            loss[self.domain(name)] - self.models[seed, name]["loss"][self.domain(name)]
            for name in models
        )

    @cached_property
    def ald(self) -> dict[Key, float]:
        """ALD of every merge, of the base and of the oracle."""
        ald = {}
        for (seed, mixture, method), record in self.merges.items():
            models = self.mixtures[mixture]
            ald[seed, mixture, method] = self.difference(seed, models, record["loss"])
        for seed in self.seeds:
            for mixture, models in self.mixtures.items():
                loss = self.models[seed, "base"]["loss"]
                ald[seed, mixture, "base"] = self.difference(seed, models, loss)
                best = self.oracle(ald, seed, mixture)
                ald[seed, mixture, ORACLE] = ald[seed, mixture, best]
        return ald

    def oracle(self, ald: dict[Key, float], seed: int, mixture: str) -> str:
        """Name task arithmetic at the weight of the grid with the lowest ALD."""
        grid = [name for name in self.methods if name.startswith(GRID_PREFIX)]
        return min(grid, key=lambda name: ald[seed, mixture, name])

    def over_seeds(self, mixture: str, method: str) -> list[float]:
        """List the ALD of each seed."""
        return [self.ald[seed, mixture, method] for seed in self.seeds]

    def differences(self, one: str, other: str, mixtures: list[str]) -> list[float]:
        """List ALD(one) - ALD(other) by mixture and seed; negative favours `one`."""
        return [
            self.ald[seed, mixture, one] - self.ald[seed, mixture, other]
            for mixture in mixtures
            for seed in self.seeds
        ]

    def cosines(self, mixture: str) -> list[float]:
        """List the cosines between the task vectors of a mixture, pairs and seeds."""
        names = list(self.raw["setting"]["specialists"])
        at = [names.index(model) for model in self.mixtures[mixture]]
        return [
            record["cosines"][i][j]
            for record in self.raw["angles"]
            for i in at
            for j in at
            if i < j
        ]

    def averages(self, seed: int, mixture: str, method: str) -> Averages:
        """Compute the paper's averages over the tasks of a mixture.

        Args:
            seed: one of `seeds`.
            mixture: one of `mixtures`.
            method: one of `methods`, or `base`, or the oracle.

        Returns:
            the averages.
        """
        if method == ORACLE:
            method = self.oracle(self.ald, seed, mixture)
        record = self.merges.get((seed, mixture, method))
        score = (record or self.models[seed, "base"])["score"]
        absolute, normalised, exact = [], [], []
        for model in self.mixtures[mixture]:
            k = self.domain(model)
            own = self.models[seed, model]["score"][k]
            absolute.append(100 * score[k])
            normalised.append(100 * score[k] / own if own else float("nan"))
            if self.domains[k] in ANSWER_AFTER:
                exact.append(100 * score[k])
        return Averages(
            fmean(absolute), fmean(normalised), fmean(exact) if exact else None
        )
