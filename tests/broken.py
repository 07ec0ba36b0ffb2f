"""A menagerie of inputs that no merge should accept, written beside good ones."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families import (
    State,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    tuned,
    write_model,
)

Config = dict[str, Any]
# Spoils the models of a folder or the configuration that merges them. May return what
# is to stand in the YAML file instead of the configuration.
Spoil = Callable[[Path, Config], str | bytes | None]

TENSOR = "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@functools.cache
def _good() -> tuple[State, State, State]:
    base = llama_state()
    return base, tuned(base, seed=1), tuned(base, seed=2, size=2e-2)


def write_good(folder: Path) -> Config:
    """Write `base`, `tuned0` and `tuned1` (in one file each), and how to merge them."""
    for name, state in zip(("base", "tuned0", "tuned1"), _good(), strict=True):
        write_model(folder / name, state)
    return merge_config(folder / "base", [folder / "tuned0", folder / "tuned1"])


def as_given(folder: Path, config: Config) -> None:
    """Spoil nothing."""


def text(content: str | bytes) -> Spoil:
    """Something else in the place of the YAML."""
    return lambda folder, config: content


def without(*keys: str) -> Spoil:
    """Keys of the YAML left out."""

    def spoil(folder: Path, config: Config) -> None:
        for key in keys:
            del config[key]

    return spoil


def settings(**changes: Any) -> Spoil:
    """Keys of the YAML, added or changed."""
    return lambda folder, config: config.update(changes)


def parameters(**values: Any) -> Spoil:
    """Parameters of the whole merge."""
    return settings(parameters=values)


def beside_a_model(**keys: Any) -> Spoil:
    """Keys beside `model:` in the first entry."""

    def spoil(folder: Path, config: Config) -> None:
        config["models"][0].update(keys)

    return spoil


def weights(first: Any, second: Any) -> Spoil:
    """The `weight:` of either model."""

    def spoil(folder: Path, config: Config) -> None:
        for entry, weight in zip(config["models"], (first, second), strict=True):
            entry["parameters"] = {"weight": weight}

    return spoil


def models(*names: str) -> Spoil:
    """Other models: names of folders, or `./name` as the user might write it."""

    def spoil(folder: Path, config: Config) -> None:
        config["models"] = [
            {"model": name if "/" in name else str(folder / name)} for name in names
        ]

    return spoil


def slices(
    names: Iterable[str], *ranges: tuple[int, int], keep_models: bool = False
) -> Spoil:
    """The same layers of these models, range after range, in the place of `models:`."""

    def spoil(folder: Path, config: Config) -> None:
        if not keep_models:
            del config["models"]
        config["slices"] = [
            {
                "sources": [
                    {"model": str(folder / name), "layer_range": list(layers)}
                    for name in names
                ]
            }
            for layers in ranges
        ]

    return spoil


def each(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(folder: Path, config: Config) -> str | bytes | None:
        contents = [spoil(folder, config) for spoil in spoils]
        return next((content for content in contents if content), None)

    return spoil


def rewritten(name: str, change: Callable[[State], None], shards: int = 1) -> Spoil:
    """A model whose tensors were changed in place before it was stored."""

    def spoil(folder: Path, config: Config) -> None:
        state = read_model(folder / name)
        change(state)
        (folder / name / "model.safetensors").unlink()
        write_model(folder / name, state, shards=shards)

    return spoil


def poisoned(name: str, value: float) -> Spoil:
    """A model with one element that is no number."""

    def poison(state: State) -> None:
        state[TENSOR][3, 4] = value

    return rewritten(name, poison)


def to_fp8(state: State) -> None:
    for name in state:
        if "proj" in name:
            state[name] = state[name].to(torch.float8_e4m3fn)


def to_int8(state: State) -> None:
    """Linear layers to int8, with a scale for every row stored beside them."""
    for name in [name for name in state if "proj" in name]:
        scale = state[name].abs().amax(dim=1, keepdim=True) / 127
        state[name] = (state[name] / scale).round().to(torch.int8)
        state[f"{name}_scale"] = scale


def lose_tensor(state: State) -> None:
    del state[TENSOR]


def with_names(change: Callable[[str], str]) -> Callable[[State], None]:
    """All tensors under other names."""

    def rename(state: State) -> None:
        for name in list(state):
            state[change(name)] = state.pop(name)

    return rename


def without_norms(state: State) -> None:
    """Norms without elements, as sharded training may save them."""
    state.update({n: torch.empty(0) for n in state if "norm" in n})


def in_file(name: str, change: Callable[[bytes], bytes], shards: int = 1) -> Spoil:
    """The bytes of a file changed, of a model that is stored in so many shards."""

    def spoil(folder: Path, config: Config) -> None:
        if shards > 1:
            rewritten(name.split("/")[0], lambda state: None, shards)(folder, config)
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return spoil


def truncated(content: bytes) -> bytes:
    return content[:-1000]


def garbled_header(content: bytes) -> bytes:
    return content[:8] + b"!" * 20 + content[28:]


def git_lfs_pointer(content: bytes) -> bytes:
    """What a clone without Git LFS has in the place of a large file."""
    return (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\n"
        b"size 12\n"
    )


def with_json(**changes: Any) -> Callable[[bytes], bytes]:
    """A JSON file with some keys changed."""
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def with_shard(tensor: str, shard: str) -> Callable[[bytes], bytes]:
    """An index that says that a tensor is in a certain shard."""

    def change(content: bytes) -> bytes:
        index = json.loads(content)
        index["weight_map"][tensor] = shard
        return json.dumps(index).encode()

    return change


def missing_file(name: str, shards: int = 1) -> Spoil:
    """A file of a model that is not there."""

    def spoil(folder: Path, config: Config) -> None:
        in_file(name, bytes, shards)(folder, config)
        (folder / name).unlink()

    return spoil


def adapter(*, config_json: bool = False, spelling: str = "{dir}/adapter") -> Spoil:
    """A LoRA adapter as peft writes it, in the place of the second model."""

    def spoil(folder: Path, config: Config) -> None:
        home = folder / "adapter"
        home.mkdir()
        described = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(folder / "base"),
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
        }
        (home / "adapter_config.json").write_text(json.dumps(described))
        halves = {"lora_A": (2, 32), "lora_B": (32, 2)}
        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.{half}.weight": (
                torch.full(shape, 0.01 * (layer + 1))
            )
            for layer in range(3)
            for half, shape in halves.items()
        }
        save_file(tensors, home / "adapter_model.safetensors")
        if config_json:
            llama_config().save_pretrained(home)
        name = spelling.replace("{dir}", str(folder))
        config["models"][1] = {"model": name}

    return spoil


def gpt2(folder: Path, config: Config) -> None:
    """Make the second model a GPT-2 of the same width."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(**sizes, **tokens, architectures=["GPT2LMHeadModel"])
        )
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    write_model(folder / "tuned1", state, model.config)


def llama(**changes: Any) -> Spoil:
    """Make the second model a Llama of other sizes."""

    def spoil(folder: Path, config: Config) -> None:
        state = llama_state(seed=1, **changes)
        write_model(folder / "tuned1", state, llama_config(**changes))

    return spoil


def pickled(change: Callable[[bytes], bytes]) -> Spoil:
    """The second model as a pickle, its bytes changed."""

    def spoil(folder: Path, config: Config) -> None:
        home = folder / "tuned1"
        file = home / "pytorch_model.bin"
        torch.save(read_model(home), file)
        (home / "model.safetensors").unlink()
        file.write_bytes(change(file.read_bytes()))

    return spoil


def short_records(content: bytes) -> bytes:
    """A pickle's archive whose records of values lack their last bytes."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(made, "w") as target,
    ):
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, record[:-4] if "/data/" in name else record)
    return made.getvalue()


def snapshot(folder: Path) -> Mapping[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
