"""Turns a merge YAML of another method into a metagpt recipe; opens no model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope

from mergekit_metagpt.merge_config import checks, merge_yaml, plain_yaml, yaml_errors

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

# Why a method cannot be converted.
_BETWEEN = "it follows a curve between models instead of adding task vectors"
REFUSED = {
    "slerp": _BETWEEN,
    "nuslerp": _BETWEEN,
    "multislerp": _BETWEEN,
    "karcher": _BETWEEN,
    "nearswap": "it picks single elements of one model by their distance to another",
    "arcee_fusion": "it picks single elements of one model by their importance",
    "ram": "it weights single elements by how many models changed them",
    "ramplus_tl": "it weights single elements by how many models changed them",
    "passthrough": "it copies layers and has no weights",
}
# What is lost in a conversion besides the weights.
LOST = {
    "sce": "SCE's vote on signs and select_topk have no counterpart. `granularity: "
    "tensor` comes closer to SCE, which weights tensor by tensor",
    "model_stock": "Model Stock moves the average back towards the base where task "
    "vectors disagree; metagpt does not look at angles",
}


@dataclass(frozen=True)
class Measured:
    """Average loss differences by docs/evaluation.md: lower is better.

    Attributes:
        other: what the recipe was compared with.
        lower: in how many of `COMPARISONS` the recipe was lower.
        difference: mean of the recipe's minus the other's, or None where the page does
            not quote it.
    """

    other: str
    lower: int
    difference: str | None = None


COMPARISONS = 27
# By the method to convert from: the recipe compared with the usual alternative.
MEASURED = {
    "linear": Measured("the plain average", 9, "+0.069"),
    "task_arithmetic": Measured("the plain average", 9, "+0.069"),
    "model_stock": Measured("the plain average", 9, "+0.069"),
    "sce": Measured("sce", 27),
    "ties": Measured("ties with equal weights", 3, "+0.040"),
    "dare_linear": Measured("dare_linear with equal weights", 8, "+0.084"),
    "dare_ties": Measured("dare_ties with equal weights", 3, "+0.092"),
    "breadcrumbs": Measured("breadcrumbs with equal weights", 11, "+0.047"),
    "breadcrumbs_ties": Measured("breadcrumbs_ties with equal weights", 4, "+0.056"),
    "della": Measured("della with equal weights", 2, "+0.078"),
    "della_linear": Measured("della_linear with equal weights", 6, "+0.090"),
}


@dataclass(frozen=True)
class Converted:
    """A recipe as YAML, with every change and notes on the result in words."""

    method: str
    text: str
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def convert(text: str, base: str | None = None) -> Converted:
    """Turn a merge YAML of another method into one of metagpt.

    Args:
        text: the YAML.
        base: the model that all others were fine-tuned from, if the YAML names none.

    Returns:
        the recipe and its differences.

    Raises:
        ValueError: the YAML is refused, its method cannot be converted, or a base is
            missing.
    """
    config = merge_yaml.read(text)
    checks.check_method(config)
    old = config.merge_method
    new = _target(old)
    _check_weights(config)
    data = yaml.safe_load(text)
    changes = [f"merge_method {old} -> {new}"]
    data["merge_method"] = new
    changes += _set_base(data, config, base)
    for place, entry, alone in _entries(data):
        changes += _strip(place, entry, old, new, alone=alone, data=data)
    notes = _weights_in_all(config)
    if new != "metagpt":
        _set_precision(data, changes, notes)
    header, dropped = _comments(text)
    if dropped:
        changes.append(
            "dropped the comments below the first key; those above it are kept"
        )
    if plain_yaml.HEADER in header:
        above = header[: header.index(plain_yaml.HEADER)]
        header = above[: above.rfind("\n") + 1]
        changes.append("dropped the comment of `export` on the weights")
    body = yaml.dump(
        data, Dumper=_dumper(), sort_keys=False, width=88, allow_unicode=True
    )
    made = merge_yaml.read(body)
    checks.check_yaml(made)
    checks.check_names(made)
    if old in LOST:
        notes.append(LOST[old])
    if old in MEASURED:
        notes.append(experience(old))
    return Converted(new, header + body, tuple(changes), tuple(notes))


def experience(method: str) -> str:
    """Say how a recipe did in our experiment; `method` is one of `MEASURED`."""
    measured = MEASURED[method]
    worse = COMPARISONS - measured.lower
    word, count = (
        ("worse", worse) if worse > measured.lower else ("better", measured.lower)
    )
    by = measured.difference
    mean = f", on average by {by} nats per byte" if by else ""
    return (
        "measured on small language models: "
        f"{checks.recipe_for(method)} had a {word} average loss difference than "
        f"{measured.other} in {count} of {COMPARISONS} comparisons{mean}"
    )


def _target(method: str) -> str:
    """The method of the recipe; refuses methods that cannot be converted."""
    if method in checks.METHODS:
        raise ValueError(f"merge_method is {method}: the YAML is a recipe already")
    if new := checks.recipe_for(method):
        return new
    reason = REFUSED.get(method, "MetaGPT weights the task vectors of one base")
    raise ValueError(
        f"{method} cannot be converted: {reason}. Methods that can: "
        f"{', '.join(checks.CONVERTIBLE)}"
    )


def _check_weights(config: MergeConfiguration) -> None:
    """Refuse negative weights, whose effect a recipe would reverse."""
    for part in merge_yaml.slices_of(config):
        for model, levels in zip(part.models, part.settings, strict=True):
            for value in _values(levels, "weight"):
                if model != part.base and value < 0:
                    raise ValueError(
                        f"weight of {model} is {value:g}: it takes something out of "
                        "the merge, and MetaGPT's coefficients are never negative. "
                        f"Remove the model, or stay with {config.merge_method}"
                    )


def _values(levels: tuple[merge_yaml.Settings, ...], name: str) -> list[float]:
    """All values of a parameter on the first level that sets it."""
    setting: Any = next((level[name] for level in levels if name in level), [])
    try:
        return [float(value) for value in merge_yaml.values_of(setting)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {setting!r}; expected numbers") from error


def _mean(setting: Any) -> float | None:
    """The mean of a weight over the layers; None if it is missing or has filters."""
    given = setting if isinstance(setting, list) else [setting]
    if not given or any(value is None or hasattr(value, "value") for value in given):
        return None
    values = [float(value) for value in given]
    # mergekit interpolates between neighbours at equal distances.
    steps = [sum(pair) / 2 for pair in itertools.pairwise(values)] or values
    return sum(steps) / len(steps)


def _weights_in_all(config: MergeConfiguration) -> list[str]:
    """A note on how to keep the sum of the old weights, if it is not 1."""
    spec = registry.get(config.merge_method).spec
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    if not {"lambda", "weight"} <= defaults.keys():
        return []
    totals, gradient = set(), False
    for part in merge_yaml.slices_of(config):
        shared = {k: v for level in reversed(part.shared) for k, v in level.items()}
        if shared.get("normalize", defaults["normalize"]) is not False:
            return []
        given = [
            next((level["weight"] for level in levels if "weight" in level), None)
            for model, levels in zip(part.models, part.settings, strict=True)
            if model != part.base
        ]
        means = [mean for mean in map(_mean, given) if mean is not None]
        if len(means) < len(given):
            return []
        gradient = gradient or any(isinstance(setting, list) for setting in given)
        totals.add(round(sum(means), 6))
    scale = config.parameters.get("lambda", 1.0) if config.parameters else 1.0
    if len(totals) != 1 or 1.0 in totals or not isinstance(scale, int | float):
        return []
    (total,) = totals
    said = (
        f"the old weights sum to {total:g}{' on average' * gradient}, MetaGPT's "
        "coefficients to 1. To keep the total, write "
        f"lambda: {total * scale:g} under `parameters:`"
    )
    return [said]


def _set_base(
    data: dict[str, Any], config: MergeConfiguration, base: str | None
) -> Iterator[str]:
    """Give a base to a YAML without one, and to the sources of every slice."""
    from mergekit.common import ModelReference

    parts = list(merge_yaml.slices_of(config))
    without = [part for part in parts if part.base is None]
    if without and base is None:
        raise ValueError(
            f"no base_model is given for {without[0].place}, and MetaGPT measures task "
            "vectors against one. Add --base BASE with the model that all others were "
            "fine-tuned from. Without such a model, do not convert"
        )
    if base is not None and not without:
        raise ValueError(
            f"--base is {base}, but the YAML has base_model {parts[0].base} already. "
            "Leave --base out, or change the YAML"
        )
    if base is not None:
        _put_after(data, "merge_method", "base_model", base)
        yield f"added base_model {base}"
    given = None if base is None else ModelReference.parse(merge_yaml.as_local(base))
    sliced = [part for part in parts if part.ranges is not None]
    for part, cut in zip(sliced, _cuts(data), strict=True):
        reference = part.base or given
        if reference in part.models:
            continue
        if len(set(part.ranges or ())) > 1:
            raise ValueError(
                f"the base {reference} is not among the sources of {part.place}, which "
                "take different layers. Add it there with the layers to measure against"
            )
        first = cut["sources"][0]["layer_range"]
        # Spelt as in the YAML: mergekit compares models by their spelling.
        spelt = cut.get("base_model") or data["base_model"]
        cut["sources"].append({"model": spelt, "layer_range": list(first)})
        yield f"added the base {reference} to the sources of {part.place}"


def _put_after(data: dict[str, Any], place: str, key: str, value: Any) -> None:
    """Set a key, and move it to just below another one."""
    items = [(k, v) for k, v in data.items() if k != key]
    data.clear()
    for other, content in items:
        data[other] = content
        if other == place:
            data[key] = value


def _cuts(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every slice, in the order of `merge_yaml.slices_of`."""
    for module in (data.get("modules") or {"": data}).values():
        yield from module.get("slices") or ()


