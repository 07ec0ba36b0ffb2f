"""Names of tensors: which pool they belong to, which of them do not count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def layer_key(name: str) -> str:
    """Return the pool of a tensor under `granularity: layer`.

    The prefix of the name up to and including its first integer component, or the
    whole name where there is none.

    Args:
        name: of a tensor.

    Returns:
        the pool's name.

    Example:
        >>> layer_key("model.layers.12.mlp.up_proj.weight")
        'model.layers.12'
        >>> layer_key("lm_head.weight")
        'lm_head.weight'
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return name


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


def idle_parts(exclude: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """Find the parts that exclude nothing.

    Args:
        exclude: parts of names.
        names: of all tensors.

    Returns:
        the parts that are in none of the names, in their order.

    Example:
        >>> idle_parts(["embed", "lm_haed"], ["embed.weight", "lm_head.weight"])
        ('lm_haed',)
    """
    every = set(names)
    return tuple(part for part in exclude if not any(part in name for name in every))


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


# What a part of a model is usually called, in the order in which to ask.
_PARTS = (
    ("head", ("lm_head", "embed_out", "classifier", "score.", "output_layer", "cls.")),
    ("embeddings", ("embed", "wte", "wpe", "shared.weight")),
    ("norms", ("norm", "ln_", ".ln.")),
    ("attention", ("attn", "attention", "wqkv", "q_proj", "k_proj", "v_proj")),
    ("mlp", ("mlp", "feed_forward", "ffn", "expert", "moe", "fc1", "fc2", "dense")),
)
PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")


def part_of(name: str) -> str:
    """Return the part of a model that a tensor belongs to, by its usual names.

    Args:
        name: of a tensor.

    Returns:
        one of `PARTS`.

    Example:
        >>> part_of("h.0.self_attn.q_proj.weight"), part_of("model.norm.weight")
        ('attention', 'norms')
        >>> part_of("model.layers.0.post_attention_layernorm.weight")
        'norms'
    """
    lowered = name.lower()
    for part, usual in _PARTS:
        if is_excluded(lowered, usual):
            return part
    return "other"


def natural(name: str) -> tuple[object, ...]:
    """Return a sort key by which layer 10 comes after layer 9.

    Args:
        name: of a tensor or a pool.

    Returns:
        the key.

    Example:
        >>> sorted(["layers.10", "layers.9", "embed"], key=natural)
        ['embed', 'layers.9', 'layers.10']
        >>> natural("layers." + "9" * 5000) > natural("layers.10")
        True
    """
    parts = name.split(".")
    digits = (part.lstrip("0") if part.isdecimal() else None for part in parts)
    return tuple(
        # By length: int() refuses to read thousands of digits.
        (0, 0, part) if number is None else (1, len(number), number)
        for part, number in zip(parts, digits, strict=True)
    )


def printable(text: str) -> str:
    r"""Spell out control characters, which would move a terminal's cursor, or worse.

    Args:
        text: lines from files of strangers.

    Returns:
        the text with escapes for all but the ends of lines.

    Example:
        >>> printable("model\x1b[2J")
        'model\\x1b[2J'
    """
    return "".join(
        char if char == "\n" or char.isprintable() else repr(char)[1:-1]
        for char in text
    )
