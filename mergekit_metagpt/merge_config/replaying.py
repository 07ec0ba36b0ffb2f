"""Compares a merged model on disk with its plan, and its tensors with a new merge."""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mergekit.graph import Executor, TaskUniverse
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import GatherTensors, SaveTensor

from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.checkpoints.stored import StoredTensor, dtype_name
from mergekit_metagpt.merge_config import plan
from mergekit_metagpt.merge_config.jobs import Job
from mergekit_metagpt.method.composed import RANDOM

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")
# Integers of the same width, to compare the bits of elements.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A tensor that differs from what the merge would write.

    Attributes:
        name: name of the tensor.
        what: the difference in words.
        largest: largest difference of an element; None if shape or dtype differ.
    """

    name: str
    what: str
    largest: float | None = None


@dataclass(frozen=True)
class Result:
    """The headers of a merged model.

    Attributes:
        folder: its folder.
        files: number of its files of weights.
        bytes: size of these files together.
        headers: tensors by stored name; None for those that are not floating-point.
    """

    folder: Path
    files: int
    bytes: int
    headers: Mapping[str, StoredTensor | None]

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some of the floating-point tensors."""
        held = (self.headers[name] for name in names)
        return sum(tensor.numel * tensor.dtype.itemsize for tensor in held if tensor)


