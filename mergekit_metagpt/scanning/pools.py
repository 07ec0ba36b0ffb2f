"""Tells which pool a tensor belongs to, and whether `exclude` leaves it out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    """Whether a tensor's name contains one of the excluded parts."""
    return any(part in name for part in exclude)


def exclude_for(names: Collection[str], others: Collection[str]) -> str:
    """Write an `exclude` that names some tensors and none of the others.

    Args:
        names: tensors that should not count.
        others: tensors that should count.

    Returns:
        comma-separated parts of names: a layer or a module if that is unambiguous.

    Example:
        >>> exclude_for(["h.2.a", "h.2.b", "wte.weight"], ["h.1.a", "h.1.b"])
        'h.2.,wte'
    """
    parts = []
    for name in sorted(names):
        layer = layer_key(name)
        within = name.removeprefix(f"{layer}.")
        module = name.removesuffix(".weight").rpartition(".")[2]
        short = [f"{layer}.", within] if layer != name else [module]
        apart = (part for part in short if not any(part in other for other in others))
        parts.append(next(apart, name))
    return ",".join(sorted({*parts}))
