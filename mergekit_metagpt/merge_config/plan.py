"""mergekit's own plan of a merge: every output tensor, with its parameters."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner

from mergekit_metagpt.method.settings import Settings

if TYPE_CHECKING:
    from mergekit.architecture import WeightInfo
    from mergekit.common import ModelReference
    from mergekit.config import ConfigReader, MergeConfiguration, OutputModuleDefinition
    from mergekit.options import MergeOptions

# Wings whose code runs within mergekit's merge.
_OURS = tuple(
    f"mergekit_metagpt.{wing}."
    for wing in ("method", "scanning", "checkpoints", "arithmetic")
)


@dataclass(frozen=True)
class Planned:
    """An output tensor in mergekit's plan.

    Attributes:
        module: module of the architecture.
        slice_number: number of the output slice that it belongs to.
        input_names: its name in each model.
        task: mergekit's task, with parameters resolved for this tensor.
    """

    module: str
    slice_number: int
    input_names: Mapping[ModelReference, str]
    task: ExecuteMergeMethodTask

    @property
    def name(self) -> str:
        """Its name in the output."""
        return self.task.output_weight.name

    @property
    def settings(self) -> Settings:
        """Settings of the closed form for this tensor."""
        return Settings.of(self.task.parameters)

    @property
    def weights(self) -> dict[ModelReference, float]:
        """The weight of each model beside the base."""
        return {
            model: values["weight"]
            for model, values in self.task.input_parameters.items()
            if "weight" in values and model != self.task.base_model
        }


class _Planner(MergePlanner):
    """mergekit's planner, which also notes module, slice and names of each tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planned: list[Planned] = []
        self._module = ""

    def plan_module(self, module_name: str, definition: OutputModuleDefinition) -> None:
        self._module = module_name
        super().plan_module(module_name, definition)

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        before = len(self._tensors)
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        slices = cfg_reader.module.slices
        (number,) = (n for n, at in enumerate(slices) if at is cfg_reader.slice_out)
        # Not strict: for tensors after the layers, mergekit passes the models of the
        # last slice and as many inputs as the first has, and merges what it can pair.
        names = dict(zip(models, (w.name for w in weights_in), strict=False))
        for _, task in self._tensors[before:]:
            self.planned.append(Planned(self._module, number, names, task))


def plan_merge(config: MergeConfiguration, options: MergeOptions) -> list[Planned]:
    """Plan every output tensor as mergekit does; execute none, and change no argument.

    Raises a ValueError if the inputs do not fit each other.
    """
    return _plan(config, options)[0]


def tasks(config: MergeConfiguration, options: MergeOptions) -> list[Task[Any]]:
    """Return the tasks that mergekit would execute for a merge, in its order.

    They are a `SaveTensor` for every output tensor, and what follows them. Raises a
    ValueError if the inputs do not fit each other.
    """
    return _plan(config, options)[1]


def _plan(
    config: MergeConfiguration, options: MergeOptions
) -> tuple[list[Planned], list[Task[Any]]]:
    from mergekit.architecture import get_architecture_info
    from mergekit.merge import _model_out_config

    config = config.model_copy(deep=True)
    LoaderCache().setup(options)
    with mergekits_errors(), without_its_own_noise():
        architecture = get_architecture_info(config, options)
        for model in config.referenced_models():
            LoaderCache().get(model)
        planner = _Planner(
            config,
            architecture,
            options=options,
            out_model_config=_model_out_config(
                config, architecture, trust_remote_code=options.trust_remote_code
            ),
        )
        tasks = planner.plan_to_disk(out_path="")
        return planner.planned, tasks


def names_in(planned: Sequence[Planned], model: ModelReference) -> set[str]:
    """Return the names under which a planned merge reads a model's tensors."""
    return {t.input_names[model] for t in planned if model in t.input_names}


@contextmanager
def mergekits_errors() -> Iterator[None]:
    """Turn errors of mergekit and torch, whatever their type, into ValueErrors.

    Errors in this package's own code are raised unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"mergekit: {error}") from error
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        modules = {frame.f_globals.get("__name__", "") for frame, _ in frames}
        if any(name.startswith(_OURS) for name in modules):
            raise
        raise ValueError(f"mergekit: {type(error).__name__}: {error}") from error


@contextmanager
def without_its_own_noise() -> Iterator[None]:
    """Drop a warning of transformers that mergekit's own code causes."""

    def keep(record: logging.LogRecord) -> bool:
        return "`torch_dtype` is deprecated" not in record.getMessage()

    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
