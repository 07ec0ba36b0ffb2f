"""Writes a merge by MetaGPT as a plain mergekit YAML with explicit weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import BaseModel

from mergekit_metagpt import __version__
from mergekit_metagpt.checkpoints.identity import digest_of
from mergekit_metagpt.checkpoints.stored import dtype_name, layer_key
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.checks import RANDOM_METHODS
from mergekit_metagpt.merge_config.jobs import Job
from mergekit_metagpt.merge_config.tensor_coefficients import Coefficients, of_plan
from mergekit_metagpt.method.parameters import own_parameters

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

# Begins the comment of an exported YAML, after the method and before our version.
HEADER = "as plain mergekit, by mergekit-metagpt"
# The place of a weight: module, slice, model, and the tensor's name in that model.
_Place = tuple[str, int, "ModelReference", str]


@dataclass(frozen=True)
class Exported:
    """A plain YAML, and how its merge differs in more than the last bits, in words."""

    text: str
    changes: tuple[str, ...]


def export(
    job: Job,
    options: MergeOptions,
    weighted: Sequence[Coefficients] | None = None,
) -> Exported:
    """Write a merge by one of our methods with explicit weights, for plain mergekit.

    `metagpt` becomes `task_arithmetic` in float32 (in float64 for such weights), which
    gives the same result but for the last bit. A composed method becomes the method
    behind it, with nothing else changed.

    Args:
        job: the checked merge.
        options: mergekit's own; those that the plain merge needs are in its comment.
        weighted: its coefficients; computed if None.

    Returns:
        the YAML and its differences.

    Raises:
        ValueError: as the merge itself.
        OSError: as the merge itself.
    """
    config = job.config
    if weighted is None:
        weighted = of_plan(job.planned)
    weights: dict[_Place, float] = {}
    for tensor in weighted:
        at = tensor.planned
        for model, share in tensor.shares.items():
            place = at.module, at.slice_number, model, at.input_names[model]
            weights[place] = share

    inner = config.merge_method.removeprefix("metagpt").removeprefix("_")
    keeps_length = any(t.planned.settings.keeps_length for t in weighted)
    names = _kept_parameters(config.merge_method)
    dump = kept(dumped(config), names - {"lambda"} if keeps_length else names)
    first = {"merge_method": inner or "task_arithmetic"}
    data = {**first, "base_model": dump.get("base_model"), **dump, **first}
    if data["base_model"] is None:  # every slice has its own
        del data["base_model"]
    parts = merge_yaml.slices_of(config)
    for part, entries in zip(parts, merge_yaml.entries_of(data), strict=True):
        for model, entry in zip(part.models, entries, strict=True):
            if model == part.base:
                continue
            own = {
                name: share
                for (module, number, of_model, name), share in weights.items()
                if part.module in ("", module)
                and (number, of_model) == (part.slice_number, model)
            }
            weight = weight_setting(own) if own else 0.0
            entry.setdefault("parameters", {})["weight"] = weight
    scales = {t.planned.name: t.scale for t in weighted if t.shares}
    if keeps_length:
        data.setdefault("parameters", {})["lambda"] = weight_setting(scales)
    changes = [] if inner else _set_precision(data, job, weighted)

    from mergekit.config import ConfigYamlDumper

    body = yaml.dump(data, Dumper=ConfigYamlDumper, sort_keys=False, width=88)
    comment = _comment(job, weighted, changes, options)
    return Exported(comment + body, tuple(changes))


def weight_setting(values: Mapping[str, float]) -> float | list[dict[str, Any]]:
    """Write one value per tensor as mergekit's setting of a parameter.

    mergekit takes the first filter that is a substring of a tensor's name. So longer
    filters come first, layers end in a dot, and every name is checked afterwards.

    Args:
        values: value of each tensor, by name.

    Returns:
        a number if all are equal; otherwise filters, and a last entry for the rest.

    Example:
        >>> weight_setting({"h.1.w": 0.5, "h.1.b": 0.5, "h.11.w": 0.25, "h.11.b": 0.25})
        [{'filter': 'h.11.', 'value': 0.25}, {'value': 0.5}]
    """
    from mergekit.config import ConditionalParameter, evaluate_setting

    default, _ = Counter(values.values()).most_common(1)[0]
    of_layer: dict[str, set[float]] = {}
    for name, value in values.items():
        of_layer.setdefault(layer_key(name), set()).add(value)
    filters: dict[str, float] = {}
    for name, value in values.items():
        key = layer_key(name)
        uniform = len(of_layer[key]) == 1 and name.startswith(f"{key}.")
        if value != default:
            filters[f"{key}." if uniform else name] = value
    ordered = sorted(filters.items(), key=lambda item: (-len(item[0]), item[0]))
    setting = [ConditionalParameter(filter=part, value=v) for part, v in ordered]
    setting.append(ConditionalParameter(value=default))
    if any(
        evaluate_setting(name, setting, validate=float) != value
        for name, value in values.items()
    ):
        # A filter matches another name too: give every name a filter.
        ordered = sorted(values.items(), key=lambda item: (-len(item[0]), item[0]))
    if not ordered:
        return default
    return [
        *({"filter": part, "value": value} for part, value in ordered),
        {"value": default},
    ]


def _kept_parameters(method: str) -> set[str]:
    """Parameters with the same meaning in the plain method and in ours."""
    from mergekit.merge_methods import registry

    if method == "metagpt":
        return {"lambda"}
    theirs = {parameter.name for parameter in registry.get(method).spec.parameters}
    return theirs - {p.name for p in own_parameters() if p.name != "lambda"}


def dumped(value: Any) -> Any:
    """Return mergekit's configuration as plain data, without values that are defaults.

    mergekit's own function fails for paths with spaces.
    """
    from mergekit.common import ModelReference

    if isinstance(value, ModelReference) and value.override_architecture is None:
        return str(value)
    if isinstance(value, BaseModel):
        return {
            name: dumped(content)
            for name, field in type(value).model_fields.items()
            if (content := getattr(value, name))
            != field.get_default(call_default_factory=True)
        }
    if isinstance(value, dict):
        return {key: dumped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dumped(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def kept(data: Any, names: Collection[str]) -> Any:
    """Copy a configuration, given as plain data, with these parameters only."""
    if isinstance(data, list):
        return [kept(item, names) for item in data]
    if not isinstance(data, dict):
        return data
    copy = {key: kept(value, names) for key, value in data.items()}
    given = copy.pop("parameters", None) or {}
    if left := {name: value for name, value in given.items() if name in names}:
        copy["parameters"] = left
    return copy


def _set_precision(
    data: dict[str, Any], job: Job, weighted: Sequence[Coefficients]
) -> list[str]:
    """Let task_arithmetic compute as `metagpt` does; report remaining differences."""
    from mergekit.common import dtype_from_name

    config, stored = job.config, Counter[torch.dtype]()
    of_output: dict[str, torch.dtype] = {}
    for tensor in weighted:
        names = tensor.planned.input_names
        inputs = (job.opened[model].tensors.get(n) for model, n in names.items())
        if held := [each for each in inputs if each is not None]:
            dtype = reduce(torch.promote_types, (each.dtype for each in held))
            of_output[tensor.planned.name] = dtype
            stored[dtype] += max(each.numel for each in held)

    common = dtype_name(stored.most_common(1)[0][0]) if stored else "float32"
    wide = config.dtype == "float64" or (
        config.dtype is None and torch.float64 in stored
    )
    data["dtype"] = "float64" if wide else "float32"
    data["out_dtype"] = config.out_dtype or config.dtype or common
    changes = []
    if config.dtype is None and config.out_dtype is None:
        others = [
            name for name, dtype in of_output.items() if dtype_name(dtype) != common
        ]
        if others:
            changes.append(
                f"stored precisions differ: all tensors come out as {common}, which "
                f"most elements have; metagpt keeps {len(others)} others, such as "
                f"{others[0]} as {dtype_name(of_output[others[0]])}"
            )
    first, last = map(dtype_from_name, (config.dtype, config.out_dtype))
    if first and last and torch.finfo(first).eps > torch.finfo(last).eps:
        changes.append(
            f"metagpt rounds its result to {config.dtype} before it is written as "
            f"{config.out_dtype}; here it is written as it is"
        )
    if config.dtype not in (None, "float32", "float64"):
        finer = sorted({dtype_name(d) for d in stored if dtype_name(d) != config.dtype})
        if finer:
            changes.append(
                f"metagpt rounds inputs to {config.dtype} before it merges; here "
                f"those stored as {', '.join(finer)} are merged as they are"
            )
    return changes


def _comment(
    job: Job,
    tensors: Sequence[Coefficients],
    changes: Sequence[str],
    options: MergeOptions,
) -> str:
    config = job.config
    weighted = any({*tensor.planned.weights.values()} - {1} for tensor in tensors)
    powers = {tensor.planned.settings.power for tensor in tensors}
    power = f"{powers.pop():g}" if len(powers) == 1 else "p"
    term = f"{'w_t ' * weighted}||theta_t - theta_0||^{power}"
    lines = [
        f"{config.merge_method} {HEADER} {__version__}.",
        "Each weight is a coefficient of MetaGPT (https://arxiv.org/abs/2406.11385),",
        f"lambda_t = {term} / sum_k {term.replace('_t', '_k')}, measured on",
    ]
    for model in dict.fromkeys(m for t in tensors for m in t.planned.task.model_order):
        digest = digest_of(job.opened[model].identity)
        lines.append(f"  {model} (SHA-256 of samples: {digest[:16]})")
    used = [p.name for p in own_parameters() if p.name != "lambda"]
    given = {
        name: value
        for part in merge_yaml.slices_of(config)
        for levels in part.settings
        for level in levels
        for name, value in level.items()
        if name in used or "keep" in merge_yaml.values_of(value)
    }
    if given:
        lines.append(f"with parameters of metagpt: {', '.join(sorted(given))}.")
    errors = [max(tensor.errors.values()) for tensor in tensors if tensor.errors]
    if errors:
        share = tensors[0].planned.settings.sample
        lines.append(
            f"Estimated from a sample of {share:g} of each large tensor, with standard "
            f"errors of at most {max(errors):.1g}."
        )
    if config.merge_method in RANDOM_METHODS:
        seed = options.random_seed
        which = "N of that merge" if seed is None else str(seed)
        lines.append(f"The same elements are dropped only with --random-seed {which}.")
    if any(model.lora for model in merge_yaml.models(config)):
        dtype = options.lora_merge_dtype
        flag = f" --lora-merge-dtype {dtype}" if dtype else ""
        lines.append(f"Merge it with --lora-merge-cache FOLDER{flag}.")
    lines += [f"Differs from {config.merge_method}: {change}." for change in changes]
    return "".join(f"# {line}\n" for line in lines)
