"""Finds which models are merged with each other, from a YAML or a list; opens them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.merge_methods.base import ParameterScope

from mergekit_metagpt.checkpoints.adapters import is_adapter
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import (
    is_adapter_of,
    open_checkpoints,
    unopened,
)
from mergekit_metagpt.checkpoints.remote import Glimpse, glimpse, open_adapter
from mergekit_metagpt.merge_config import checks, merge_yaml, yaml_errors
from mergekit_metagpt.method.parameters import (
    all_zero,
    checked,
    checked_of,
    own_parameters,
)
from mergekit_metagpt.method.settings import Settings, split_exclude

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


@dataclass(frozen=True)
class Family:
    """A base and the models that are merged with each other.

    Attributes:
        places: places of the YAML that name them; empty without a YAML.
        base: theta_0.
        models: the K fine-tunes.
        settings: settings of the closed form, for the whole model.
        varying: parameters that the YAML sets by filters or gradients, tensor by
            tensor; `settings` and `weights` have their defaults.
        weights: importance of each model, 1 unless a metagpt YAML gives another.
        by_hand: the `weight` of each model in the YAML, in words, if it is of another
            method or sets a weight by tensor.
        keeps_length: whether `lambda` is `keep` anywhere.
        base_listed: whether `models:` names the base too.
        base_weight: the `weight` of the base there.
    """

    places: tuple[str, ...]
    base: ModelReference
    models: tuple[ModelReference, ...]
    settings: Settings
    varying: tuple[str, ...]
    weights: tuple[float, ...]
    by_hand: tuple[str | None, ...]
    keeps_length: bool
    base_listed: bool
    base_weight: str | None


def _constant(
    levels: Sequence[merge_yaml.Settings], name: str, default: Any
) -> tuple[Any, bool]:
    """The value of a parameter, and whether it is the same on every tensor."""
    for level in levels:
        if name in level:
            values = list(merge_yaml.values_of(level[name]))
            if values == [level[name]]:
                return checked(name, values[0]), True
            for value in values:
                checked(name, value)
            return default, False
    return default, True


def _settings(part: merge_yaml.Inputs) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a slice, and names of parameters that vary by tensor."""
    found = {
        parameter.name: _constant(part.shared, parameter.name, parameter.default)
        for parameter in own_parameters()
        if parameter.scope == ParameterScope.SHARED
    }
    varying = (name for name, (_, constant) in found.items() if not constant)
    values = {name: value for name, (value, _) in found.items()}
    return Settings.of(values), tuple(varying)


def _by_hand(levels: Sequence[merge_yaml.Settings]) -> str | None:
    """The `weight` that a YAML of another method gives, in words."""
    setting = next((level["weight"] for level in levels if "weight" in level), None)
    items = setting if isinstance(setting, list) else [setting]
    if any(hasattr(item, "value") for item in items):
        return "by filter"
    if isinstance(setting, list):
        return "-".join(f"{value:g}" for value in setting)
    return f"{setting:g}" if isinstance(setting, int | float) else setting