def _entries(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield everything that may have `parameters:`: name, entry, if a single model."""
    modules = data.get("modules") or {"": data}
    for name, module in modules.items():
        within = f"modules.{name}" if name else ""
        for entry in module.get("models") or ():
            place = f"{entry['model']} in {within}" if name else str(entry["model"])
            yield place, entry, True
        for number, cut in enumerate(module.get("slices") or ()):
            at = f"{within}.slices[{number}]".removeprefix(".")
            for source in cut["sources"]:
                yield f"{source['model']} in {at}", source, True
            yield at, cut, False
        if name:
            yield within, module, False
    yield "all models", data, False


def _strip(
    place: str,
    entry: dict[str, Any],
    old: str,
    new: str,
    *,
    alone: bool,
    data: dict[str, Any],
) -> Iterator[str]:
    """Remove the parameters of a place that have no meaning in the recipe."""
    before, after = (
        {parameter.name: parameter for parameter in registry.get(name).spec.parameters}
        for name in (old, new)
    )
    kept = {}
    for name, value in (entry.get("parameters") or {}).items():
        shown = f"{name} {_shown(value)} of {place}"
        if name not in before:
            if meant := yaml_errors.closest(name, before):
                raise ValueError(
                    f"{name} is no parameter of {old}; did you mean {meant}?"
                )
            yield f"dropped {shown}: {old} has no such parameter and ignored it"
        elif name == "weight":
            if alone and entry["model"] == data.get("base_model"):
                yield f"dropped {shown}: a base has no coefficient"
            elif alone and value == 0:
                kept[name] = value
                yield f"kept {shown}: it leaves the model out, as before"
            elif alone and any(item["value"] == 0 for item in _filters(value)):
                kept[name] = [
                    {**item, "value": 0 if item["value"] == 0 else 1}
                    for item in _filters(value)
                ]
                yield f"{shown} -> {_shown(kept[name])}: 0 leaves out as before"
            else:
                yield f"dropped {shown}"
        elif name not in after:
            yield f"dropped {shown}: {new} has no such parameter"
        elif alone and after[name].scope == ParameterScope.SHARED:
            yield f"dropped {shown}: mergekit ignores it under a single model"
        else:
            kept[name] = value
    if kept:
        entry["parameters"] = kept
    else:
        entry.pop("parameters", None)


def _filters(setting: Any) -> list[dict[str, Any]]:
    """The entries of a setting with filters; none of another one."""
    items = setting if isinstance(setting, list) else [setting]
    return [item for item in items if isinstance(item, dict)]


def _shown(value: Any) -> str:
    """A setting as one line of YAML."""
    line: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return line.removesuffix("...\n").strip()


def _set_precision(data: dict[str, Any], changes: list[str], notes: list[str]) -> None:
    """Let a composed method compute in float32, since it rounds at every step."""
    old = data.get("dtype")
    if old is None:
        notes.append(
            f"{data['merge_method']} rounds at every step to the precision of its "
            "inputs, and no dtype is given. For models stored in 16 bits, write "
            "dtype: float32 and out_dtype: bfloat16"
        )
    elif str(old).removeprefix("torch.") in ("bfloat16", "float16"):
        out = data.get("out_dtype") or old
        _put_after(data, "dtype", "out_dtype", out)
        data["dtype"] = "float32"
        changes.append(
            f"dtype {old} -> float32 with out_dtype {out}: mergekit's methods round at "
            "every step"
        )


def _comments(text: str) -> tuple[str, bool]:
    """The lines before the first key, and whether there are comments after it."""
    tokens = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    first = text.rfind("\n", 0, tokens[0].start_mark.index) + 1
    lines = text[:first].splitlines(keepends=True)
    header = "".join(line for line in lines if line.strip()[:1] in ("", "#"))
    rest, at = "", first
    for token in tokens:
        rest += text[at : token.start_mark.index]
        at = token.end_mark.index
    return header, "#" in rest + text[at:]


def _dumper() -> type[yaml.Dumper]:
    """mergekit's dumper, writing repeated parts in full instead of as aliases."""
    from mergekit.config import ConfigYamlDumper

    class Plain(ConfigYamlDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain
