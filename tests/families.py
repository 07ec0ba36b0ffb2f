"""Makes, writes, merges and reads families of tiny models."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

# A model that is merged in memory.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.weight": (4, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.weight": (4, 4),
    "model.layers.1.scale": (),
    "lm_head.weight": (9, 4),
}


def llama_config(**changes: Any) -> Any:
    """A Llama of three layers that mergekit's architecture definition knows."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**sizes, **changes})


def llama_state(seed: int = 0, **changes: Any) -> State:
    """Random weights of `llama_config`, float32, by their stored names."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config(**changes))
        return {
            name: tensor.detach().clone()
            for name, tensor in model.state_dict().items()
            if not (model.config.tie_word_embeddings and name == "lm_head.weight")
        }


def tuned(state: Mapping[str, torch.Tensor], seed: int, size: float = 1e-2) -> State:
    """The state with noise of the given size on every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        + size * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in state.items()
    }


def relatives(
    count: int = 3,
    dtype: torch.dtype = torch.float64,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> list[State]:
    """A base and its fine-tunes, each tensor of each at its own distance."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> State:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    base = draw()
    states = [base]
    for k in range(count):
        sizes = (0.1 + 0.1 * ((k + at) % 3) for at in range(len(shapes)))
        pairs = zip(draw().items(), sizes, strict=True)
        states.append({name: base[name] + size * t for (name, t), size in pairs})
    return [cast(state, dtype) for state in states]


def cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_model(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: Any | None = None,
    *,
    shards: int = 1,
) -> Path:
    """Write a checkpoint: config.json and one safetensors file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    (config or llama_config()).save_pretrained(folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_model(folder: Path) -> State:
    """All tensors of a safetensors checkpoint."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def merge_config(
    base: Path | str | None, models: Sequence[Path | str], **settings: Any
) -> dict[str, Any]:
    """A mergekit configuration as a dictionary; `models:` unless slices are given."""
    config: dict[str, Any] = {"merge_method": "metagpt"}
    if base is not None:
        config["base_model"] = str(base)
    if not {"slices", "modules"} & settings.keys():
        config["models"] = [{"model": str(model)} for model in models]
    return {**config, **settings}


def write_yaml(file: Path, *documents: Mapping[str, Any]) -> Path:
    """Write one YAML document or several; return the file's path."""
    file.write_text(yaml.safe_dump_all(map(dict, documents), sort_keys=False))
    return file


def opened(*paths: Path) -> list[ModelReference]:
    """Open checkpoints as a merge does, and return the references that stand for them.

    The base comes first.
    """
    from mergekit.io.tasks import LoaderCache

    found = [ModelReference.parse(str(path)) for path in paths]
    for reference in found:
        LoaderCache().get(reference)
    return found


def run_command(*arguments: str | Path) -> int:
    """Run `mergekit-metagpt`, as a new process would, and return its exit status."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_metagpt.commands.cli import main

    LoaderCache.loaders.clear()
    with pytest.raises(SystemExit) as ended:
        main.main([str(a) for a in arguments], prog_name="mergekit-metagpt")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def run_mergekit(
    config: Mapping[str, Any], out: Path, *options: str, fresh: bool = True
) -> State:
    """Merge in this process through the code of `mergekit-yaml`; return the result.

    `fresh` forgets mergekit's open models first, as a new process would.
    """
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.run_yaml import main

    if fresh:
        LoaderCache.loaders.clear()
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yml")
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    arguments = [str(file), str(out), "--no-copy-tokenizer", "--quiet", *options]
    main.main(arguments, standalone_mode=False)
    return read_model(out)


def console_script(
    config: Mapping[str, Any], out: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Merge in a new process through the installed script `mergekit-yaml`, offline."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yml")
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    script = Path(sys.executable).with_name("mergekit-yaml")
    return subprocess.run(
        [script, file, out, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def forget() -> None:
    """Forget what was measured, as a new process would."""
    from mergekit_metagpt.scanning import once

    for known in (once._PAIRS, once._REQUESTS, once._SAMPLES, once._FAILURES):
        known.clear()


def said(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    """What the package logged at WARNING or above and holds the given words."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mergekit_metagpt")
        and record.levelno >= logging.WARNING
        and part in record.getMessage()
    ]


def assert_nothing_left(out: Path) -> None:
    """Check that a failed merge left at most an empty folder."""
    assert not out.exists() or not list(out.iterdir())