def of_config(
    config: MergeConfiguration,
    *,
    granularity: str | None = None,
    power: float | None = None,
    exclude: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Family]:
    """Return the families of a merge YAML of any method, each once.

    Args:
        config: mergekit's configuration.
        granularity: instead of the YAML's.
        power: instead of the YAML's.
        exclude: instead of the YAML's.
        weights: instead of the YAML's, by names of models or of their folders.

    Returns:
        the families, in the order of the YAML.

    Raises:
        ValueError: no base, nothing beside it, an illegal parameter, or a weight of a
            model that is not there.
    """
    ours = config.merge_method in checks.METHODS
    if ours:
        checks.check_yaml(config)
    given = {"granularity": granularity, "power": power}
    overrides = {
        n: checked(n, value) for n, value in given.items() if value is not None
    }
    if exclude is not None:
        overrides["exclude"] = split_exclude(exclude)
    by_name = _named(weights or {}, config)
    families: dict[Any, Family] = {}
    for part in merge_yaml.slices_of(config):
        if part.base is None:
            raise ValueError(
                f"no base_model is given for {part.place}; task vectors need one. Add "
                "it, or name the models: inspect --base BASE MODEL..."
            )
        settings, varying = _settings(part) if ours else (Settings(), ())
        models, own, by_hand = [], [], []
        listed, lost = False, None
        scales = [merge_yaml.values_of(level.get("lambda")) for level in part.shared]
        for model, levels in zip(part.models, part.settings, strict=True):
            if model == part.base and part.ranges is None:
                above = len(levels) - len(part.shared)
                listed, lost = True, _by_hand(levels[:above])
            if model == part.base or model in models:
                continue
            weight, constant = by_name.get(model, 1.0), True
            if ours and model not in by_name:
                weight, constant = _constant(levels, "weight", 1.0)
            if not constant and "weight" not in varying:
                varying = (*varying, "weight")
            models.append(model)
            own.append(weight)
            tried = ours and model in by_name
            by_hand.append(f"{weight:g}" if tried else _by_hand(levels))
        if not models:
            continue
        if ours and "weight" not in varying:
            by_hand = [None] * len(models)
        family = Family(
            places=(),
            base=part.base,
            models=tuple(models),
            settings=settings.model_copy(update=overrides),
            varying=varying,
            weights=tuple(own),
            by_hand=tuple(by_hand),
            keeps_length=ours and any("keep" in values for values in scales),
            base_listed=listed,
            base_weight=lost,
        )
        same = families.setdefault(family, family)
        families[family] = replace(same, places=(*same.places, part.place))
    if not families:
        raise ValueError(
            "no model beside the base is given: there is nothing to measure. Add the "
            "fine-tuned models"
        )
    every = list(families.values())
    varies = any("weight" in family.varying for family in every)
    if not varies and not any(any(family.weights) for family in every):
        raise ValueError(all_zero())
    return every


def _named(
    weights: Mapping[str, float], config: MergeConfiguration
) -> dict[ModelReference, float]:
    """Weights by model, from names in the YAML or of folders."""
    tuned = {
        model: None
        for part in merge_yaml.slices_of(config)
        for model in part.models
        if model != part.base
    }
    by_model = {}
    for name, weight in weights.items():
        same = [model for model in tuned if str(model) == merge_yaml.as_local(name)]
        same = same or [model for model in tuned if name in _folders(model)]
        if len(same) != 1:
            count = f"{len(same)} models" if same else "no model"
            names = ", ".join(map(str, tuned))
            every = {part for model in tuned for part in (str(model), *_folders(model))}
            near = None if same else yaml_errors.closest(name, every)
            hint = f". Did you mean {near}?" if near else ""
            raise ValueError(
                f"--weight {name} names {count}; expected one of {names}{hint}"
            )
        by_model[same[0]] = checked_of(same[0], "weight", weight)
    return by_model


def _folders(model: ModelReference) -> set[str]:
    """Path and folder name of a model, or of its adapter if it has one."""
    path = (model.lora or model.model).path
    return {path, Path(path).name}


def config_of(base: str, models: Sequence[str]) -> MergeConfiguration:
    """Return the merge of a base and models, folders or repositories, without a YAML.

    Adapters of the base may be given without it. Every parameter has its default.
    Raises a ValueError if a model is given twice.
    """
    from mergekit.config import MergeConfiguration

    if twice := [model for model in models if models.count(model) > 1]:
        raise ValueError(f"{twice[0]} is given twice. List it once")
    spelt = [f"{base}+{m}" if is_adapter(Path(m)) else m for m in models]
    data = {
        "merge_method": "metagpt",
        "base_model": base,
        "models": [{"model": model} for model in spelt],
    }
    return MergeConfiguration.model_validate(data)


