"""Checks the inputs that mergekit hands to the method."""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Sequence

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from mergekit_metagpt.checkpoints.stored import layer_key
from mergekit_metagpt.method import advice

# Elements to compare: enough to tell one layer from another.
PROBE = 1000


def base_of(group: TensorGroup) -> TensorEntry:
    """Return the base entry, which the methods' input contract guarantees."""
    assert group.base is not None
    return group.base


def are_references(ids: Sequence[Hashable]) -> bool:
    """Whether the ids are references to models, as in merges from files."""
    common = sys.modules.get("mergekit.common")
    return common is not None and all(
        isinstance(model, common.ModelReference) for model in ids
    )


def check_headers(ids: Sequence[Hashable], base: Hashable) -> None:
    """Check from headers that the inputs of a slice, as far as open, fit the base.

    Raises a ValueError if a model is quantised, does not fit the base, or its
    config.json does not fit what it stores; an OSError if a file is missing, truncated,
    or changed since it was opened.
    """
    from mergekit_metagpt.checkpoints import opening, pairs

    opened = {model: opening.already_open(model) for model in ids}
    for checkpoint in opened.values():
        if checkpoint is not None and checkpoint.refused:
            raise ValueError(checkpoint.refused)
    reference = opened.pop(base)
    if reference is None:
        return
    models = [model for model in opened.values() if model is not None]
    for checkpoint in (reference, *models):
        checkpoint.verify_unchanged()
    pairs.check_family(reference, models)


def require_absent(missing: Sequence[Hashable], name: str) -> None:
    """Refuse to merge a tensor without models that have it, by a RuntimeError.

    mergekit leaves out models that lack an optional tensor. Under `--multi-gpu` it may
    lose inputs between its threads, too, and would merge without them.
    """
    from mergekit_metagpt.checkpoints import opening

    for model in missing:
        checkpoint = opening.already_open(model)
        stored = checkpoint.tensors.get(name) if checkpoint else None
        if stored is not None and stored.name == name:
            raise RuntimeError(
                f"mergekit has lost {name} of {model}, which its file has: under "
                "--multi-gpu, mergekit's threads may drop inputs. Merge again, or by "
                "`mergekit-metagpt merge`, which waits for them"
            )


def not_written(
    base: Hashable, names: Collection[str]
) -> tuple[Collection[str], list[str]]:
    """Find the weights of an open base that are not among the `names` written.

    Returns their names, and warnings for the beginning of the merge.
    """
    from mergekit.io.tasks import LoaderCache

    from mergekit_metagpt.checkpoints.opening import already_open
    from mergekit_metagpt.checkpoints.unwritten import left_out, lost, share_of

    checkpoint = already_open(base)
    if checkpoint is None:
        return (), []
    trust = LoaderCache().trust_remote_code
    needed = lost(checkpoint, names, trust_remote_code=trust)
    count, share = len(checkpoint.tensors), share_of(checkpoint, needed)
    messages = advice.lost(base, list(needed), count, share), checkpoint.warning
    return left_out(checkpoint, names).keys(), [text for text in messages if text]


def is_unchanged(group: TensorGroup) -> bool:
    """Whether every model of a group equals the base, infinities included."""
    base = base_of(group).tensor
    return all(torch.equal(entry.tensor, base) for entry in group.non_base)


def require_finite(group: TensorGroup) -> None:
    """Refuse NaN and infinity by a ValueError, but for infinities that none changed."""
    if is_unchanged(group):
        return
    for entry in group.entries:
        if not bool(torch.isfinite(entry.tensor).all()):
            raise ValueError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} holds NaN or "
                "infinity; a merge would spread it. Repair or replace this model"
            )


def require_unchanged(group: TensorGroup) -> None:
    """Raise an OSError if a file of a group has changed since mergekit opened it."""
    from mergekit_metagpt.checkpoints import opening

    for entry in group.entries:
        if checkpoint := opening.already_open(entry.id):
            checkpoint.verify_unchanged()


def require_same_layer(group: TensorGroup) -> None:
    """Check that a tensor is from the layer of its output name, by a few elements.

    `slices:` may move a layer to another index. The method sees only the output's name,
    under which the scan has the norms of another layer: a ValueError.
    """
    from mergekit_metagpt.checkpoints import opening

    name = group.metadata.name or ""
    if layer_key(name) == name or group.metadata.vocabulary_axis is not None:
        return
    for entry in group.entries:
        checkpoint = opening.already_open(entry.id)
        if checkpoint is None:
            continue
        if name in checkpoint.renamed:
            own = checkpoint.renamed[name]
            stored = checkpoint.first_elements(own, PROBE).to(entry.tensor.dtype)
            given = entry.tensor.reshape(-1)[:PROBE].to(device="cpu")
            same = torch.equal(stored, given)
        else:
            # The tensor has another layout (experts), or the layer does not exist.
            same = any(layer_key(key) == layer_key(name) for key in checkpoint.renamed)
        if same:
            continue
        raise ValueError(
            f"granularity 'layer': {name} of the output is not {name} of {entry.id}. "
            "Slices that move layers to other indices have no layer-wise norms; use "
            "granularity: model or granularity: tensor"
        )
