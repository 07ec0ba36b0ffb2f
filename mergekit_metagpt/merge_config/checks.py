"""Refuses what cannot be merged, from the YAML and headers, before weights are read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mergekit.merge_methods  # noqa: F401

from mergekit_metagpt.checkpoints.architecture import MOST_PARTS
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import hand_to_mergekit, open_checkpoints
from mergekit_metagpt.checkpoints.pairs import check_pair
from mergekit_metagpt.checkpoints.stored import layer_key
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.merge_yaml import closest, inputs
from mergekit_metagpt.merge_config.plan import Planned, plan_merge
from mergekit_metagpt.method.composed import COMPOSED
from mergekit_metagpt.method.parameters import (
    all_zero,
    no_base,
    only_base,
    require_named,
)
from mergekit_metagpt.method.registration import register

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

METHODS = ("metagpt", *(f"metagpt_{name}" for name in COMPOSED))


def check_yaml(config: MergeConfiguration) -> None:
    """Check all that a YAML alone can tell of a merge by MetaGPT.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: another method; no base, or only the base; the base is missing
            among the sources of a slice; `exclude` is a list.
    """
    if config.merge_method not in METHODS:
        raise ValueError(
            f"merge_method is {config.merge_method!r}; this command takes "
            f"{', '.join(METHODS)}. {_hint(config.merge_method, METHODS)}Use "
            "mergekit-yaml for other methods"
        )
    slices = list(inputs(config))
    for part in slices:
        if twice := [m for m in part.models if part.models.count(m) > 1]:
            raise ValueError(f"{twice[0]} is given twice in {part.place}. List it once")
        if part.base is None:
            raise ValueError(no_base(config.merge_method, part.place))
        if not part.place.endswith("models") and part.base not in part.models:
            raise ValueError(
                f"the base {part.base} is not among the sources of {part.place}. Add "
                "it there: task vectors are measured against it"
            )
    if all(model == part.base for part in slices for model in part.models):
        raise ValueError(only_base(slices[0].base))
    for part in slices:
        for level in (level for levels in part.settings for level in levels):
            exclude = level.get("exclude")
            if isinstance(exclude, list) and not any(
                hasattr(item, "value") for item in exclude
            ):
                raise ValueError(
                    f"exclude is the list {exclude!r}, of which mergekit would pick "
                    "one entry; expected one string, comma-separated"
                )


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


@dataclass(frozen=True)
class Job:
    """A merge that has been checked: nothing but headers was read.

    Attributes:
        config: mergekit's configuration.
        opened: base and models.
        planned: every output tensor, as mergekit's planner resolves it.
    """

    config: MergeConfiguration
    opened: Mapping[ModelReference, Checkpoint]
    planned: Sequence[Planned]


def check(config: MergeConfiguration, options: MergeOptions) -> Job:
    """Check that a merge by one of our methods can be done; register the methods.

    Args:
        config: mergekit's configuration.
        options: mergekit's own.

    Returns:
        the models as they were when they were checked, and mergekit's plan.

    Raises:
        ValueError: the configuration or a model is refused.
        OSError: a file cannot be read.
    """
    check_yaml(config)
    check_names(config)
    slices = list(inputs(config))
    opened = open_checkpoints(merge_yaml.models(config), options)
    for checkpoint in opened.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in slices:
        models = [opened[model] for model in part.models]
        for model, checkpoint in zip(part.models, models, strict=True):
            if part.base is not None and model != part.base:
                check_pair(opened[part.base], checkpoint)
        if part.ranges is None and part.base is not None:
            _check_depth(part, opened[part.base], models)
        for checkpoint, layers in zip(models, part.ranges or (), strict=False):
            _check_range(part, checkpoint, layers)
    hand_to_mergekit(opened, options)
    planned = plan_merge(config, options)
    _check_plan(planned, opened)
    return Job(config, opened, planned)


def _check_plan(
    planned: Sequence[Planned], opened: Mapping[ModelReference, Checkpoint]
) -> None:
    """Refuse what only the parameters of single tensors show."""
    weights = [weight for tensor in planned for weight in tensor.weights.values()]
    if weights and not any(weights):
        raise ValueError(all_zero())
    for tensor in planned:
        settings = tensor.settings
        if settings.exclude:
            require_named(
                settings.exclude, (n for model in opened.values() for n in model.names)
            )
        moved = [
            model
            for model, name in tensor.input_names.items()
            if layer_key(name) != layer_key(tensor.name)
        ]
        if settings.granularity == "layer" and moved:
            raise ValueError(
                f"granularity 'layer': {tensor.input_names[moved[0]]} of {moved[0]} "
                f"becomes {tensor.name}. Slices that move layers to other indices have "
                "no layer-wise norms; use granularity: model or granularity: tensor"
            )


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
    check_method_name(config, known)


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
    check_levels(config, shared)
    if unknown := ignored(config, {p.name for p in spec.parameters}):
        LOG.warning("ignored, as %s has none: %s", spec.name, ", ".join(unknown))