def open_result(folder: Path) -> Result:
    """Open a merged model, reading headers only.

    Raises a ValueError if it holds no weights, or its config.json is unreadable; an
    OSError if a file is missing, truncated or corrupt.
    """
    from mergekit.common import ModelReference

    config = folder / "config.json"
    try:
        json.loads(config.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{config} is missing") from error
    except ValueError as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    # Not `parse`: a folder's name may hold a `+` or an `@`.
    reference = ModelReference.model_validate({"model": {"path": str(folder)}})
    opened = open_checkpoint(reference)
    return Result(
        folder=folder,
        files=len(opened.identity),
        bytes=sum(file.size for file in opened.identity),
        headers={
            **dict.fromkeys(opened.others),
            **{tensor.name: tensor for tensor in opened.tensors.values()},
        },
    )


def headers_differ(job: Job, result: Result) -> Iterator[Difference]:
    """Compare the headers of a merged model with the plan of the merge.

    Yields planned tensors that are missing or have another shape or precision, and
    tensors that are not planned.
    """
    expected = set(job.expected)
    for tensor in job.planned:
        name = tensor.name
        if name not in expected:
            continue
        if name not in result.headers:
            yield Difference(name, "is missing")
            continue
        header, held = _header(tensor, job), result.headers[name]
        if header is None or held is None:  # only a replay can tell
            continue
        shape, dtype = header
        if len(held.shape) != len(shape) or any(
            size not in (None, own) for own, size in zip(held.shape, shape, strict=True)
        ):
            yield Difference(name, f"is {list(held.shape)}, expected {list(shape)}")
        elif held.dtype != dtype:
            yield Difference(
                name, f"is {dtype_name(held.dtype)}, expected {dtype_name(dtype)}"
            )
    planned = {tensor.name for tensor in job.planned}
    for name in sorted(result.headers.keys() - planned):
        yield Difference(name, "is not in the plan")


def _header(
    tensor: plan.Planned, job: Job
) -> tuple[list[int | None], torch.dtype] | None:
    """Shape and precision in which a tensor is written, or None for integers.

    An axis whose size depends on the tokenizer has the size None.
    """
    from mergekit.common import dtype_from_name

    task, weight = tensor.task, tensor.task.output_weight
    stored = {}
    for model, name in tensor.input_names.items():
        if name in job.opened[model].others:
            return None
        if held := stored_as(job.opened[model], name):
            stored[model] = held
    assert task.base_model is not None  # our methods have one
    shape: list[int | None] = list(stored[task.base_model].shape)
    if not isinstance(task.gather_tensors, GatherTensors):
        assert weight.vocabulary_axis is not None
        shape[weight.vocabulary_axis] = None
    name = weight.force_dtype or job.config.out_dtype or job.config.dtype
    dtypes = (held.dtype for held in stored.values())
    return shape, dtype_from_name(name) or reduce(torch.promote_types, dtypes)


def sample(result: Result, names: Collection[str], most: int, seed: int) -> set[str]:
    """Choose tensors of a merged model: one of every kind, then others at random.

    Tensors are of one kind if their names differ only in numbers.

    Args:
        result: the merged model.
        names: names to choose from.
        most: size of the sample in bytes, unless one of every kind needs more.
        seed: seed of the choice.

    Returns:
        names of the sample.
    """
    order = sorted(names)
    random.Random(seed).shuffle(order)
    of_kind = {re.sub(r"\d+", "", name): name for name in order}
    sampled = set(of_kind.values())
    left = most - result.size(sampled)
    for name in order:
        if name not in sampled and (size := result.size([name])) <= left:
            sampled.add(name)
            left -= size
    return sampled


def draws(config: MergeConfiguration) -> bool:
    """Whether a merge draws random numbers, in the order of its tensors."""
    return config.merge_method.removeprefix("metagpt_") in RANDOM


def has_device(name: str) -> bool:
    """Whether torch can compute on this device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
        return False
    return True


def replay(
    config: MergeConfiguration,
    options: MergeOptions,
    folder: Path,
    names: Collection[str],
) -> Sequence[Difference]:
    """Let mergekit merge tensors again, and compare them with those of a merged model.

    mergekit's own tasks run in its own order, up to the cast to `out_dtype`, after
    the seed is set as in `run_merge`.

    Args:
        config: mergekit's configuration.
        options: mergekit's options.
        folder: folder of the merged model.
        names: tensors to compare. A merge that draws random numbers is repeated whole.

    Returns:
        the tensors that differ in any bit.

    Raises:
        ValueError: the merge cannot be repeated.
        OSError: a file cannot be read.
    """
    import transformers

    comparison = _Comparison(folder, names)
    with _silence(), plan.mergekits_errors():
        tasks = plan.tasks(config, options)
        saving = [task for task in tasks if isinstance(task, SaveTensor)]
        if not draws(config):
            tasks = saving = [task for task in saving if task.tensor_name in names]
        universe = TaskUniverse(tasks)
        # The comparison takes the place of mergekit's writer.
        writers = {universe.add_task(task.writer_task) for task in saving}
        executor = Executor(
            [universe.add_task(task) for task in tasks],
            math_device=options.device,
            storage_device="cpu",
            cached_values=dict.fromkeys(writers, comparison),
        )
        if options.random_seed is not None:
            transformers.trainer_utils.set_seed(options.random_seed)
        for _ in executor.run(quiet=not sys.stderr.isatty(), desc="Replaying"):
            pass
    return comparison.differences


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the method from logging the coefficients again."""
    level = LOG.level
    LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOG.setLevel(level)


class _Comparison:
    """Takes tensors as mergekit's TensorWriter does, and compares them."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        index = ShardedTensorIndex.from_disk(str(folder))
        self._stored = LazyTensorLoader(index, lazy_unpickle=False)
        self._names = names
        self.differences: list[Difference] = []

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        if name in self._names:
            stored = self._stored.get_tensor(name)
            if difference := _difference(name, stored, tensor):
                self.differences.append(difference)

    def finalize(self) -> None:
        """Do nothing: there is no file to complete."""


def _difference(
    name: str, stored: torch.Tensor, replayed: torch.Tensor
) -> Difference | None:
    headers = [f"{dtype_name(t.dtype)} {list(t.shape)}" for t in (stored, replayed)]
    if headers[0] != headers[1]:
        return Difference(name, f"is {headers[0]}, replayed {headers[1]}")
    bits = _BITS[stored.dtype.itemsize]
    ours, theirs = (t.reshape(-1).view(bits) for t in (stored, replayed))
    places = ours != theirs
    count = int(places.sum())
    if not count:
        return None
    pair = (t.reshape(-1)[places].double() for t in (stored, replayed))
    largest = float(torch.sub(*pair).abs().max())
    return Difference(name, f"differs in {count:,} of {stored.numel():,}", largest)
