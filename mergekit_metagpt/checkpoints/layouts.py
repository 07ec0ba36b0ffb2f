"""Finds a tensor that a model stores under another name or in another layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor, layer_key

Stored = StoredTensor | ConvertedTensor


def stored_as(checkpoint: Checkpoint, name: str) -> Stored | None:
    """Find what mergekit loads as a tensor of this name, from headers.

    It is the tensor of that name, one that it is tied to, or one that transformers'
    conversion rules make; None if there is none of these.
    """
    for own in (name, *checkpoint.tied_names.get(name, ())):
        if own in checkpoint.tensors:
            return checkpoint.tensors[own]
    return _stand_in(checkpoint, name)


def sources(stored: Stored) -> tuple[StoredTensor, ...]:
    """Return the tensors in files from which a tensor is made."""
    return stored.sources if isinstance(stored, ConvertedTensor) else (stored,)


def _stand_in(checkpoint: Checkpoint, name: str) -> Stored | None:
    """A tensor of that name, made from what is stored under other names or layouts."""
    if name in checkpoint.renamed:
        return checkpoint.tensors[checkpoint.renamed[name]]
    if name not in checkpoint.converted:
        checkpoint.converted[name] = _converted(checkpoint, name)
    return checkpoint.converted[name]


def _converted(checkpoint: Checkpoint, name: str) -> ConvertedTensor | None:
    """A tensor that transformers' conversion rules make from others of its layer."""
    layer = checkpoint.stored_layers.get(layer_key(name))
    if layer is None or checkpoint.model_type is None:
        return None
    from mergekit.architecture.conversion import convert_checkpoint_tensors

    used: dict[StoredTensor, None] = {}

    def header(tensor: StoredTensor) -> torch.Tensor:
        used[tensor] = None
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    try:
        made = convert_checkpoint_tensors(
            checkpoint.model_type,
            {tensor.name: functools.partial(header, tensor) for tensor in layer},
            name,
        )
    except Exception:  # whatever a rule raises for tensors that do not fit it
        return None
    if made is None:
        return None
    coarsest = max((t.dtype for t in used), key=lambda dtype: torch.finfo(dtype).eps)
    return ConvertedTensor(
        name, checkpoint.model_type, tuple(used), coarsest, tuple(made.shape)
    )


def counterparts(
    base: Checkpoint, model: Checkpoint
) -> Mapping[str, tuple[Stored, Stored]]:
    """Find the base's and the model's tensor, by output name, from headers.

    If only one of them stores a tensor, the other's may be stored in another layout,
    such as single experts instead of fused ones. Ties are not considered.
    """
    if model not in base.counterparts:
        found: dict[str, tuple[Stored, Stored]] = {}
        for name in base.tensors.keys() | model.tensors.keys():
            ours = base.tensors.get(name) or _stand_in(base, name)
            theirs = model.tensors.get(name) or _stand_in(model, name)
            if ours and theirs:
                found[name] = ours, theirs
        base.counterparts[model] = found
    return base.counterparts[model]
