"""Finds n_t of one tensor group of a merge from files: stored, or at hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.method.inputs import base_of, is_unchanged, require_finite
from mergekit_metagpt.method.parameters import require_named

if TYPE_CHECKING:
    from mergekit_metagpt.method.settings import Settings
    from mergekit_metagpt.scanning.results import ScanResult


@dataclass(frozen=True)
class Measured:
    """Squared norms of one pool.

    Attributes:
        sq_norms: n_t, shape `(K,)`, float64, on the CPU.
        whole: what was measured of whole stored models, where they are the pool.
        gram: inner products, shape `(K, K)`, float64, where `lambda` needs them.
    """

    sq_norms: torch.Tensor
    whole: ScanResult | None = None
    gram: torch.Tensor | None = None


def of_group(group: TensorGroup, settings: Settings) -> Measured | None:
    """n_t of one group of a merge from files: of its checkpoints, or its own.

    Args:
        group: the inputs that make one output tensor.
        settings: of the group.

    Returns:
        n_t of the pool, or None where norms do not matter: power 0, no model
        beside the base, or a pool of which `exclude` leaves nothing.

    Raises:
        ValueError: a weight is NaN or infinite; the checkpoints are not open, or
            hold nothing of this layer; a part of `exclude` is in no name.
        OSError: a checkpoint cannot be read or has changed.
    """
    if not group.non_base:
        return None
    if not settings.needs_norms:
        require_finite(group)
        return None
    if settings.granularity == "tensor":
        if not settings.counts(group.metadata.name):
            require_finite(group)
            return None
        norms = of_tensors(group)
        return Measured(norms, gram=gram_of(group) if settings.keeps_length else None)
    return _of_checkpoints(group, settings)


def of_tensors(group: TensorGroup) -> torch.Tensor:
    """n_t of one group from the tensors at hand.

    Args:
        group: the inputs that make one output tensor.

    Returns:
        shape `(K,)`, float64, on the CPU; differentiable where an input requires it.

    Raises:
        TypeError: an input is not floating point.
        ValueError: a weight is NaN or infinite.
    """
    for entry in group.entries:
        if not entry.tensor.is_floating_point():
            raise TypeError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} is "
                f"{entry.tensor.dtype}; MetaGPT merges floating-point tensors"
            )
    tuned = [entry.tensor for entry in group.non_base]
    norms = squared_norms.sq_norms(base_of(group).tensor, tuned)
    if not bool(torch.isfinite(norms).all()):
        if is_unchanged(group):
            return torch.zeros_like(norms)
        require_finite(group)
        raise ValueError(squared_norms.too_far(group.metadata.name or "a tensor"))
    return norms


def gram_of(group: TensorGroup) -> torch.Tensor:
    """Inner products of the task vectors of one group, from the tensors at hand.

    Args:
        group: the inputs that make one output tensor, known to be finite.

    Returns:
        shape `(K, K)`, float64, on the CPU; differentiable where an input requires it.
    """
    tuned = [entry.tensor for entry in group.non_base]
    gram = squared_norms.gram_matrix(base_of(group).tensor, tuned)
    return torch.where(torch.isfinite(gram), gram, 0.0)  # infinite where unchanged


def _of_checkpoints(group: TensorGroup, settings: Settings) -> Measured | None:
    # Imported here: they need transformers, which `import mergekit` does not wait for.
    from mergekit_metagpt.checkpoints.opening import already_open
    from mergekit_metagpt.scanning import once

    opened = {entry.id: already_open(entry.id) for entry in group.entries}
    if missing := [str(model) for model, at in opened.items() if at is None]:
        raise ValueError(
            f"granularity {settings.granularity!r} measures stored checkpoints, but "
            f"mergekit has none open for {', '.join(missing)}. Give models as files, "
            "or use granularity: tensor"
        )
    checkpoints = {model: at for model, at in opened.items() if at is not None}
    _check_exclude(settings.exclude, tuple(at.names for at in checkpoints.values()))
    base = checkpoints.pop(base_of(group).id)
    keep = settings.keeps_length
    result = once.measure(base, list(checkpoints.values()), gram=keep)
    if settings.granularity == "model":
        pooled = result.pool("model", settings.exclude)
        if not pooled.members["model"]:
            return None
        return Measured(pooled.sq_norms, result, pooled.gram if keep else None)
    name = group.metadata.name or ""
    keys = [result.layer_of(name, at) for at in range(len(checkpoints))]
    stored = result.pool("layer")
    if not all(key in stored.members for key in keys):
        raise ValueError(
            f"granularity 'layer': no stored tensor of {base.label} belongs to "
            f"the layer of {name}. Use granularity: model or granularity: tensor"
        )
    pooled = result.pool("layer", settings.exclude)
    if not any(key in pooled.members for key in keys):
        return None
    values = [
        pooled.sq_norms[pooled.rows[key], at].item() if key in pooled.members else 0.0
        for at, key in enumerate(keys)
    ]
    return Measured(
        torch.tensor(values, dtype=torch.float64, device="cpu"),
        gram=pooled.products(keys, range(len(keys))) if keep else None,
    )


# Called for every tensor: the names are those of the last few merges.
@functools.lru_cache(maxsize=16)
def _check_exclude(exclude: tuple[str, ...], names: tuple[frozenset[str], ...]) -> None:
    if exclude:
        require_named(exclude, frozenset().union(*names))


def forget_failures() -> None:
    """Let a new merge try again what failed in an earlier one."""
    from mergekit_metagpt.scanning import once

    once.forget_failures()
