"""Refuses what cannot be merged, from the YAML and headers, before weights are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mergekit.merge_methods  # noqa: F401

from mergekit_metagpt.checkpoints.architecture import MOST_PARTS
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import open_checkpoints
from mergekit_metagpt.checkpoints.pairs import check_pair
from mergekit_metagpt.merge_config import checks, merge_yaml
from mergekit_metagpt.merge_config.merge_yaml import (
    Inputs,
    Settings,
    closest,
    inputs,
)
from mergekit_metagpt.method.composed import COMPOSED
from mergekit_metagpt.method.parameters import (
    all_zero,
    no_base,
    only_base,
    own_parameters,
)
from mergekit_metagpt.method.registration import register

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


METHODS = ("metagpt", *(f"metagpt_{name}" for name in COMPOSED))


def check_yaml(config: MergeConfiguration) -> None:
    """Check all that a YAML alone can tell of a merge by MetaGPT.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: another method; no base, or only the base; the base is missing
            among the sources of a slice; an illegal parameter; every weight 0;
            `granularity: layer` with slices that move layers.
    """
    if config.merge_method not in METHODS:
        raise ValueError(
            f"merge_method is {config.merge_method!r}; this command takes "
            f"{', '.join(METHODS)}. {_hint(config.merge_method, METHODS)}Use "
            "mergekit-yaml for other methods"
        )
    found = list(inputs(config))
    for part in found:
        if twice := [m for m in part.models if part.models.count(m) > 1]:
            raise ValueError(f"{twice[0]} is given twice in {part.place}. Once is all")
        if part.base is None:
            raise ValueError(no_base(config.merge_method, part.place))
        if not part.place.endswith("models") and part.base not in part.models:
            raise ValueError(
                f"the base {part.base} is not among the sources of {part.place}. Add "
                "it there: task vectors are measured against it"
            )
    if all(model == part.base for part in found for model in part.models):
        raise ValueError(only_base(found[0].base))
    _check_parameters(found)


def _check_parameters(found: Sequence[Inputs]) -> None:
    legal = {parameter.name: parameter for parameter in own_parameters()}
    for part in found:
        for settings in part.settings:
            for name, value in _leaves(settings):
                if name in legal:
                    legal[name].validate(value)
            for exclude in (level.get("exclude") for level in settings):
                if isinstance(exclude, list) and not _is_conditional(exclude):
                    raise ValueError(
                        f"exclude is the list {exclude!r}, of which mergekit would "
                        "pick one entry; expected one string, comma-separated"
                    )
            if part.moves_layers and ("granularity", "layer") in _leaves(settings):
                raise ValueError(
                    f"granularity 'layer': {part.place} moves layers to other "
                    "indices, which have no layer-wise norms; use granularity: model "
                    "or granularity: tensor"
                )
    weights = [
        next((level["weight"] for level in settings if "weight" in level), 1.0)
        for part in found
        for model, settings in zip(part.models, part.settings, strict=True)
        if model != part.base
    ]
    if all(_is_always_zero(weight) for weight in weights):
        raise ValueError(all_zero())


def _leaves(settings: Sequence[Settings]) -> list[tuple[str, Any]]:
    """All single values that parameters take anywhere in their settings."""

    def values(setting: Any) -> Iterator[Any]:
        if isinstance(setting, list):
            for item in setting:
                yield from values(item)
        elif hasattr(setting, "value"):
            yield from values(setting.value)
        else:
            yield setting

    return [
        (name, value)
        for level in settings
        for name, setting in level.items()
        for value in values(setting)
    ]


def _is_conditional(setting: list[Any]) -> bool:
    return any(hasattr(item, "value") for item in setting)


def _is_always_zero(setting: Any) -> bool:
    """Whether a weight is 0 on every tensor; filters leave some to the default."""
    return _is_always(setting, lambda value: float(value) == 0)


def _is_always(setting: Any, wanted: Callable[[Any], bool]) -> bool:
    if hasattr(setting, "value"):
        setting = [setting]
    if not isinstance(setting, list):
        return wanted(setting)
    if not setting:
        return False
    if not _is_conditional(setting):
        return all(wanted(value) for value in setting)
    reaches_all = any(item.filter in (None, "*") for item in setting)
    return reaches_all and all(_is_always(item.value, wanted) for item in setting)


def ignored(config: MergeConfiguration, known: Collection[str]) -> list[str]:
    """Find parameters that mergekit would ignore without a word.

    Args:
        config: mergekit's configuration.
        known: the parameters of its method.

    Returns:
        names that mean nothing to the method, sorted.

    Raises:
        ValueError: one of them looks like a known one misspelt.
    """
    given = {
        name
        for part in inputs(config)
        for settings in part.settings
        for level in settings
        for name in level
    }
    unknown = sorted(given - set(known))
    for name in unknown:
        if meant := closest(name, known):
            raise ValueError(
                f"{name} is no parameter of {config.merge_method}; did you mean "
                f"{meant}?"
            )
    return unknown


def _hint(name: str, known: Collection[str]) -> str:
    meant = closest(name, known)
    return f"Did you mean {meant}? " if meant else ""


def check_method_name(config: MergeConfiguration, known: Collection[str]) -> None:
    """Refuse a merge method that there is not.

    Args:
        config: mergekit's configuration.
        known: names of all methods.

    Raises:
        ValueError: the method is none of them.
    """
    if config.merge_method not in known:
        raise ValueError(
            f"merge_method is {config.merge_method!r}, which mergekit does not have. "
            f"{_hint(config.merge_method, known)}Expected one of "
            f"{', '.join(sorted(known))}"
        )


def check_levels(config: MergeConfiguration, shared: Collection[str]) -> None:
    """Refuse a parameter of all models under a single one, where mergekit ignores it.

    Args:
        config: mergekit's configuration.
        shared: parameters that have one value for all models.

    Raises:
        ValueError: one of them stands under a model.
    """
    for part in inputs(config):
        for model, levels in zip(part.models, part.settings, strict=True):
            own = levels[: len(levels) - len(part.shared)]
            for name in (name for level in own for name in level if name in shared):
                raise ValueError(
                    f"{name} stands under {model} in {part.place}, but is one for all "
                    "models, and mergekit would ignore it there. Move it to the "
                    "`parameters:` at the end of the YAML"
                )


LOG = logging.getLogger("mergekit_metagpt")


def check(config: MergeConfiguration, options: MergeOptions) -> list[Checkpoint]:
    """Check that a merge by one of our methods can be done; register the methods.

    Args:
        config: mergekit's configuration.
        options: mergekit's own.

    Returns:
        the base and all models, as they were when they were checked.

    Raises:
        ValueError: the configuration or a model is refused.
        OSError: a file cannot be read.
    """
    checks.check_yaml(config)
    check_names(config)
    checkpoints = open_checkpoints(merge_yaml.models(config), options)
    for checkpoint in checkpoints.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in merge_yaml.inputs(config):
        opened = [checkpoints[model] for model in part.models]
        for model, checkpoint in zip(part.models, opened, strict=True):
            if part.base is not None and model != part.base:
                check_pair(checkpoints[part.base], checkpoint)
        if part.ranges is None and part.base is not None:
            _check_depth(part, checkpoints[part.base], opened)
        for checkpoint, layers in zip(opened, part.ranges or (), strict=False):
            _check_range(part, checkpoint, layers)
    return list(checkpoints.values())


def _layers(part: merge_yaml.Inputs, model: Checkpoint) -> Mapping[str, int]:
    """Numbers of layers of the modules that are merged here."""
    if not part.module:
        return model.layers
    return {n: count for n, count in model.layers.items() if n == part.module}


def _check_depth(
    part: merge_yaml.Inputs, base: Checkpoint, models: Sequence[Checkpoint]
) -> None:
    """Refuse models of more or fewer layers than the base where all are merged."""
    wanted = _layers(part, base)
    for model in models:
        for module, count in _layers(part, model).items():
            if count != wanted.get(module, count):
                raise ValueError(
                    f"{model.label} has {count} layers by its config.json, the base "
                    f"{base.label} has {wanted[module]}; expected as many. Name the "
                    "layers that both have under `slices:`"
                )


def _check_range(
    part: merge_yaml.Inputs, model: Checkpoint, layers: tuple[int, int]
) -> None:
    """Refuse layers that a model does not have, of which there may be billions."""
    counts = list(_layers(part, model).values())
    most = counts[0] if len(counts) == 1 else max(len(model.tensors), MOST_PARTS)
    if not 0 <= layers[0] <= layers[1] <= most:
        raise ValueError(
            f"layer_range of {model.label} in {part.place} is {list(layers)}; expected "
            f"two numbers from 0 to {most}, the smaller one first"
        )


def check_method(config: MergeConfiguration) -> None:
    """Refuse a merge method that neither mergekit nor this package has.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: there is no such method.
    """
    from mergekit.merge_methods import registry

    register()
    known = [method.spec.name for method in registry.registered_methods()]
    checks.check_method_name(config, known)


def check_names(config: MergeConfiguration) -> None:
    """Refuse misspelt or misplaced parameters; warn of those that mean nothing.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: a parameter looks like a known one misspelt, or is one of all
            models and stands under one.
    """
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import ParameterScope

    register()
    spec = registry.get(config.merge_method).spec
    shared = {p.name for p in spec.parameters if p.scope == ParameterScope.SHARED}
    checks.check_levels(config, shared)
    if unknown := checks.ignored(config, {p.name for p in spec.parameters}):
        LOG.warning("ignored, as %s has none: %s", spec.name, ", ".join(unknown))
