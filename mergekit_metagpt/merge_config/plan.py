"""Plans and runs merges by mergekit; finds the coefficients of each output tensor."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from mergekit import merge_methods
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import (
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.plan import MergePlanner

from mergekit_metagpt.method import group_norms
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


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one output tensor.

    Attributes:
        planned: the tensor.
        shares: coefficients before `lambda` scales them, of the models that have the
            tensor; empty if only the base has it.
        scale: `lambda`, or the value of `lambda: keep`.
        error: largest standard error of a share; None if they are exact.
    """

    planned: Planned
    shares: Mapping[ModelReference, float]
    scale: float
    error: float | None = None


def versions() -> dict[str, str]:
    """Return the versions of the packages on which the bits of a merge depend."""
    packages = ("mergekit-metagpt", "mergekit", "torch", "transformers")
    return {package: version(package) for package in packages}


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
    with mergekits_errors(), _without_its_own_noise():
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


def coefficients(planned: Sequence[Planned]) -> list[Coefficients]:
    """Find the coefficients of every output tensor of our methods, without merging.

    Tensors are read only under `granularity: tensor`, and if they are optional, to see
    which models have them. Raises a ValueError or OSError as the merge itself.
    """
    of_tensors: dict[int, Coefficients] = {}
    reading: dict[Task[Any], int] = {}
    for at, tensor in enumerate(planned):
        task = tensor.task
        if tensor.settings.granularity == "tensor" or task.output_weight.optional:
            reading[_Weighing(planned=task)] = at
        else:
            names = dict.fromkeys(tensor.input_names, torch.empty(0, device="cpu"))
            of_tensors[at] = Coefficients(tensor, *_weighted(task, names))
    if reading:
        executor = Executor(list(reading), math_device="cpu", storage_device="cpu")
        for task, weighted in executor.run(quiet=True):
            at = reading[task]
            of_tensors[at] = Coefficients(planned[at], *weighted)
    return [of_tensors[at] for at in range(len(planned))]


class _Weighing(Task[Any]):
    """Gathers the inputs of a tensor as the merge does, and weights them."""

    planned: ExecuteMergeMethodTask

    def arguments(self) -> dict[str, Task[Any]]:
        return {"tensors": self.planned.gather_tensors}

    def execute(self, tensors: Mapping[Any, torch.Tensor]) -> Any:
        return _weighted(self.planned, tensors)


def _weighted(
    task: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, torch.Tensor]
) -> tuple[Mapping[ModelReference, float], float, float | None]:
    """Shares, scale and error of a tensor, as in `Coefficients`."""
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
    measured = group_norms.of_group(group, settings)
    weight = torch.tensor(weights, dtype=torch.float64, device="cpu")
    shares = settings.shares(measured.sq_norms if measured else None, weight)
    error = None
    if measured and measured.covariance is not None:
        errors = settings.share_errors(measured.sq_norms, measured.covariance, weight)
        error = float(errors.max())
    scale = settings.factor(shares, measured.gram if measured else None).item()
    return dict(zip(models, shares.tolist(), strict=True)), scale, error


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


def already_warned(
    config: MergeConfiguration, *, warned: bool
) -> AbstractContextManager[None]:
    """Return a context in which our method logs no warnings if `warned` is true."""
    if not warned:
        return nullcontext()
    watch = merge_methods.get(config.merge_method).watch
    return watch.already_warned()


@contextmanager
def _without_its_own_noise() -> Iterator[None]:
    """Drop a warning of transformers that mergekit's own code causes."""

    def keep(record: logging.LogRecord) -> bool:
        return "`torch_dtype` is deprecated" not in record.getMessage()

    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


class _DoneEvent(threading.Event):
    """Is set only once a queue is empty, too."""

    def __init__(self, queue: Any) -> None:
        super().__init__()
        self._queue = queue

    def is_set(self) -> bool:
        return super().is_set() and self._queue.empty()


class _KeepingAllResults(MultiGPUExecutor):
    """mergekit's executor for several devices, without its loss of results.

    Its thread that collects results stops when all devices are done, even if some of
    their results still wait in its queue. Their tensors are then merged again, but
    without inputs that were used up: most such merges fail ("No value for required
    tensor"), some leave models out.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.done_event = _DoneEvent(self.task_completion_queue)


def run(
    config: MergeConfiguration,
    out: str,
    options: MergeOptions,
    *,
    source: str,
    warned: bool,
) -> None:
    """Run mergekit's merge into the folder `out`, with the YAML for the model card.

    `warned` says whether all warnings on the coefficients were logged already.
    """
    patched = patch("mergekit.merge.MultiGPUExecutor", _KeepingAllResults)
    with already_warned(config, warned=warned), patched:
        _run(config, out, options, source)


def _run(
    config: MergeConfiguration, out: str, options: MergeOptions, source: str
) -> None:
    from mergekit.merge import run_merge

    with mergekits_errors(), _without_its_own_noise():
        run_merge(config, out, options, config_source=source)


class _WithoutTensors(MergePlanner):
    """mergekit's planner for a merge whose tensors have been written already."""

    def plan_to_disk(self, out_path: str) -> list[Task[Any]]:
        return [self._tokenizer_task] if self._tokenizer_task else []


def run_without_tensors(
    config: MergeConfiguration, out: str, options: MergeOptions, *, source: str
) -> None:
    """Let mergekit write configuration, tokenizer and card of a merge, but no tensors.

    Raises a ValueError if mergekit cannot make them; an OSError if a file cannot be
    written.
    """
    with patch("mergekit.merge.MergePlanner", _WithoutTensors):
        _run(config, out, options, source)
