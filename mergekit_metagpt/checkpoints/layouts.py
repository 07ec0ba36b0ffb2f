"""Finds one tensor under its different names and stored layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor, layer_key

Stored = StoredTensor | ConvertedTensor


def _stand_in(checkpoint: Checkpoint, like: StoredTensor, name: str) -> Stored | None:
    """A tensor of that name made from what a checkpoint stores in another layout."""
    if name in checkpoint.renamed:
        return checkpoint.tensors[checkpoint.renamed[name]]
    layer = checkpoint.stored_layers.get(layer_key(name))
    if layer is None or checkpoint.model_type is None:
        return None
    from mergekit.architecture.conversion import can_convert_checkpoint_keys
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    rules = get_checkpoint_conversion_mapping(checkpoint.model_type) or ()
    if any(rule.rename_source_key(name)[1] is not None for rule in rules):
        return None  # a name of the layout that rules start from: nothing makes it
    stored = {tensor.name for tensor in layer}
    if not can_convert_checkpoint_keys(checkpoint.model_type, stored, name):
        return None
    coarsest = max((t.dtype for t in layer), key=lambda dtype: torch.finfo(dtype).eps)
    return ConvertedTensor(name, checkpoint.model_type, layer, coarsest, like.shape)


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
            ours = _stand_in(base, second, name)
        elif second is None and first is not None:
            theirs = _stand_in(model, first, name)
        if ours is not None and theirs is not None:
            yield name, (ours, theirs)
