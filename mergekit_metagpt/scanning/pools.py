"""Tells which pool a tensor belongs to, and which tensors do not count."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_metagpt.checkpoints.stored import layer_key


def pool_key(name: str, granularity: str) -> str:
    """Return the pool that a tensor belongs to.

    Args:
        name: of a tensor.
        granularity: `model`, `layer` or `tensor`.

    Returns:
        the pool's name.

    Raises:
        ValueError: unknown granularity.

    Example:
        >>> pool_key("h.0.attn.weight", "layer"), pool_key("h.0.attn.weight", "model")
        ('h.0', 'model')
    """
    if granularity == "model":
        return "model"
    if granularity == "layer":
        return layer_key(name)
    if granularity == "tensor":
        return name
    raise ValueError(
        f"granularity is {granularity!r}; expected 'model', 'layer' or 'tensor'"
    )


def is_excluded(name: str, exclude: Sequence[str]) -> bool:
    """Whether a tensor's name contains one of the excluded parts.

    Args:
        name: of a tensor.
        exclude: parts of names.

    Returns:
        True if it does not count.

    Example:
        >>> is_excluded("model.embed_tokens.weight", ["embed_tokens"])
        True
    """
    return any(part in name for part in exclude)


def is_embedding(name: str) -> bool:
    """Whether a tensor is a token embedding or an output head, by its usual names.

    Args:
        name: of a tensor.

    Returns:
        True for names that the usual architectures give to these weights.

    Example:
        >>> is_embedding("model.embed_tokens.weight"), is_embedding("model.norm.weight")
        (True, False)
    """
    usual = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_out")
    return is_excluded(name, usual)
