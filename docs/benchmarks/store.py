"""Writes checkpoints for the benchmarks: random weights, realistic task vectors.

    python docs/benchmarks/store.py DIR [--models 3] [--scale 1.0]

Writes a base and its fine-tunes with the shapes of a Llama of 1.1 B parameters (22
layers of width 2,048, bfloat16, shards of about 1 GB). `--scale` gives fewer layers. A
fine-tune differs from the base by 1 to 3 per cent of the base's norm. Writing needs
the memory of one shard.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = 22
SHARD_BYTES = 10**9
DELTAS = (0.010, 0.020, 0.015, 0.030, 0.012, 0.025)


def config(layers: int) -> dict[str, object]:
    """Return the configuration of TinyLlama-1.1B, with `layers` layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all tensors."""
    yield "model.embed_tokens.weight", (32000, 2048)
    for number in range(layers):
        at = f"model.layers.{number}"
        yield f"{at}.input_layernorm.weight", (2048,)
        yield f"{at}.post_attention_layernorm.weight", (2048,)
        for name, rows in (("q", 2048), ("k", 256), ("v", 256), ("o", 2048)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, 2048)
        yield f"{at}.mlp.gate_proj.weight", (5632, 2048)
        yield f"{at}.mlp.up_proj.weight", (5632, 2048)
        yield f"{at}.mlp.down_proj.weight", (2048, 5632)
    yield "model.norm.weight", (2048,)
    yield "lm_head.weight", (32000, 2048)


def tensors(layers: int, model: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the base (`model` None) or of a fine-tune, one by one."""
    for number, (name, shape) in enumerate(shapes(layers)):
        drawn = torch.Generator().manual_seed(number)
        size = 1.0 if len(shape) == 1 else 0.02
        tensor = torch.randn(shape, generator=drawn) * size
        if model is not None:
            drawn.manual_seed(10_000 * (model + 1) + number)
            delta = DELTAS[model % len(DELTAS)] * size
            tensor += torch.randn(shape, generator=drawn) * delta
        yield name, tensor.bfloat16()


def write(folder: Path, layers: int, model: int | None) -> None:
    """Write one checkpoint in shards, unless it exists."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, room = {}, SHARD_BYTES
    total = sum(torch.Size(shape).numel() * 2 for _, shape in shapes(layers))
    count = -(-total // SHARD_BYTES)

    def flush() -> None:
        name = f"model-{len(shards):05d}-of-{count:05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, tensor in tensors(layers, model):
        if tensor.nbytes > room and len(shards) < count:
            flush()
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers)))


def make(folder: Path, models: int = 3, scale: float = 1.0) -> tuple[Path, list[Path]]:
    """Write a base and its fine-tunes, unless they exist.

    Args:
        folder: where to write them.
        models: number of fine-tunes.
        scale: fraction of the 22 layers.

    Returns:
        paths of the base and of the fine-tunes.
    """
    layers = max(1, round(LAYERS * scale))
    base = folder / "base"
    write(base, layers, None)
    tuned = [folder / f"tuned{number}" for number in range(models)]
    for number, path in enumerate(tuned):
        write(path, layers, number)
    return base, tuned


def files_of(folders: Sequence[Path]) -> list[Path]:
    """List the safetensors files of checkpoints."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tunes")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of layers")
    given = parser.parse_args()
    print(*make(given.folder, given.models, given.scale))
