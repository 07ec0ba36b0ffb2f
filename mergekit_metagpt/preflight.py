"""Checks a whole job, from its YAML and all headers, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_metagpt import recipe
from mergekit_metagpt.alignment import check_pair
from mergekit_metagpt.checkpoints import Checkpoint, open_checkpoints
from mergekit_metagpt.model_config import MOST_PARTS
from mergekit_metagpt.registration import register

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

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
    recipe.check(config)
    check_names(config)
    checkpoints = open_checkpoints(recipe.models(config), options)
    for checkpoint in checkpoints.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in recipe.inputs(config):
        opened = [checkpoints[model] for model in part.models]
        for model, checkpoint in zip(part.models, opened, strict=True):
            if part.base is not None and model != part.base:
                check_pair(checkpoints[part.base], checkpoint)
        if part.ranges is None and part.base is not None:
            _check_depth(part, checkpoints[part.base], opened)
        for checkpoint, layers in zip(opened, part.ranges or (), strict=False):
            _check_range(part, checkpoint, layers)
    return list(checkpoints.values())


def _layers(part: recipe.Inputs, model: Checkpoint) -> Mapping[str, int]:
    """Numbers of layers of the modules that are merged here."""
    if not part.module:
        return model.layers
    return {n: count for n, count in model.layers.items() if n == part.module}


def _check_depth(
    part: recipe.Inputs, base: Checkpoint, models: Sequence[Checkpoint]
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
    part: recipe.Inputs, model: Checkpoint, layers: tuple[int, int]
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
    recipe.check_method(config, known)


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
    recipe.check_levels(config, shared)
    if unknown := recipe.ignored(config, {p.name for p in spec.parameters}):
        LOG.warning("ignored, as %s has none: %s", spec.name, ", ".join(unknown))
