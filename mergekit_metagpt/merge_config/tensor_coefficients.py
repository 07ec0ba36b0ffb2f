"""The coefficients of each output tensor of a merge, without merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mergekit import merge_methods
from mergekit.graph import Executor, Task
from mergekit.merge_methods.base import (
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_metagpt.merge_config.plan import Planned
from mergekit_metagpt.method import group_norms
from mergekit_metagpt.method.settings import Settings

if TYPE_CHECKING:
    from mergekit.common import ModelReference


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one output tensor.

    Attributes:
        planned: the tensor.
        shares: coefficients before `lambda` scales them, of the models that have the
            tensor; empty if only the base has it.
        scale: `lambda`, or the value of `lambda: keep`.
        errors: standard errors of the shares; None if they are exact.
    """

    planned: Planned
    shares: Mapping[ModelReference, float]
    scale: float
    errors: Mapping[ModelReference, float] | None = None


def of_plan(planned: Sequence[Planned]) -> list[Coefficients]:
    """Find the coefficients of every output tensor of our methods, without merging.

    Tensors are read only under `granularity: tensor`, and if they are optional, to see
    which models have them. Raises a ValueError or OSError as the merge itself.
    """
    found: dict[int, Coefficients] = {}
    reading: dict[Task[Any], int] = {}
    for at, tensor in enumerate(planned):
        task = tensor.task
        if tensor.settings.granularity == "tensor" or task.output_weight.optional:
            reading[_Weighing(planned=task)] = at
        else:
            names = dict.fromkeys(tensor.input_names, torch.empty(0, device="cpu"))
            found[at] = Coefficients(tensor, *_weighted(task, names))
    if reading:
        executor = Executor(list(reading), math_device="cpu", storage_device="cpu")
        for task, weighted in executor.run(quiet=True):
            at = reading[task]
            found[at] = Coefficients(planned[at], *weighted)
    return [found[at] for at in range(len(planned))]


class _Weighing(Task[Any]):
    """Gathers the inputs of a tensor as the merge does, and weights them."""

    planned: ExecuteMergeMethodTask

    def arguments(self) -> dict[str, Task[Any]]:
        return {"tensors": self.planned.gather_tensors}

    def execute(self, tensors: Mapping[Any, torch.Tensor]) -> Any:
        return _weighted(self.planned, tensors)


def _weighted(
    task: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, torch.Tensor]
) -> tuple[
    Mapping[ModelReference, float], float, Mapping[ModelReference, float] | None
]:
    """Shares, scale and errors of a tensor, as in `Coefficients`."""
    present: Sequence[ModelReference] = [m for m in task.model_order if m in tensors]
    method = merge_methods.get(task.method_name)
    method.validate_inputs(present, task.base_model, group_name=task.output_weight.name)
    group = TensorGroup(
        tuple(
            TensorEntry(model, tensors[model], is_base=model == task.base_model)
            for model in present
        ),
        TensorMetadata.from_weight_info(task.output_weight),
    )
    if not group.non_base or not all(t.is_floating_point() for t in tensors.values()):
        return {}, 1.0, None
    models = [entry.id for entry in group.non_base]
    weights = [task.input_parameters[model]["weight"] for model in models]
    settings = Settings.of(task.parameters)
    weight = torch.tensor(weights, dtype=torch.float64, device="cpu")
    weighed = group_norms.weigh(group_norms.of_group(group, settings), settings, weight)
    errors = None
    if weighed.errors is not None:
        errors = dict(zip(models, weighed.errors.tolist(), strict=True))
    shares = dict(zip(models, weighed.shares.tolist(), strict=True))
    return shares, weighed.scale.item(), errors
