"""Runs the experiment for one seed: trains, merges, measures, returns records."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from family import Size, load, train_base, train_specialist
from measure import bend, bound, evaluate, quadratic, weights
from merges import PLANS, Method, configuration, lifting_weight, merge, methods

from mergekit_metagpt import coefficients, scan

PAIRS = (
    ("code", "arithmetic"),
    ("code", "arithmetic_long"),
    ("code_lora", "arithmetic"),
)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BENT = ("code", "arithmetic", "markup", "legal", "arithmetic_long", "code_harsh")
Record = dict[str, Any]
Mixtures = dict[str, tuple[str, ...]]


def _short(value: Any) -> Any:
    """Round every number to 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list) else value


def _measured(path: Path, size: Size) -> Record:
    result = evaluate(load(path), size.windows)
    return {"loss": list(result.loss.values()), "score": list(result.score.values())}


def _train(folder: Path, size: Size, seed: int) -> dict[str, Path]:
    """Train `base` and the specialists of `PLANS`, except those already there."""
    paths = {name: folder / name for name in ("base", *PLANS)}
    for name, path in paths.items():
        if not (path / "model.safetensors").exists():
            # Rename only complete checkpoints, so that a stopped run can continue.
            part = folder / "part"
            shutil.rmtree(part, ignore_errors=True)
            if name == "base":
                train_base(part, size, seed)
            else:
                train_specialist(paths["base"], part, PLANS[name], size, seed)
            part.rename(path)
    return paths


def _merge_all(
    paths: dict[str, Path], names: tuple[str, ...], folder: Path, size: Size, seed: int
) -> list[Record]:
    """Merge and measure one mixture by every method."""
    records = []
    start = weights(paths["base"])
    models = [paths[name] for name in names]
    taus = [weights(path) - start for path in models]
    sq_norms = [float(tau.dot(tau)) for tau in taus]
    shares = coefficients(torch.tensor(sq_norms, dtype=torch.float64)).tolist()
    least = shares.index(min(shares))
    lift = [1.0] * len(names)
    lift[least] = lifting_weight(shares[least], 1 / len(names))
    named = {**methods(len(names)), "metagpt weight": Method("metagpt", {})}
    for name, method in named.items():
        own = lift if name == "metagpt weight" else None
        config = configuration(paths["base"], models, method, own)
        path = merge(config, folder / "merged", seed)
        record: Record = {"method": name, **_measured(path, size)}
        record["quadratic"] = quadratic(weights(path) - start, taus)
        if lambdas := _lambdas(method, sq_norms, own):
            record |= {"lambda": lambdas, "bound": bound(lambdas, sq_norms)}
        records.append(_short(record))
    return records


def _merges(
    folder: Path, paths: dict[str, Path], size: Size, seed: int, mixtures: Mixtures
) -> list[Record]:
    """Merge and measure every mixture, or read the records already there."""
    records = []
    for mixture, names in mixtures.items():
        done = folder / f"merges {mixture}.json"
        if not done.exists():
            merged = _merge_all(paths, names, folder, size, seed)
            done.write_text(json.dumps(merged))
        for record in json.loads(done.read_text()):
            records.append({"seed": seed, "mixture": mixture, **record})
    return records


def _lambdas(
    method: Method, sq_norms: list[float], weight: list[float] | None
) -> list[float] | None:
    """Compute the coefficient of each model; None if the method has none."""
    count = len(sq_norms)
    if method.merge_method == "linear":
        return [1 / count] * count
    if method.merge_method == "task_arithmetic" and method.weight is not None:
        return [method.weight] * count
    if method.merge_method == "metagpt":
        if {"granularity", "exclude"} & set(method.parameters):
            return None
        return coefficients(
            torch.tensor(sq_norms, dtype=torch.float64),
            weight=torch.tensor(weight or [1.0] * count, dtype=torch.float64),
            power=method.parameters.get("power", 2.0),
            scale=method.parameters.get("lambda", 1.0),
        ).tolist()
    return None


def _pairs(paths: dict[str, Path], size: Size, seed: int) -> list[Record]:
    """Measure every convex combination of two specialists, in steps of a tenth."""
    records = []
    model = load(paths["base"])
    for pair in PAIRS:
        first, second = (load(paths[name]).state_dict() for name in pair)
        for share in SHARES:
            model.load_state_dict(
                {k: share * first[k] + (1 - share) * second[k] for k in first}
            )
            result = evaluate(model, size.windows)
            record = {"seed": seed, "pair": list(pair), "share": share}
            records.append(_short(record | {"loss": list(result.loss.values())}))
    return records


def one_seed(
    folder: Path, size: Size, seed: int, mixtures: Mixtures
) -> dict[str, list[Record]]:
    """Run the experiment for one seed; the checkpoints stay in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "results.json"
    if done.exists():
        return json.loads(done.read_text())
    resumed = (folder / "base").exists()
    began = time.monotonic()
    paths = _train(folder, size, seed)
    trained = time.monotonic()
    pooled = scan(paths["base"], [paths[name] for name in PLANS], gram=True).pool()
    assert pooled.cosines is not None
    records: dict[str, list[Record]] = {"models": [], "angles": [], "bends": []}
    norms = [0.0, *pooled.sq_norms.flatten().tolist()]
    parts = [0.0, *pooled.embeddings.flatten().tolist()]
    for (name, path), n, part in zip(paths.items(), norms, parts, strict=True):
        record = {"seed": seed, "model": name, "sq_norm": n, "of_embeddings": part}
        records["models"].append(_short(record | _measured(path, size)))
    table = pooled.cosines.reshape(len(PLANS), len(PLANS)).tolist()
    records["angles"].append(_short({"seed": seed, "cosines": table}))
    for name in BENT:
        domain = PLANS[name].domain
        record = {"seed": seed, "model": name}
        record |= bend(paths["base"], paths[name], domain, size.windows)
        records["bends"].append(_short(record))
    records["merges"] = _merges(folder, paths, size, seed, mixtures)
    records["pairs"] = _pairs(paths, size, seed)
    ended = time.monotonic()
    seconds = {"train": trained - began, "merge and measure": ended - trained}
    rounded = {kind: round(spent) for kind, spent in seconds.items()}
    records["seconds"] = [{"seed": seed, "resumed": resumed, **rounded}]
    done.write_text(json.dumps(records))
    print(f"seed {seed}: {seconds}", file=sys.stderr, flush=True)
    return records
