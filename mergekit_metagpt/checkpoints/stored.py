"""Describes stored tensors: name, file, dtype and shape, without their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

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
