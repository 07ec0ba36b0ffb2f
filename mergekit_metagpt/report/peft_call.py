"""Writes the script by which PEFT combines the adapters of a report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mergekit_metagpt.report import schema

# Settings of the combined adapter that PEFT copies from the first one.
SHARED = ("exclude_modules", "layers_to_transform", "layers_pattern")
COMBINED = "metagpt"
FOLDER = "./combined"


def script(found: schema.Report) -> str:
    """Write the script that gives base + sum lambda_t tau_t, and saves the sum.

    Args:
        found: of one family of adapters.

    Returns:
        Python: imports, the base, its adapters, `add_weighted_adapter`, and the saving.

    Raises:
        ValueError: there is more than one family or one coefficient for each model, a
            model is no adapter, or PEFT cannot combine the adapters exactly.
    """
    if len(found.families) != 1:
        raise ValueError(
            f"--peft writes one call, and the YAML merges {len(found.families)} "
            "families of models; expected one base and adapters of it"
        )
    (family,) = found.families
    scale = family.settings.scale
    if isinstance(scale, str):  # keep
        scale = family.pools[0].keep or 1.0
    adapters, weights = [], []
    for model in family.models:
        if model.adapter is None:
            raise ValueError(
                f"--peft: {model.name} was not measured from LoRA factors, and PEFT "
                "combines only these. Leave out that model, or --lora-merge-cache, or "
                "merge without --peft"
            )
        if model.coefficient is None:
            raise ValueError(
                "--peft: PEFT gives each adapter one weight, and the coefficients of "
                f"{model.name} differ by tensor. Give --granularity model"
            )
        adapters.append(model.adapter)
        weights.append(model.coefficient * scale)
    _check(family, adapters)
    names = _names(adapters)
    base = family.base.name
    loads = [
        _load(adapter, name, first=not number)
        for number, (adapter, name) in enumerate(zip(adapters, names, strict=True))
    ]
    first = f"model.peft_config[{json.dumps(names[0])}].use_rslora"
    stabilised = bool(adapters[0].config.get("use_rslora"))
    before = f"{first} = False  # or PEFT multiplies the sum by sqrt(rank)"
    rank = sum(map(_rank, adapters))
    return "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            *loads,
            *([before] if stabilised else []),
            '# "cat" adds the products: the model is base + sum of weight * s * B A.',
            '# "linear" adds the factors instead, which gives another model.',
            f'# "svd" takes the same weights: the same sum with svd_rank={rank}, or an',
            "# approximation of it by a smaller rank.",
            "model.add_weighted_adapter(",
            f"    adapters={json.dumps(names)},",
            f"    weights={json.dumps(weights)},",
            '    combination_type="cat",',
            f'    adapter_name="{COMBINED}",',
            ")",
            *([f"{first} = True"] if stabilised else []),
            f'model.set_adapter("{COMBINED}")',
            "",
            "# The sum as one adapter, in the precision of the base (load that with",
            '# dtype="float32" to keep float32), to be loaded as any other:',
            f'# PeftModel.from_pretrained(base, "{FOLDER}/{COMBINED}")',
            f'model.save_pretrained("{FOLDER}", selected_adapters=["{COMBINED}"])',
            "# Or as a whole model, which needs no PEFT:",
            '# model.merge_and_unload().save_pretrained("./merged")',
            "",
        ]
    )


def _load(adapter: schema.Adapter, name: str, *, first: bool) -> str:
    what = f"{json.dumps(adapter.path)}, adapter_name={json.dumps(name)}"
    if adapter.revision is not None:
        what += f", revision={json.dumps(adapter.revision)}"
    if first:
        return f"model = PeftModel.from_pretrained(base, {what})"
    return f"model.load_adapter({what})"


def _names(adapters: Sequence[schema.Adapter]) -> list[str]:
    """Name the adapters after their folders, as PEFT and Python allow."""
    # Numbered, since PEFT searches the paths of modules for them: not "0" or "weight".
    stems = [re.sub(r"\W", "_", Path(adapter.path).name) for adapter in adapters]
    return [f"{stem}_{number}" for number, stem in enumerate(stems, 1)]


def _rank(adapter: schema.Adapter) -> int:
    """The rank that PEFT reserves for an adapter in a combined one."""
    pattern = adapter.config.get("rank_pattern") or {}
    return max([adapter.config.get("r") or 8, *pattern.values()])


def _check(family: schema.Family, adapters: Sequence[schema.Adapter]) -> None:
    """Refuse adapters that `add_weighted_adapter` refuses, or combines only in part."""
    names, first = [model.name for model in family.models], adapters[0].config
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.experts or adapter.config.get("target_parameters"):
            raise ValueError(
                f"--peft: {name} adapts experts or target_parameters, which "
                "PEFT's add_weighted_adapter does not take. Merge with mergekit-yaml"
            )
        if adapter.config.get("ensure_weight_tying"):
            raise ValueError(
                f"--peft: {name} has ensure_weight_tying, which PEFT does not carry "
                "over to a combined adapter. Merge with mergekit-yaml"
            )
        for key in SHARED:
            if (adapter.config.get(key) or None) != (first.get(key) or None):
                raise ValueError(
                    f"--peft: {name} has another {key} than {names[0]}, and PEFT would "
                    "leave out what the first one lacks. Merge with mergekit-yaml"
                )
        kinds = {
            type(config.get("target_modules")) for config in (first, adapter.config)
        }
        if len(kinds) > 1:
            raise ValueError(
                f"--peft: target_modules of {name} is a pattern and that of "
                f"{names[0]} a list, or the reverse, which PEFT does not combine. "
                "Merge with mergekit-yaml"
            )
