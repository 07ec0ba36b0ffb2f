"""Writes the paper's baselines as mergekit YAMLs from a recipe with MetaGPT.

python docs/experiments/baselines.py RECIPE FOLDER
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

DENSITY = 0.55


def baselines(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Turn a `metagpt` recipe into the merges that the paper compares it with.

    Args:
        recipe: a configuration of mergekit with `base_model` and `models`.

    Returns:
        configurations by name. The plain average is task arithmetic with weights of
        1 / K, because that allows `source: base` for the tokenizer. The paper prints
        no weights for TIES and DARE, so each model gets 1 / K there too.
    """
    share = 1 / len(recipe["models"])
    settings: dict[str, tuple[str, float, dict[str, Any]]] = {
        "average": ("task_arithmetic", share, {}),
        "task-arithmetic": ("task_arithmetic", 0.3, {}),
        "ties": ("ties", share, {"density": DENSITY}),
        "dare": ("dare_linear", share, {"density": DENSITY}),
    }
    configs = {}
    for name, (method, weight, parameters) in settings.items():
        # mergekit's methods round at every step.
        dtypes = {"dtype": "float32", "out_dtype": "bfloat16"}
        config = {**deepcopy(recipe), "merge_method": method, **dtypes}
        config.pop("parameters", None)
        if parameters:
            config["parameters"] = parameters
        for model in config["models"]:
            model["parameters"] = {"weight": weight}
        configs[name] = config
    return configs


def main() -> None:
    """Write one YAML per baseline and print their paths."""
    recipe, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in baselines(yaml.safe_load(recipe.read_text())).items():
        path = folder / f"{recipe.stem}-{name}.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        print(path)


if __name__ == "__main__":
    main()
