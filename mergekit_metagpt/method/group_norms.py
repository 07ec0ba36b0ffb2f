"""Finds n_t of one tensor group of a merge from files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.checkpoints.stored import layer_key
from mergekit_metagpt.method.inputs import (
    base_of,
    require_finite,
)
from mergekit_metagpt.method.parameters import Settings
from mergekit_metagpt.scanning.pools import (
    idle_parts,
    is_embedding,
    is_excluded,
)

if TYPE_CHECKING:
    from mergekit_metagpt.scanning.results import PairNorms


@dataclass(frozen=True)
class Measured:
    """Squared norms of one pool.

    Attributes:
        sq_norms: n_t, shape `(K,)`, float64, on the CPU.
        embeddings: the share of each n_t that token embeddings and heads hold, where
            the pool is a whole stored model; else empty.
        idle: parts of `exclude` that are in the name of no stored tensor.
    """

    sq_norms: torch.Tensor
    embeddings: tuple[float, ...] = ()
    idle: tuple[str, ...] = ()


def forget_failures() -> None:
    """Let a new merge try again what failed in an earlier one."""
    from mergekit_metagpt.scanning import once

    once.forget_failures()


def of_group(group: TensorGroup, settings: Settings) -> Measured | None:
    """n_t of one group of a merge from files: of its checkpoints, or its own.

    Args:
        group: the inputs that make one output tensor.
        settings: its granularity, power and exclude.

    Returns:
        n_t of the pool, or None where norms do not matter: power 0, no model
        beside the base, or a pool of which `exclude` leaves nothing.

    Raises:
        ValueError: a weight is NaN or infinite; the checkpoints are not open, or
            hold nothing of this layer.
        OSError: a checkpoint cannot be read or has changed.
    """
    if not group.non_base:
        return None
    if settings.power == 0:
        require_finite(group)
        return None
    if settings.granularity == "tensor":
        if is_excluded(group.metadata.name or "", settings.exclude):
            require_finite(group)
            return None
        return Measured(_own_sq_norms(group))
    return _stored_sq_norms(group, settings)


def _own_sq_norms(group: TensorGroup) -> torch.Tensor:
    for entry in group.entries:
        if not entry.tensor.is_floating_point():
            raise TypeError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} is "
                f"{entry.tensor.dtype}; MetaGPT merges floating-point tensors"
            )
    tuned = [entry.tensor for entry in group.non_base]
    norms = squared_norms.sq_norms(base_of(group).tensor, tuned)
    if not bool(torch.isfinite(norms).all()):
        require_finite(group)
        raise ValueError(
            f"||tau||^2 of {group.metadata.name or 'a tensor'} exceeds float64: "
            "weights differ from the base's by more than 1e150"
        )
    return norms


def _stored_sq_norms(group: TensorGroup, settings: Settings) -> Measured | None:
    from mergekit_metagpt.checkpoints import opening
    from mergekit_metagpt.scanning import once

    opened = {entry.id: opening.already_open(entry.id) for entry in group.entries}
    if missing := [str(model) for model, found in opened.items() if found is None]:
        raise ValueError(
            f"granularity {settings.granularity!r} measures stored checkpoints, but "
            f"mergekit has none open for {', '.join(missing)}. Give models as files, "
            "or use granularity: tensor"
        )
    known = {model: found for model, found in opened.items() if found is not None}
    base = known.pop(base_of(group).id)
    pairs = once.pair_norms(base, list(known.values()))
    if settings.granularity == "model":
        pools = [_pooled(pair, None, settings.exclude) for pair in pairs]
        embeddings = tuple(of_them / (n or 1.0) for n, of_them in pools)
    else:
        name = group.metadata.name or ""
        keys = [pair.layer_of(name) for pair in pairs]
        if any(
            _pooled(pair, key, ())[0] is None
            for pair, key in zip(pairs, keys, strict=True)
        ):
            raise ValueError(
                f"granularity 'layer': no stored tensor of {base.label} belongs to "
                f"the layer of {name}. Use granularity: model or granularity: tensor"
            )
        pools = [
            _pooled(pair, key, settings.exclude)
            for pair, key in zip(pairs, keys, strict=True)
        ]
        embeddings = ()
    if all(n is None for n, _ in pools):
        return None
    values = torch.tensor(
        [n or 0.0 for n, _ in pools], dtype=torch.float64, device="cpu"
    )
    idle = [set(_idle(pair, settings.exclude)) for pair in pairs]
    return Measured(values, embeddings, tuple(sorted(set.intersection(*idle))))


@functools.lru_cache(maxsize=1 << 10)
def _idle(pair: PairNorms, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of `exclude` that are in no name of what base and model share."""
    return idle_parts(exclude, pair.counted_as)


@functools.lru_cache(maxsize=1 << 16)
def _pooled(
    pair: PairNorms, key: str | None, exclude: tuple[str, ...]
) -> tuple[float | None, float]:
    """Sum over a layer, or the model; None if nothing counts. And the embeddings'."""
    chosen = {
        name: value
        for name, value in pair.sq_norms.items()
        if (key is None or layer_key(name) == key) and not is_excluded(name, exclude)
    }
    embeddings = sum(value for name, value in chosen.items() if is_embedding(name))
    return (sum(chosen.values()) if chosen else None), embeddings
