"""Finds one tensor under its different names and stored layouts."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from mergekit_metagpt.arithmetic.squared_norms import coarser_dtype
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.memo import while_open
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor, layer_key

Stored = StoredTensor | ConvertedTensor


@while_open
def _layers(checkpoint: Checkpoint) -> Mapping[str, tuple[StoredTensor, ...]]:
    layers: dict[str, list[StoredTensor]] = {}
    for alias, name in checkpoint.renamed.items():
        layers.setdefault(layer_key(alias), []).append(checkpoint.tensors[name])
    return {key: tuple(dict.fromkeys(tensors)) for key, tensors in layers.items()}


def _stand_in(checkpoint: Checkpoint, like: StoredTensor, name: str) -> Stored | None:
    """A tensor of that name made from what a checkpoint stores in another layout."""
    if name in checkpoint.renamed:
        return checkpoint.tensors[checkpoint.renamed[name]]
    layer = _layers(checkpoint).get(layer_key(name))
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
    dtype = functools.reduce(coarser_dtype, (tensor.dtype for tensor in layer))
    return ConvertedTensor(name, checkpoint.model_type, layer, dtype, like.shape)


@while_open
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
    found: dict[str, tuple[Stored, Stored]] = {}
    for name in base.tensors.keys() | model.tensors.keys():
        first, second = base.tensors.get(name), model.tensors.get(name)
        ours: Stored | None = first
        theirs: Stored | None = second
        if first is None and second is not None:
            ours = _stand_in(base, second, name)
        elif second is None and first is not None:
            theirs = _stand_in(model, first, name)
        if ours is not None and theirs is not None:
            found[name] = ours, theirs
    return found