def are_adapters(models: Sequence[str], base: str | None, *, remote: bool) -> bool:
    """Whether LoRA adapters are given without their base.

    Args:
        models: the given models, or a YAML.
        base: the given base, or None.
        remote: whether a single name may be a hub repository.

    Returns:
        False for a YAML and for the folder of a model.

    Raises:
        ValueError: some of several are adapters, or a YAML, and no base is named.
    """
    if base is not None:
        return False
    paths = [Path(model) for model in models]
    yamls = [path for path in paths if path.suffix in (".yml", ".yaml")]
    if yamls and len(paths) > 1:
        raise ValueError(
            f"{yamls[0]} is a merge YAML, which comes alone: it names its base and "
            "models. Leave out the rest, or give --base BASE and models instead"
        )
    if len(paths) == 1:
        unknown = not paths[0].exists() and paths[0].suffix not in (".yml", ".yaml")
        return is_adapter(paths[0]) or (remote and unknown)
    others = [path for path in paths if path.exists() and not is_adapter(path)]
    if others and len(others) < len(paths):
        raise ValueError(
            f"{others[0]} is no LoRA adapter, and no base is given; expected --base "
            "BASE and the models, or adapters alone"
        )
    return not others


def open_adapters(
    adapters: Sequence[str], **overrides: Any
) -> tuple[Family, Mapping[ModelReference, Checkpoint]]:
    """Open LoRA adapters without their base, reading headers only.

    Args:
        adapters: folders, or hub repositories, which are downloaded whole.
        **overrides: `granularity`, `power` and `exclude` of `of_config`.

    Returns:
        their family, and headers by model; those of the base are empty.

    Raises:
        ValueError: an adapter is given twice, or its task vector is not a product of
            factors.
        OSError: a file or repository cannot be read.
    """
    from mergekit.common import ModelReference

    (family,) = of_config(config_of("base", adapters), **overrides)
    models = [ModelReference.model_validate({"model": name}) for name in adapters]
    opened = {model: open_adapter(model) for model in models}
    named = (
        model.adapter.config.get("base_model_name_or_path")
        for model in opened.values()
        if model.adapter
    )
    name = next((name for name in named if name), "BASE")
    base = ModelReference.model_validate({"model": {"path": name}})
    family = replace(family, base=base, models=tuple(models))
    return family, {**opened, base: unopened(name)}


def open_models(
    families: Sequence[Family], options: MergeOptions
) -> Mapping[ModelReference, Checkpoint]:
    """Open every base and model of the families, reading headers only.

    An adapter of its family's base is measured from its factors. It is merged into the
    base instead if `options` name a folder for that, or if settings vary by tensor.
    Raises a ValueError if a model does not exist or cannot be measured; an OSError if a
    file is missing, truncated or corrupt.
    """
    own = () if options.lora_merge_cache else _adapters_of_their_base(families)
    adapters = {model: open_adapter(model) for model in own}
    models = [m for family in families for m in (family.base, *family.models)]
    others = [model for model in models if model not in adapters]
    return {**open_checkpoints(others, options, models[0]), **adapters}


def _adapters_of_their_base(families: Sequence[Family]) -> list[ModelReference]:
    """The models that are adapters of the base in all of their families."""
    if any(family.varying for family in families):
        return []  # coefficients of single tensors need the tensors that mergekit reads
    adapters: dict[ModelReference, bool] = {}
    for family in families:
        for model in family.models:
            own = is_adapter_of(model, family.base)
            adapters[model] = own and adapters.get(model, True)
    bases = {family.base for family in families}
    return [model for model, own in adapters.items() if own and model not in bases]


def glimpse_models(
    families: Sequence[Family], options: MergeOptions
) -> Mapping[ModelReference, Glimpse]:
    """Read configurations and headers of the families' models; download no weights.

    `options` are for local models. Raises a ValueError if a model cannot be read in
    part; an OSError if a repository or file cannot be read.
    """
    models = [m for family in families for m in (family.base, *family.models)]
    adapters = _adapters_of_their_base(families)
    return {
        model: glimpse(
            model,
            is_own_adapter=model in adapters,
            lora_merge_cache=options.lora_merge_cache,
            transformers_cache=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        )
        for model in dict.fromkeys(models)
    }
