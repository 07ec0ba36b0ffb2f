"""Describes stored tensors by name, file, dtype and shape, never by their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAFETENSORS_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PACKED_SUFFIXES = ("weight", "qweight", "qzeros", "weight_packed", "blocks")
FLOATS = frozenset(SAFETENSORS_FLOATS.values())


@dataclass(frozen=True)
class StoredTensor:
    """A floating-point tensor in a file.

    Attributes:
        name: under which the file stores it.
        file: the file.
        dtype: of its elements.
        shape: of the tensor.
        shares: the first tensor of a pickle with the same memory, if another is.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    shares: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ConvertedTensor:
    """A tensor stored in another layout, such as single experts instead of fused ones.

    transformers' conversion rules for `model_type` make it from `sources`, as they do
    when mergekit loads it.
    """

    name: str
    model_type: str
    sources: tuple[StoredTensor, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """One of the files of its sources, for messages."""
        return self.sources[0].file


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: s B A.

    Attributes:
        module: the module of the weight.
        down: A, shape `(r, columns)`, or `(E * r, columns)` for E experts.
        up: B, shape `(rows, r)`, or `(rows, r * E)` for E experts.
        rank: r.
        scale: s.
        embedding: whether the module is an embedding, to which s (B A)' is added.
        copy: the base's weight, if the adapter stores a copy of it.
    """

    module: str
    down: StoredTensor
    up: StoredTensor
    rank: int
    scale: float
    embedding: bool = False
    copy: StoredTensor | None = None

    @property
    def experts(self) -> int:
        """E; 1 for a weight that is not a stack of experts."""
        return self.down.shape[0] // self.rank

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        sides = self.up.shape[0], self.down.shape[1]
        return sides[::-1] if self.embedding else sides


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: the folder of its files.
        factors: what it adds to each weight, by the weight's name.
        config: content of its adapter_config.json.
    """

    folder: Path
    factors: Mapping[str, Factors]
    config: Mapping[str, Any]


def quantised(label: str, why: str) -> ValueError:
    """Return the error for a model whose weights are not floating point."""
    return ValueError(
        f"{label} is quantised ({why}); MetaGPT measures floating-point weights. "
        "Dequantise it first, or name the unquantised model"
    )


def missing(file: Path) -> FileNotFoundError:
    """Return the error for a file that a model's index names, but that is not there."""
    return FileNotFoundError(
        f"{file} is missing; it is part of the model by its index. Fetch or make it "
        "again"
    )


def corrupt(file: Path, error: Exception) -> OSError:
    """Return the error for a file that cannot be read, with the reader's own words."""
    return OSError(
        f"{file} cannot be read: {error}. It is truncated or corrupt: fetch or make it "
        "again"
    )


def not_finite(label: str, stored: StoredTensor | ConvertedTensor) -> ValueError:
    """Return the error for a weight that is NaN or infinite."""
    return ValueError(
        f"{stored.name} of {label} holds NaN or infinity (in {stored.file}); a merge "
        "would spread it. Repair or replace it"
    )


@dataclass(frozen=True)
class FileHeader:
    """What a file holds.

    Attributes:
        names: of all tensors.
        tensors: those of floating point, in the order of their bytes.
        nested: whether a pickle holds tensors under `state_dict`, where mergekit does
            not look for them.
    """

    names: frozenset[str]
    tensors: tuple[StoredTensor, ...]
    nested: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision as a merge YAML has it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def layer_key(name: str) -> str:
    """Return the pool of a tensor under `granularity: layer`.

    This is the name up to and including its first integer component, or the whole name
    if it has none.

    Args:
        name: of a tensor.

    Returns:
        the pool's name.

    Example:
        >>> layer_key("model.layers.12.mlp.up_proj.weight")
        'model.layers.12'
        >>> layer_key("lm_head.weight")
        'lm_head.weight'
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return name
