"""Names parts of a model for readers, and sorts names naturally."""

from __future__ import annotations

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
        if any(word in lowered for word in usual):
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
