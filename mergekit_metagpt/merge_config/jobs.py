"""Checks a whole merge before a weight is read, and holds what the checks opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.opening import hand_to_mergekit, open_checkpoints
from mergekit_metagpt.checkpoints.pairs import check_family
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.checks import (
    METHODS,
    check_method,
    check_names,
    check_yaml,
)
from mergekit_metagpt.merge_config.plan import Planned, plan_merge
from mergekit_metagpt.merge_config.plan_checks import check_plan
from mergekit_metagpt.merge_config.tokenizer_checks import check_copied_tokenizer

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


@dataclass(frozen=True)
class Job:
    """A merge that has been checked, of which only headers were read.

    Attributes:
        config: mergekit's configuration.
        opened: headers of base and models.
        planned: every output tensor, as mergekit's planner resolves it.
    """

    config: MergeConfiguration
    opened: Mapping[ModelReference, Checkpoint]
    planned: Sequence[Planned]

    @property
    def expected(self) -> list[str]:
        """Names of the output tensors that the base has; all of them are written."""
        return [
            tensor.name
            for tensor in self.planned
            if (base := tensor.task.base_model) is not None
            and (
                stored_as(self.opened[base], tensor.input_names[base])
                or tensor.input_names[base] in self.opened[base].others
            )
        ]


def check(
    config: MergeConfiguration, options: MergeOptions, file: Path | None = None
) -> Job:
    """Check that a merge by one of our methods can be done; register the methods.

    Messages name the `file` of the configuration. Raises a ValueError if configuration
    or a model is refused; an OSError if a file cannot be read.
    """
    check_yaml(config, file or "OLD.yml")
    check_names(config, file)
    opened = open_checkpoints(merge_yaml.models(config), options, config.base_model)
    for checkpoint in opened.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in merge_yaml.slices_of(config):
        if part.base is not None:
            tuned = [opened[model] for model in part.models if model != part.base]
            check_family(opened[part.base], tuned)
    return Job(config, opened, check_plan(config, opened, options))


def reopen(config: MergeConfiguration, options: MergeOptions) -> Job:
    """Open and plan a merge that was made earlier, without checking it again.

    Raises a ValueError if a model does not exist any more, or mergekit refuses the
    merge; an OSError if a file cannot be read.
    """
    check_method(config)
    opened = open_checkpoints(merge_yaml.models(config), options, config.base_model)
    hand_to_mergekit(opened, options)
    return Job(config, opened, plan_merge(config, options))


def check_any(config: MergeConfiguration, options: MergeOptions) -> Job:
    """Check that a merge by any method can be done, including its tokenizer.

    Raises as `check`.
    """
    check_method(config)
    if config.merge_method in METHODS:
        job = check(config, options)
    else:
        check_names(config)
        opened = open_checkpoints(merge_yaml.models(config), options, config.base_model)
        job = Job(config, opened, check_plan(config, opened, options))
    check_copied_tokenizer(config, options)
    return job
