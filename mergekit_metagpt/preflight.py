"""Checks a whole job, from its YAML and all headers, before a weight is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt import recipe
from mergekit_metagpt.alignment import check_pair
from mergekit_metagpt.checkpoints import Checkpoint, open_checkpoints
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
    for model in checkpoints:
        folder = Path(model.model.path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; expected a model's folder")
    for part in recipe.inputs(config):
        for model in part.models:
            if part.base is not None and model != part.base:
                check_pair(checkpoints[part.base], checkpoints[model])
    return list(checkpoints.values())


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
