"""Finds one tensor under its different names and stored layouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor, layer_key

Stored = StoredTensor | ConvertedTensor


def stored_as(checkpoint: Checkpoint, name: str) -> Stored | None:
    """Find what mergekit loads as a tensor of this name, from headers.

    Args:
        checkpoint: an input of a merge.
        name: of a tensor that mergekit plans to read.

    Returns:
        the tensor of that name, one that it is tied to, or one that transformers'
        conversion rules make; None if there is nothing of the kind.
    """
    for own in (name, *checkpoint.tied_names.get(name, ())):
        if own in checkpoint.tensors:
            return checkpoint.tensors[own]
    return _stand_in(checkpoint, name)


def sources(stored: Stored) -> tuple[StoredTensor, ...]:
    """Return the tensors in files of which one is made."""
    return stored.sources if isinstance(stored, ConvertedTensor) else (stored,)


def _stand_in(checkpoint: Checkpoint, name: str) -> Stored | None:
    """A tensor of that name made from what a checkpoint stores in another layout."""
    if name in checkpoint.renamed:
        return checkpoint.tensors[checkpoint.renamed[name]]
    if name not in checkpoint.converted:
        checkpoint.converted[name] = _converted(checkpoint, name)
    converted: ConvertedTensor | None = checkpoint.converted[name]
    return converted


def _converted(checkpoint: Checkpoint, name: str) -> ConvertedTensor | None:
    """A tensor that transformers' rules make from others of its layer."""
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
    except Exception:  # whatever a rule raises about tensors that do not fit it
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
    """Find for each output name what base and model store under it, from headers.

    Where only one of them stores a tensor, the other's may follow from another layout,
    such as single experts beside fused ones.

    Args:
        base: the base.
        model: a fine-tune of it.

    Returns:
        what both have, by output name; ties are not looked at.
    """
    if model not in base.counterparts:
        base.counterparts[model] = dict(_counterparts(base, model))
    return base.counterparts[model]


def _counterparts(
    base: Checkpoint, model: Checkpoint
) -> Iterator[tuple[str, tuple[Stored, Stored]]]:
    for name in base.tensors.keys() | model.tensors.keys():
        first, second = base.tensors.get(name), model.tensors.get(name)
        ours: Stored | None = first
        theirs: Stored | None = second
        if first is None and second is not None:
            ours = _stand_in(base, name)
        elif second is None and first is not None:
            theirs = _stand_in(model, name)
        if ours is not None and theirs is not None:
            yield name, (ours, theirs)
