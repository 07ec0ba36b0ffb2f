"""How ranks share a merge: which tensors each merges, and in which files they go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, SaveTensor

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import sources, stored_as
from mergekit_metagpt.merge_config import plan, running
from mergekit_metagpt.merge_config.replaying import draws

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

# Options on which the bits of a merge depend, or the form of the files.
_OPTIONS = (
    *("allow_crimes", "device", "lora_merge_dtype", "random_seed"),
    *("safe_serialization", "unsafe_truncate_embeddings"),
)


@dataclass(frozen=True)
class Part:
    """One output tensor.

    Attributes:
        task: mergekit's, which merges and saves it.
        read: bytes of its inputs.
        written: bytes of itself, as far as headers tell.
        drawn: random numbers that its merge draws.
    """

    task: SaveTensor
    read: int
    written: int
    drawn: int


@dataclass(frozen=True)
class Shard:
    """A file of the merged model.

    Attributes:
        key: stands for its tensors and for all that their bits depend on.
        rank: which rank writes it.
        parts: positions of its tensors among all parts, ascending.
    """

    key: str
    rank: int
    parts: tuple[int, ...]


def check_shared(config: MergeConfiguration, options: MergeOptions) -> None:
    """Raise a ValueError if method or options cannot be split between processes."""
    method = config.merge_method
    if options.multi_gpu:
        raise ValueError(
            "--multi-gpu (also by --gpu-rich) and ranks are both given; expected one "
            "of them. Give --cuda: each rank takes a GPU of its own"
        )
    if method == "arcee_fusion":
        raise ValueError(
            "arcee_fusion samples its thresholds at random, tensor after tensor, and "
            "cannot be split between ranks. Merge it in one process: mergekit-yaml"
        )
    if not draws(config):
        return
    why = f"{method} draws random numbers, which all ranks must draw alike"
    if options.random_seed is None:
        raise ValueError(f"{why}: give --random-seed N")
    if torch.device(options.device or "cpu").type != "cpu":
        raise ValueError(f"{why}: leave --cuda and --device out")
    if (
        config.tokenizer_source
        or config.tokenizer
        or options.unsafe_truncate_embeddings
    ):
        raise ValueError(
            f"{why}, and nobody knows the size of embeddings before their tokenizer is "
            "made. Leave the tokenizer out of the YAML, or merge in one process"
        )


def parts_of(
    config: MergeConfiguration,
    options: MergeOptions,
    planned: Sequence[plan.Planned],
    opened: Mapping[ModelReference, Checkpoint],
) -> list[Part]:
    """List the output tensors of a merge in the order in which it merges them.

    Raises a ValueError if mergekit refuses the merge.
    """
    tasks = plan.tasks(config, options)
    saving = [task for task in tasks if isinstance(task, SaveTensor)]
    random = draws(config)
    parts = {
        task: _part(task, tensor, opened, config, random)
        for task, tensor in zip(saving, planned, strict=True)
    }
    if not random:
        return sorted(parts.values(), key=lambda part: part.task.tensor_name)
    # mergekit sets its seed once: only its own order gives the same numbers.
    merged = {task.tensor_task: part for task, part in parts.items()}
    order = (handle.task() for handle in Executor(tasks).schedule.tasks)
    return [merged[task] for task in order if task in merged]


def _part(
    task: SaveTensor,
    tensor: plan.Planned,
    opened: Mapping[ModelReference, Checkpoint],
    config: MergeConfiguration,
    random: bool,
) -> Part:
    read = drawn = 0
    for model, weight in tensor.input_names.items():
        stored = stored_as(opened[model], weight)
        if stored is None:
            continue
        read += sum(held.numel * held.dtype.itemsize for held in sources(stored))
        if random and model != tensor.task.base_model and _draws(tensor, model):
            drawn += torch.Size(stored.shape).numel()
    assert not random or isinstance(tensor.task.gather_tensors, GatherTensors)
    return Part(task, read, written(config, tensor, opened), drawn)


def written(
    config: MergeConfiguration,
    tensor: plan.Planned,
    opened: Mapping[ModelReference, Checkpoint],
) -> int:
    """Bytes of an output tensor, as far as headers tell."""
    from mergekit.common import dtype_from_name

    name = tensor.task.output_weight.force_dtype or config.out_dtype or config.dtype
    dtype = dtype_from_name(name)
    inputs = (stored_as(opened[at], name) for at, name in tensor.input_names.items())
    return max(
        (
            torch.Size(stored.shape).numel() * (dtype or stored.dtype).itemsize
            for stored in inputs
            if stored is not None
        ),
        default=0,
    )


def _draws(tensor: plan.Planned, model: ModelReference) -> bool:
    """Whether mergekit draws a number for each element of this model's tensor."""
    density = tensor.task.input_parameters[model]["density"]
    drops_none = density >= 1
    # `della` does not draw where nothing is kept, `dare` does.
    keeps_none = density <= 0 and "della" in tensor.task.method_name
    return not (drops_none or keeps_none)


def skip(count: int) -> None:
    """Draw the random numbers of tensors that another rank merges, one an element."""
    # Each takes one draw of torch's generator, as in `torch.bernoulli`, in less time.
    numbers = torch.empty(min(count, 1 << 20), dtype=torch.uint8, device="cpu")
    while count > 0:
        numbers[: min(count, 1 << 20)].random_(0, 2)
        count -= 1 << 20


def digest(
    config: MergeConfiguration,
    options: MergeOptions,
    opened: Mapping[ModelReference, Checkpoint],
) -> str:
    """Return SHA-256, in hexadecimal, of all that the bits of a merge depend on.

    Raises an OSError if a file cannot be read.
    """
    content: list[Any] = [
        list(running.versions().values()),
        config.model_dump_json(),
        options.model_dump(include=set(_OPTIONS)),
        torch.get_num_threads(),
        sorted([str(model), at.digest] for model, at in opened.items()),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shards_of(
    parts: Sequence[Part], owners: Sequence[int], most: int, digest: str
) -> Iterator[Shard]:
    """Put the tensors of each rank into files.

    Args:
        parts: of the merge.
        owners: the rank of each part.
        most: bytes of a file, unless a single tensor has more.
        digest: of all that the bits of the merge depend on.

    Yields:
        the files, rank by rank.
    """
    for rank in sorted(set(owners)):
        taken: list[int] = []
        size = 0
        for at, part in enumerate(parts):
            if owners[at] != rank:
                continue
            if taken and most > 0 and size + part.written > most:
                yield _shard(parts, taken, rank, digest)
                taken, size = [], 0
            taken.append(at)
            size += part.written
        yield _shard(parts, taken, rank, digest)


def _shard(
    parts: Sequence[Part], taken: Sequence[int], rank: int, digest: str
) -> Shard:
    names = [parts[at].task.tensor_name for at in taken]
    key = hashlib.sha256(json.dumps([digest, names]).encode()).hexdigest()
    return Shard(key[:20], rank, tuple(taken))
