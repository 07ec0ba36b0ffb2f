"""Finds weights that a merge would lose, by letting transformers load headers."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import Stored, sources, stored_as
from mergekit_metagpt.checkpoints.stored import StoredTensor, layer_key

# Buffers that transformers ignores in every model.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")

# While transformers loads a model, it replaces a method of all models and torch's
# default dtype. Two loads at once may leave them replaced.
_LOADING = threading.Lock()


def left_out(
    checkpoint: Checkpoint, written: Collection[str]
) -> Mapping[str, StoredTensor]:
    """Find the stored tensors of a model, by output name, that a merge does not write.

    `written` are the names under which mergekit reads it for those that it writes.
    """
    read = (stored_as(checkpoint, name) for name in written)
    used = {part.name for stored in read if stored for part in sources(stored)}
    return {n: t for n, t in checkpoint.tensors.items() if t.name not in used}


def lost(
    checkpoint: Checkpoint, written: Collection[str], *, trust_remote_code: bool = False
) -> Mapping[str, StoredTensor]:
    """Find the weights that a model needs and that a merge does not write.

    transformers loads the headers of the model, and those that the merge writes. The
    model needs a weight if transformers misses it in the latter only. Other tensors may
    be left out: buffers of older versions, or layers beyond the model's own, such as
    those that predict several tokens.

    Args:
        checkpoint: the model whose configuration the merged model gets.
        written: names under which mergekit reads it for the tensors that it writes.
        trust_remote_code: run code that comes with the model.

    Returns:
        the tensors by output name; none if transformers cannot load such a model.
    """
    # If other layers of its kind are written, a layer is left out on purpose.
    layers = {layer_key(name) for name in written}
    kinds = {_kind(layer) for layer in layers}
    left = {
        name: tensor
        for name, tensor in left_out(checkpoint, written).items()
        if layer_key(name) in layers or _kind(layer_key(name)) not in kinds
    }
    if not left:
        return {}
    made = {name: held for name in written if (held := stored_as(checkpoint, name))}
    whole = {part.name: part for stored in made.values() for part in sources(stored)}
    whole |= {tensor.name: tensor for tensor in left.values()}
    before = _load(checkpoint, whole, trust_remote_code=trust_remote_code)
    after = _load(checkpoint, made, trust_remote_code=trust_remote_code)
    if before is None or after is None or not after.missing - before.missing:
        return {}
    return {n: t for n, t in left.items() if not before.ignores(t.name)}


def share_of(checkpoint: Checkpoint, names: Collection[str]) -> float:
    """Return the share of a model's parameters that are in the named tensors."""
    sizes = {name: tensor.numel for name, tensor in checkpoint.tensors.items()}
    return sum(sizes[name] for name in names) / max(sum(sizes.values()), 1)


def _kind(layer: str) -> str:
    """The name of a layer without its number; any other name unchanged."""
    head, _, last = layer.rpartition(".")
    return head if last.isdecimal() else layer


@dataclass(frozen=True)
class _Loaded:
    """What transformers reports after loading tensors of certain names and shapes."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    patterns: tuple[str, ...]

    def ignores(self, name: str) -> bool:
        return name in self.unexpected or any(re.search(p, name) for p in self.patterns)


def _load(
    checkpoint: Checkpoint, tensors: Mapping[str, Stored], *, trust_remote_code: bool
) -> _Loaded | None:
    """Load headers into a model without weights; None if that is impossible."""
    import transformers

    if checkpoint.folder is None:
        return None
    headers = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in tensors.items()
    }
    try:
        with _LOADING, _silence():
            config = transformers.AutoConfig.from_pretrained(
                str(checkpoint.folder), trust_remote_code=trust_remote_code
            )
            config.__dict__.pop("quantization_config", None)  # of a dequantised model
            model, info = getattr(
                transformers, config.architectures[0]
            ).from_pretrained(
                None,
                config=config,
                state_dict=headers,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map="meta",
            )
    except Exception:  # whatever the class of a model raises
        return None
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return _Loaded(
        missing=frozenset(info["missing_keys"]),
        unexpected=frozenset(info["unexpected_keys"]),
        patterns=(*patterns, *_OLD_BUFFERS),
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from reporting these loads, which its user did not ask for."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
