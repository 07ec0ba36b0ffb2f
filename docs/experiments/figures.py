"""Draws the figures of docs/evaluation.md from the results; needs no model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from checks import pair_curve
from results import Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

METHODS = (
    "base",
    "task arithmetic 0.3",
    "ties",
    "dare linear",
    "sce",
    "model stock",
    "metagpt",
    "metagpt tensor",
    "metagpt power 1",
    "metagpt power -1",
    "metagpt exclude",
)
# Marks differ in shape and darkness, so that the figure works without colour.
MARKS = {
    "equal": ("o", "#08306b"),
    "mixed": ("^", "#e6550d"),
    "narrow": ("X", "black"),
    "harsh": ("s", "#a9c7e3"),
}
STARS = {"metagpt": "*", "average": "P"}
LINES = ("-", "--", ":", "-.")
SHADES = ("#08306b", "#e6550d", "#74a9cf", "#636363")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def differences(results: Results, path: Path) -> None:
    """Each method minus the plain average: one mark per mixture and seed."""
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    groups = [group for group in MARKS if results.group(group)]
    for row, method in enumerate(METHODS):
        for k, group in enumerate(groups):
            xs = results.differences(method, "average", results.group(group))
            ys = [row + (k - (len(groups) - 1) / 2) * 0.2] * len(xs)
            shape, shade = MARKS[group]
            label = group if row == 0 else None
            axis.plot(xs, ys, shape, ms=5, color=shade, alpha=0.75, label=label)
        if row:
            axis.axhline(row - 0.5, color="0.85", lw=0.6)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xscale("symlog", linthresh=0.02, linscale=0.8)
    ticks = [-0.1, -0.02, 0, 0.02, 0.1, 0.5]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks(range(len(METHODS)), METHODS)
    axis.set_ylim(len(METHODS) - 0.5, -0.5)
    axis.set_xlabel("ALD minus that of the plain average, nats (left is better)")
    axis.legend(title="mixtures", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def shares(results: Results, path: Path) -> None:
    """ALD along the line between two specialists, with MetaGPT's share."""
    pairs = list(dict.fromkeys(tuple(r["pair"]) for r in results.raw["pairs"]))
    figure, axes = plt.subplots(
        1, len(pairs), figsize=(10.5, 3.6), layout="constrained"
    )
    for axis, (first, second) in zip(axes, pairs, strict=True):
        for k, seed in enumerate(results.seeds):
            curve = pair_curve(results, seed, (first, second))
            xs, ys = zip(*curve, strict=True)
            n, m = (results.models[seed, name]["sq_norm"] for name in (first, second))
            look = {"color": SHADES[k % 4], "ls": LINES[k % 4]}
            axis.plot(xs, ys, label=f"seed {seed}", **look)
            at = n / (n + m)
            axis.plot(at, np.interp(at, xs, ys), "*k", ms=12)
            axis.plot(xs[ys.index(min(ys))], min(ys), "ok", ms=6, mfc="white")
        axis.axvline(0.5, color="grey", lw=0.8)
        axis.set_xlabel(f"share of {first}\n(rest: {second})", fontsize=9)
    axes[0].set_ylabel("ALD of the two, nats")
    axes[0].plot([], [], "*k", ms=9, label="MetaGPT")
    axes[0].plot([], [], "ok", mfc="white", label="lowest")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def straightness(results: Results, path: Path) -> None:
    """How far outputs and losses are from a straight line along theta_0 + alpha tau."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = dict.fromkeys(record["model"] for record in results.raw["bends"])
    for k, (name, shape) in enumerate(zip(names, "o^sXDv", strict=True)):
        records = [r for r in results.raw["bends"] if r["model"] == name]
        alphas = records[0]["alpha"]
        bends = 100 * np.mean([r["bend"] for r in records], axis=0)
        losses = np.mean([r["loss"] for r in records], axis=0)
        look = {"color": SHADES[k % 4], "ls": LINES[k // 4], "marker": shape, "ms": 5}
        axes[0].plot(alphas, bends, label=name, **look)
        axes[1].plot(alphas, losses - losses[0], **look)
    axes[0].set_ylabel("logits' distance from the line, %")
    axes[1].set_ylabel("loss minus the base's, nats")
    for axis in axes:
        axis.set_xlabel("alpha")
    figure.legend(loc="outside center right")
    _save(figure, path)


def ranking(results: Results, path: Path) -> None:
    """The exact quadratic against ALD, all methods of three mixtures."""
    names = ("three equal", "markup long", "harsh")
    mixtures = [name for name in names if name in results.mixtures]
    mixtures = mixtures or results.gentle[:1]
    figure, grid = plt.subplots(
        1, len(mixtures), figsize=(10.5, 3.6), squeeze=False, layout="constrained"
    )
    axes = grid[0]
    for axis, mixture in zip(axes, mixtures, strict=True):
        for method in results.methods:
            records = [results.merges[s, mixture, method] for s in results.seeds]
            x = fmean(r["quadratic"] for r in records)
            y = fmean(results.over_seeds(mixture, method))
            shape, look = "o", {"mfc": "white", "mec": "#08306b", "ms": 5}
            if method.startswith("metagpt"):
                shape, look = "^", {"color": "#e6550d", "ms": 5}
            if method in STARS:
                shape, look = STARS[method], {"color": "black", "ms": 11, "zorder": 3}
            axis.plot(x, y, shape, **look)
        axis.set_title(mixture, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks([0.3, 0.5, 1, 2, 3], ["0.3", "0.5", "1", "2", "3"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("sum n_t ||tau - tau_t||² / sum n_t²", fontsize=9)
    axes[0].set_ylabel("ALD, nats")
    for method, shape in STARS.items():
        axes[0].plot([], [], shape, color="black", ms=8, label=method)
    axes[0].plot([], [], "^", color="#e6550d", label="other metagpt")
    axes[0].plot([], [], "o", mfc="white", mec="#08306b", label="other methods")
    axes[0].legend(fontsize=8)
    _save(figure, path)


FIGURES = {
    "differences.png": differences,
    "shares.png": shares,
    "straightness.png": straightness,
    "ranking.png": ranking,
}
