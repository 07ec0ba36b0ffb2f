"""Tiny seeded checkpoints and one checked merge, for mergekit's tests; no network.

mergekit's sdist ships its tests without the `tests/common.py` that they import. This is
ours, written from how those tests use it; `tests/test_host_suite.py` puts it there.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mergekit.architecture import arch_info_for_config
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

_TEXT = {
    "hidden_size": 32,  # test_embedding_truncation.py expects this width
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make_picollama(path: str | Path, vocab_size: int = 64) -> str:
    """Save a two-layer Llama with an untied head, stored in float32.

    Args:
        path: folder to write; its name seeds the weights, so two folders of different
            names hold different models, and a second run the same ones.
        vocab_size: rows of the embedding and of the head.

    Returns:
        `path` as a string.
    """
    config = transformers.LlamaConfig(vocab_size=vocab_size, **_TEXT)
    return _save(transformers.LlamaForCausalLM, config, path)


def make_picogranite(path: str | Path, vocab_size: int = 64) -> str:
    """Save a two-layer Granite; arguments and return value as `make_picollama`."""
    config = transformers.GraniteConfig(vocab_size=vocab_size, **_TEXT)
    return _save(transformers.GraniteForCausalLM, config, path)


def make_gpt2size(path: str | Path, vocab_size: int = 64) -> str:
    """Save a narrow GPT-2 as deep as GPT-2 small; else as `make_picollama`.

    The twelve layers matter: test_basic_merges.py stacks `layer_range: [0, 12]` twice.
    """
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=16,
        n_head=2,
        n_layer=12,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(transformers.GPT2LMHeadModel, config, path)


def make_picoLlaVa(path: str | Path, vocab_size: int = 64) -> str:
    """Save a LLaVA of a one-layer CLIP and a two-layer Llama; else `make_picollama`.

    mergekit has no definition of this architecture, and infers it from the checkpoints.
    They are stored under the names that the modules have in memory: under those that
    `save_pretrained` writes by default (`language_model.model.*`), mergekit 0.1.5 with
    transformers 5.23 leaves the whole language model out of the merge.
    """
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=transformers.LlamaConfig(vocab_size=vocab_size, **_TEXT),
        image_token_index=vocab_size - 1,
    )
    return _save(
        transformers.LlavaForConditionalGeneration,
        config,
        path,
        save_original_format=False,
    )


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Run a merge into a temporary folder and check what any user would expect of it.

    Every stored tensor is finite and has the `out_dtype` that the configuration names,
    and transformers loads the result with no weight missing, left over or misshapen.
    `dtype` alone promises nothing: it casts the inputs, and `arcee_fusion` and
    `ramplus_tl` then hand back float32.

    Args:
        config: the merge, whose models are local folders.
        validate: further checks, called with the output folder.
        auto_arch: whether mergekit has to infer the architecture from the checkpoints;
            checked too.
    """
    for model in config.referenced_models():
        inferred = arch_info_for_config(model.config()) is None
        assert inferred == auto_arch, f"{model}: {inferred=}, {auto_arch=}"

    with tempfile.TemporaryDirectory() as output:
        run_merge(config, output, MergeOptions(quiet=True))
        _assert_sound_tensors(output, config.out_dtype)
        _assert_loads_whole(output)
        if validate is not None:
            validate(output)


def _save(
    model_cls: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    path: str | Path,
    **save_options: bool,
) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(Path(path).name.encode()))
        model_cls(config).save_pretrained(path, **save_options)
    return str(path)


def _assert_sound_tensors(path: str, dtype: str | None) -> None:
    loader = LazyTensorLoader.from_disk(path)
    assert loader.index.tensor_paths, f"{path} holds no tensors"
    for name in loader.index.tensor_paths:
        tensor = loader.get_tensor(name)
        assert tensor.isfinite().all(), f"{name} is not finite"
        if dtype is not None:
            assert tensor.dtype == getattr(torch, dtype), f"{name} is {tensor.dtype}"


def _assert_loads_whole(path: str) -> None:
    (architecture,) = transformers.AutoConfig.from_pretrained(path).architectures
    _, loading = getattr(transformers, architecture).from_pretrained(
        path, output_loading_info=True
    )
    for problem, where in loading.items():
        assert not where, f"{architecture} loaded with {problem}: {where}"
