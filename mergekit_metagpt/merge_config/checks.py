"""Refuses what cannot be merged, from the YAML and headers, before weights are read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import hand_to_mergekit, open_checkpoints
from mergekit_metagpt.checkpoints.pairs import check_pair
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.merge_yaml import closest, slices_of, values_of
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

LOG = logging.getLogger("mergekit_metagpt")
METHODS = ("metagpt", *(f"metagpt_{name}" for name in COMPOSED))


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
    slices = list(slices_of(config))
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
    names = {name for model in opened.values() for name in model.names}
    for exclude in {tensor.settings.exclude for tensor in planned}:
        require_named(exclude, names)


def _layers(part: merge_yaml.Inputs, model: Checkpoint) -> Mapping[str, int]:
    """Numbers of layers of the modules that are merged here."""
    if not part.module:
        return model.layers
    return {n: count for n, count in model.layers.items() if n == part.module}


def _check_depth(
    part: merge_yaml.Inputs, base: Checkpoint, models: Sequence[Checkpoint]
) -> None:
    """Refuse models of more or fewer layers than the base where all are merged."""
    expected = _layers(part, base)
    for model in models:
        for module, count in _layers(part, model).items():
            if count != expected.get(module, count):
                raise ValueError(
                    f"{model.label} has {count} layers by its config.json, the base "
                    f"{base.label} has {expected[module]}; expected as many. Name the "
                    "layers that both have under `slices:`"
                )


def _check_range(
    part: merge_yaml.Inputs, model: Checkpoint, layers: tuple[int, int]
) -> None:
    """Refuse layers that a model does not have."""
    most = max(_layers(part, model).values(), default=layers[1])
    if not 0 <= layers[0] <= layers[1] <= most:
        raise ValueError(
            f"layer_range of {model.label} in {part.place} is {list(layers)}; expected "
            f"two numbers from 0 to {most}, the smaller one first"
        )


def check_yaml(config: MergeConfiguration) -> None:
    """Check all that a YAML alone can tell of a merge by MetaGPT.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: another method; no base, or only the base; the base is missing
            among the sources of a slice; `exclude` is a list; `granularity: layer`
            with slices that move layers.
    """
    if config.merge_method not in METHODS:
        raise ValueError(
            f"merge_method is {config.merge_method!r}; this command takes "
            f"{', '.join(METHODS)}. {_hint(config.merge_method, METHODS)}Use "
            "mergekit-yaml for other methods"
        )
    slices = list(slices_of(config))
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
            granularities = values_of(level.get("granularity"))
            if part.moves_layers and "layer" in granularities:
                raise ValueError(
                    f"granularity 'layer': {part.place} moves layers to other "
                    "indices, which have no layer-wise norms; use granularity: model "
                    "or granularity: tensor"
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
    methods = sorted(method.spec.name for method in registry.registered_methods())
    if config.merge_method not in methods:
        raise ValueError(
            f"merge_method is {config.merge_method!r}, which mergekit does not have. "
            f"{_hint(config.merge_method, methods)}Expected one of {', '.join(methods)}"
        )


def _hint(name: str, names: Collection[str]) -> str:
    meant = closest(name, names)
    return f"Did you mean {meant}? " if meant else ""


def check_names(config: MergeConfiguration) -> None:
    """Refuse misspelt or misplaced parameters, which mergekit silently ignores.

    Warns of parameters of other methods.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: a parameter looks misspelt, or one for all models is given for one.
    """
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import ParameterScope

    register()
    spec = registry.get(config.merge_method).spec
    scopes = {parameter.name: parameter.scope for parameter in spec.parameters}
    unknown = set()
    for part in slices_of(config):
        for model, levels in zip(part.models, part.settings, strict=True):
            for number, level in enumerate(levels):
                of_one_model = number < len(levels) - len(part.shared)
                for name in level:
                    if name not in scopes:
                        unknown.add(name)
                    elif of_one_model and scopes[name] == ParameterScope.SHARED:
                        raise ValueError(
                            f"{name} stands under {model} in {part.place}, but is one "
                            "for all models, and mergekit would ignore it there. Move "
                            "it to the `parameters:` at the end of the YAML"
                        )
    for name in sorted(unknown):
        if meant := closest(name, scopes):
            raise ValueError(
                f"{name} is no parameter of {spec.name}; did you mean {meant}?"
            )
    if unknown:
        names = ", ".join(sorted(unknown))
        LOG.warning("ignored, as %s has none: %s", spec.name, names)
