"""Tiny checkpoints, a float64 oracle and merges through mergekit, for all tests."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

ORDER = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


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


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    return max(first, second, key=ORDER.index)


def naive_sq_norm(base: torch.Tensor, model: torch.Tensor) -> float:
    """||model - base||^2 in float64, at the coarser of the two stored precisions.

    Between float16 and bfloat16, at what both can represent: an unchanged weight that
    float16 stores as a subnormal number has lost bits that bfloat16 keeps.
    """
    grid = [coarser(base.dtype, model.dtype)]
    if {base.dtype, model.dtype} == {torch.float16, torch.bfloat16}:
        grid = [torch.float16, torch.bfloat16]
    for dtype in grid:
        base, model = base.to(dtype), model.to(dtype)
    return float((model.double() - base.double()).square().sum())


def naive_sq_norms(base: State, models: Sequence[State]) -> torch.Tensor:
    """n_t over whole state dicts of equal names and shapes, shape `(K,)`."""
    return torch.tensor(
        [sum(naive_sq_norm(base[n], model[n]) for n in base) for model in models],
        dtype=torch.float64,
    )


def naive_coefficients(
    sq_norms: torch.Tensor,
    weight: Sequence[float] | None = None,
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """lambda * w n^(p/2) / sum w n^(p/2), straight from the formula."""
    if weight is None:
        weight = [1.0] * len(sq_norms)
    raw = torch.tensor(weight, dtype=torch.float64) * sq_norms ** (power / 2)
    return scale * raw / raw.sum()


def naive_merge(
    base: torch.Tensor, models: Sequence[torch.Tensor], lambdas: torch.Tensor
) -> torch.Tensor:
    """theta_0 + sum_t lambda_t (theta_t - theta_0) in float64."""
    total = base.double()
    for factor, model in zip(lambdas, models, strict=True):
        total = total + factor * (model.double() - base.double())
    return total


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next representable number of dtype at each value, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double())
    smallest = info.tiny * info.eps
    return torch.ldexp(torch.full_like(values.double(), info.eps), exponent - 1).clamp(
        min=smallest
    )


def assert_within_bound(
    merged: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lambdas: torch.Tensor,
) -> None:
    """Check |out - exact| <= 0.5 ulp + (K + 3) 2^-24 (|base| + sum lambda |tau|)."""
    exact = naive_merge(base, models, lambdas)
    size = base.double().abs()
    for factor, model in zip(lambdas, models, strict=True):
        size = size + abs(factor) * (model.double() - base.double()).abs()
    bound = 0.5 * ulp(exact, merged.dtype) + (len(models) + 3) * 2.0**-24 * size
    excess = ((merged.double() - exact).abs() - bound).max() if base.numel() else 0
    assert excess <= 0, f"an element is {float(excess):g} beyond the bound"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, on the CPU: tells -0.0 from 0.0, keeps NaN."""
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copy.reshape(-1).view(torch.uint8)


def assert_same_bits(first: torch.Tensor, second: torch.Tensor) -> None:
    """Check that two tensors agree in dtype, shape and every bit."""
    assert first.dtype == second.dtype, (first.dtype, second.dtype)
    assert first.shape == second.shape, (first.shape, second.shape)
    differing = (bits(first) != bits(second)).sum()
    assert not differing, f"{int(differing)} bytes differ"


@contextmanager
def assert_unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Check that no tensor is written to within the block: bits, version, flags."""
    kept = [(t, t.detach().clone(), t._version, t.requires_grad) for t in tensors]
    yield
    for tensor, copy, version, requires_grad in kept:
        assert tensor._version == version, "an input was written to"
        assert tensor.requires_grad == requires_grad
        assert_same_bits(tensor, copy)


def solved_coefficients(
    merged: State,
    base: State,
    models: Sequence[State],
    names: Iterable[str] | None = None,
) -> torch.Tensor:
    """The lambda that a float64 merge used, shape `(K,)`, from its output alone.

    Least squares of `merged - base` over the task vectors; to about 1e-11 where these
    are independent. `names` limits it to some tensors.
    """
    chosen = sorted(merged if names is None else names)
    assert all(merged[name].dtype == torch.float64 for name in chosen)

    def flat(state: State) -> torch.Tensor:
        return torch.cat(
            [state[n].double().flatten() - base[n].double().flatten() for n in chosen]
        )

    columns = torch.stack([flat(model) for model in models], dim=1)
    return torch.linalg.lstsq(columns, flat(merged)[:, None]).solution[:, 0]


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


def said(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    """What the package logged at WARNING or above and holds the given words."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mergekit_metagpt")
        and record.levelno >= logging.WARNING
        and part in record.getMessage()
    ]


def naive_pool(name: str, granularity: str) -> str:
    """The pool of a tensor: the words of design section 2 as a regular expression."""
    layer = re.match(r"(?:[^.]*\D[^.]*\.)*?\d+(?=\.|$)", name)
    return {
        "model": "",
        "layer": layer.group() if layer else name,
        "tensor": name,
    }[granularity]


def naive_lambdas(
    name: str,
    base: State,
    models: Sequence[State],
    *,
    granularity: str = "model",
    exclude: Sequence[str] = (),
    weight: Sequence[float] | None = None,
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """lambda of one tensor under the parameters of `metagpt`, shape `(K,)`."""
    pool = {
        other: tensor
        for other, tensor in base.items()
        if naive_pool(other, granularity) == naive_pool(name, granularity)
        and not any(part in other for part in exclude)
    }
    raw = torch.tensor(weight or [1.0] * len(models), dtype=torch.float64)
    if pool:
        raw = raw * naive_sq_norms(pool, models) ** (power / 2)
    return scale * raw / raw.sum()


def assert_merged_exactly(
    merged: State,
    base: State,
    models: Sequence[State],
    lambdas: Callable[[str], torch.Tensor],
) -> None:
    """Check a float64 merge to 1e-10 of the sizes involved; lambda is by name."""
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float64
        values, tensors = lambdas(name), [model[name] for model in models]
        exact = naive_merge(base[name], tensors, values)
        size = base[name].double().abs()
        for value, other in zip(values, tensors, strict=True):
            size += abs(value) * (other.double() - base[name].double()).abs()
        error = (tensor - exact).abs() - 1e-10 * size
        assert error.max() <= 0, f"{name} is not merged with {values.tolist()}"
