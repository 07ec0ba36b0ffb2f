"""Names parts of a model for readers, and sorts names naturally."""

from __future__ import annotations

# Words in the usual names of each part's tensors; the first part that has one counts.
_PARTS = (
    ("head", ("lm_head", "embed_out", "classifier", "score.", "output_layer", "cls.")),
    ("embeddings", ("embed", "wte", "wpe", "shared.weight")),
    ("norms", ("norm", "ln_", ".ln.")),
    ("attention", ("attn", "attention", "wqkv", "q_proj", "k_proj", "v_proj")),
    ("mlp", ("mlp", "feed_forward", "ffn", "expert", "moe", "fc1", "fc2", "dense")),
)
PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")


def part_of(name: str) -> str:
    """Return the part of a model to which a tensor belongs, judged by its name.

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
    """Return a sort key for names, by which layer 10 comes after layer 9.

    Args:
        name: of a tensor or a pool.

    Returns:
        the key.

    Example:
        >>> sorted(["layers.10", "layers.9", "embed"], key=natural)
        ['embed', 'layers.9', 'layers.10']
    """
    return tuple(
        (1, int(part), "") if part.isdecimal() else (0, 0, part)
        for part in name.split(".")
    )


def printable(text: str) -> str:
    r"""Escape control characters, which could move a terminal's cursor, or worse.

    Args:
        text: lines that may come from other people's files.

    Returns:
        the text, with its line breaks, and escapes for other control characters.

    Example:
        >>> printable("model\x1b[2J")
        'model\\x1b[2J'
    """
    return "".join(
        char if char == "\n" or char.isprintable() else repr(char)[1:-1]
        for char in text
    )
