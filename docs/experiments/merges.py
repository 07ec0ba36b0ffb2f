"""Lists the mixtures and methods, and merges through mergekit's own code."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from family import Plan

from mergekit_metagpt.method.composed import COMPOSED

# Learning rates of the gentle and of the harsh regime (see pilot.py).
RATE, HARSH = 3e-4, 1e-3
PLANS = {
    "code": Plan("code", 100, RATE),
    "arithmetic": Plan("arithmetic", 100, RATE),
    "markup": Plan("markup", 100, RATE),
    "legal": Plan("legal", 100, RATE),
    "code_long": Plan("code", 300, RATE),
    "arithmetic_short": Plan("arithmetic", 33, RATE),
    "arithmetic_long": Plan("arithmetic", 300, RATE),
    "markup_short": Plan("markup", 33, RATE),
    "markup_long": Plan("markup", 300, RATE),
    "legal_slow": Plan("legal", 100, RATE / 3),
    "code_lora": Plan("code", 100, RATE, lora_rank=8),
    "code_lora_fast": Plan("code", 100, RATE * 10, lora_rank=8),
    "code_harsh": Plan("code", 100, HARSH),
    "arithmetic_harsh": Plan("arithmetic", 100, HARSH),
    "markup_harsh": Plan("markup", 100, HARSH),
}
MIXTURES = {
    "two equal": ("code", "arithmetic"),
    "three equal": ("code", "arithmetic", "markup"),
    "four equal": ("code", "arithmetic", "markup", "legal"),
    "four, one slow": ("code", "arithmetic", "markup", "legal_slow"),
    "code long": ("code_long", "arithmetic_short", "markup"),
    "arithmetic long": ("code", "arithmetic_long", "markup_short"),
    "markup long": ("code", "arithmetic_short", "markup_long"),
    "one LoRA": ("code_lora", "arithmetic", "markup"),
    "one fast LoRA": ("code_lora_fast", "arithmetic", "markup"),
    "harsh": ("code_harsh", "arithmetic_harsh", "markup_harsh"),
}
GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
DENSITY = 0.55


@dataclass(frozen=True)
class Method:
    """One merge: mergekit's name, shared parameters, and the weight of each model."""

    merge_method: str
    parameters: dict[str, Any]
    weight: float | None = None


def methods(count: int) -> dict[str, Method]:
    """List every merge of `count` models by name.

    The methods that MetaGPT composes with appear twice: with equal weights 1 / count,
    and with MetaGPT's weights. Each pair differs in the coefficients only.
    """
    share = 1 / count
    merges = {"average": Method("linear", {}, 1.0)}
    for weight in GRID:
        merges[f"task arithmetic {weight}"] = Method("task_arithmetic", {}, weight)
    merges["sce"] = Method("sce", {})
    merges["model stock"] = Method("model_stock", {})
    for name in COMPOSED:
        sparse = {"density": DENSITY}
        if name.startswith("della"):
            sparse["epsilon"] = 0.15
        merges[name.replace("_", " ")] = Method(name, sparse, share)
        merges[f"metagpt + {name.replace('_', ' ')}"] = Method(
            f"metagpt_{name}", sparse
        )
    merges["metagpt"] = Method("metagpt", {})
    for granularity in ("layer", "tensor"):
        parameters = {"granularity": granularity}
        merges[f"metagpt {granularity}"] = Method("metagpt", parameters)
    for power in (-1.0, 0.0, 1.0):
        merges[f"metagpt power {power:g}"] = Method("metagpt", {"power": power})
    merges["metagpt lambda 1.5"] = Method("metagpt", {"lambda": 1.5})
    merges["metagpt exclude"] = Method("metagpt", {"exclude": "embed_tokens,lm_head"})
    return merges


def lifting_weight(share: float, target: float) -> float:
    """Compute the `weight` that brings a model's share of a merge to `target`."""
    return target * (1 - share) / (share * (1 - target))


def configuration(
    base: Path, models: list[Path], method: Method, weights: list[float] | None = None
) -> dict[str, Any]:
    """Write a merge as mergekit's YAML would; `weights` override the shared one."""
    entries: list[dict[str, Any]] = []
    for k, path in enumerate(models):
        weight = weights[k] if weights else method.weight
        entry: dict[str, Any] = {"model": str(path.resolve())}
        if weight is not None:
            entry["parameters"] = {"weight": weight}
        entries.append(entry)
    config: dict[str, Any] = {
        "merge_method": method.merge_method,
        "base_model": str(base.resolve()),
        "models": entries,
        "dtype": "float32",
    }
    if method.merge_method == "linear":
        del config["base_model"]
    if method.parameters:
        config["parameters"] = method.parameters
    return config


def merge(config: dict[str, Any], out: Path, seed: int) -> Path:
    """Run mergekit's `run_merge` on a configuration; replace the folder `out`."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    shutil.rmtree(out, ignore_errors=True)
    run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        MergeOptions(
            quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=seed
        ),
        config_source=json.dumps(config),
    )
    return out
