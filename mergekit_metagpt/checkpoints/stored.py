"""Describes stored tensors: name, file, dtype and shape, without their values."""

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
SAFETENSORS_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
PACKED_SUFFIXES = ("weight", "qweight", "qzeros", "weight_packed", "blocks")
FLOATS = frozenset(SAFETENSORS_FLOATS.values())


@dataclass(frozen=True)
class StoredTensor:
    """A floating-point tensor in a file: its stored name, file, dtype and shape.

    `shares` names an earlier tensor of the same file with the same memory (pickles).
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
    """A tensor that is stored in another layout, as single experts instead of fused.

    transformers' conversion rules of `model_type` make it from `sources`, as when
    mergekit loads it.
    """

    name: str
    model_type: str
    sources: tuple[StoredTensor, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """One of the files that hold it, for messages."""
        return self.sources[0].file


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: s B A.

    Attributes:
        module: whose weight it is.
        down: A, shape `(r, columns)`; of E experts `(E * r, columns)`.
        up: B, shape `(rows, r)`; of E experts `(rows, r * E)`.
        rank: r.
        scale: s.
        embedding: whether the weight is that of an embedding, to which (B A)' is added.
        copy: the weight of the base, where the adapter stores that too.
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
        """E; 1 for a weight that is no stack of experts."""
        return self.down.shape[0] // self.rank

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of what is added, (B A)' for an embedding."""
        sides = self.up.shape[0], self.down.shape[1]
        return sides[::-1] if self.embedding else sides


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: where it lies.
        factors: by the names of the weights that it adapts.
        config: its adapter_config.json.
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


@dataclass(frozen=True)
class FileHeader:
    """What a file holds: names of all tensors, and those of floating point.

    `tensors` are in the order of their bytes. `nested` is whether some lie where
    mergekit does not look for them: under a `state_dict` of a pickle.
    """

    names: frozenset[str]
    tensors: tuple[StoredTensor, ...]
    nested: bool = False


def layer_key(name: str) -> str:
    """Return the pool of a tensor under `granularity: layer`.

    The prefix of the name up to and including its first integer component, or the
    whole name where there is none.

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
