"""Tables about the models: family, pilot, pairs, the assumptions, the bounds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
from results import Results, correlation, table


def family(results: Results) -> str:
    """Base and specialists on the specialist's domain, means over seeds."""
    rows = []
    for name, plan in results.raw["setting"]["specialists"].items():
        k = results.domain(name)
        own = [results.models[seed, name] for seed in results.seeds]
        base = [results.models[seed, "base"] for seed in results.seeds]
        kind = f"LoRA, rank {plan['lora_rank']}" if plan["lora_rank"] else "full"
        rows.append(
            [
                name,
                f"{kind}, {plan['steps']} steps at {plan['rate']:g}",
                f"{fmean(r['sq_norm'] for r in own):.3g}",
                f"{100 * fmean(r['of_embeddings'] / r['sq_norm'] for r in own):.0f}%",
                f"{fmean(r['loss'][k] for r in base):.3f}",
                f"{fmean(r['loss'][k] for r in own):.3f}",
                f"{fmean(r['loss'][0] for r in own):.3f}",
                f"{100 * fmean(r['score'][k] for r in base):.1f}",
                f"{100 * fmean(r['score'][k] for r in own):.1f}",
            ]
        )
    head = ["model", "training", "n_t", "of it embeddings", "base's loss", "loss"]
    head.append("loss on `general`")
    return table([*head, "base's score", "score"], rows)


def regime(results: Results) -> str:
    """The pilot: loss on the four domains by width and learning rate."""
    rows = []
    for row in json.loads(Path(__file__).with_name("pilot.json").read_text()):
        domains = [row[name] for name in results.domains if name != "general"]
        means = [
            fmean(domain[who][0] for domain in domains)
            for who in ("base", "specialist", "average")
        ]
        better = sum(domain["average"][0] < domain["base"][0] for domain in domains)
        share = (means[0] - means[2]) / (means[0] - means[1])
        cells = [f"{mean:.3f}" for mean in means]
        exact = [100 * row["arithmetic"]["specialist"][1]]
        exact.append(100 * row["markup"]["specialist"][1])
        rows.append(
            [
                str(row["width"]),
                f"{row['rate']:g}",
                *cells,
                f"{100 * share:.0f}%",
                f"{better} of {len(domains)}",
                ", ".join(f"{value:.0f}" for value in exact),
            ]
        )
    head = ["width", "rate", "base", "specialists", "average of four", "gain kept"]
    return table([*head, "domains better than base", "specialists' exact match"], rows)


def angles(results: Results) -> str:
    """Cosines between the task vectors of each mixture, over pairs and seeds."""
    rows = []
    for mixture in results.mixtures:
        cosines = results.cosines(mixture)
        figures = (fmean(cosines), min(cosines), max(cosines))
        rows.append([mixture, *(f"{figure:.3f}" for figure in figures)])
    return table(["mixture", "mean cosine", "lowest", "highest"], rows)


def linearity(results: Results) -> str:
    """Distance of the outputs from a straight line, means over seeds, percent."""
    rows = []
    for name in dict.fromkeys(record["model"] for record in results.raw["bends"]):
        records = [r for r in results.raw["bends"] if r["model"] == name]
        bends = np.mean([r["bend"] for r in records], axis=0)[1:-1]
        rows.append([name, *(f"{100 * value:.1f}" for value in bends)])
    return table(["model", "alpha 0.25", "alpha 0.5", "alpha 0.75"], rows)


def rank_agreement(results: Results, seed: int, mixture: str, kind: str) -> float:
    """Compute the rank correlation of a bound with ALD, over methods that have it."""
    methods = [m for m in results.methods if kind in results.merges[seed, mixture, m]]
    values = [results.merges[seed, mixture, m][kind] for m in methods]
    return correlation(values, [results.ald[seed, mixture, m] for m in methods])


def bounds(results: Results) -> str:
    """Whether MetaGPT minimises the bounds, and whether they rank methods like ALD."""
    rows = []
    for mixture in results.mixtures:
        cells = []
        for kind in ("bound", "quadratic"):
            minimal = []
            for seed in results.seeds:
                values = {
                    m: results.merges[seed, mixture, m][kind]
                    for m in results.methods
                    if kind in results.merges[seed, mixture, m]
                }
                least = min(values.values())
                minimal.append(values["metagpt"] <= least * (1 + 1e-5))
            ranks = [rank_agreement(results, s, mixture, kind) for s in results.seeds]
            cells.append(f"{sum(minimal)} of {len(minimal)}")
            cells.append(f"{fmean(ranks):.2f} ({min(ranks):.2f} to {max(ranks):.2f})")
        place = []
        for seed in results.seeds:
            values = sorted(results.ald[seed, mixture, m] for m in results.methods)
            place.append(1 + values.index(results.ald[seed, mixture, "metagpt"]))
        rows.append([mixture, *cells, ", ".join(map(str, place))])
    head = ["mixture", "bound least", "bound and ALD", "quadratic least"]
    return table([*head, "quadratic and ALD", "MetaGPT's place by ALD"], rows)


def pairs(results: Results) -> str:
    """For merges of two models: MetaGPT's share of the first, and the best share."""
    rows = []
    for first, second in dict.fromkeys(tuple(r["pair"]) for r in results.raw["pairs"]):
        for seed in results.seeds:
            curve = pair_curve(results, seed, (first, second))
            n, m = (results.models[seed, name]["sq_norm"] for name in (first, second))
            own_share = n / (n + m)
            losses = [loss for _, loss in curve]
            shares = [share for share, _ in curve]
            best = min(curve, key=lambda point: point[1])
            rows.append(
                [
                    f"{first}, {second}",
                    str(seed),
                    f"{own_share:.2f}",
                    f"{best[0]:.1f}",
                    f"{np.interp(own_share, shares, losses):.3f}",
                    f"{np.interp(0.5, shares, losses):.3f}",
                    f"{best[1]:.3f}",
                ]
            )
    head = ["pair", "seed", "MetaGPT's share of the first", "best share of the first"]
    return table([*head, "ALD at MetaGPT's", "at one half", "at the best"], rows)


def pair_curve(
    results: Results, seed: int, pair: tuple[str, str]
) -> list[tuple[float, float]]:
    """List (share of the first, ALD) of a pair's convex combinations."""
    return [
        (r["share"], results.difference(seed, list(pair), r["loss"]))
        for r in results.raw["pairs"]
        if r["seed"] == seed and tuple(r["pair"]) == pair
    ]
