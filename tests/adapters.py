"""LoRA adapters with random weights, and what they make of their base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import (
    State,
    read_model,
    write_model,
)


@dataclass(frozen=True)
class Adapted:
    """A base and two adapters of it, as written by peft.

    Attributes:
        base: the base's folder.
        adapters: the adapters' folders.
        state: what the base stores.
        config: of the base.
    """

    base: Path
    adapters: tuple[Path, ...]
    state: State
    config: Any


def qwen2_config() -> Any:
    """Qwen 2 has biases in its attention, and mergekit writes them."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["Qwen2ForCausalLM"],
    )


def write_adapters(folder: Path, **settings: Any) -> Adapted:
    """Write a base and two LoRA adapters with random weights."""
    import peft
    from transformers import Qwen2ForCausalLM

    adapters = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = Qwen2ForCausalLM(qwen2_config())
        state = {name: t.detach().clone() for name, t in base.state_dict().items()}
        for number in range(2):
            model = Qwen2ForCausalLM(qwen2_config())
            model.load_state_dict(state)
            adapter = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=4,
                    lora_alpha=8,
                    target_modules=["q_proj", "down_proj"],
                    task_type="CAUSAL_LM",
                    **settings,
                ),
            )
            with torch.no_grad():
                for parameter in adapter.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape)
                        parameter.add_(noise, alpha=0.05 * (number + 1))
            adapter.save_pretrained(folder / f"adapter{number}")
            adapters.append(folder / f"adapter{number}")
    write_model(folder / "base", state, qwen2_config())
    return Adapted(folder / "base", tuple(adapters), state, qwen2_config())


def naive_adapted(state: State, adapter: Path, scale: float) -> State:
    """The base with W + scale * B A, and with what else the adapter stores."""
    merged = dict(state)
    stored = read_model(adapter)
    for name, tensor in stored.items():
        target = name.removeprefix("base_model.model.")
        target = target.replace(".lora_A", "").replace(".base_layer", "")
        if ".lora_A" in name:
            product = stored[name.replace("lora_A", "lora_B")] @ tensor
            merged[target] = state[target] + scale * product
        elif ".lora_B" not in name:
            merged[target] = tensor
    return merged


PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


# ---- PEFT models of several architectures ------------------------------------------


def architectures() -> dict[str, Any]:
    """Configurations of tiny models: plain, transposed, tied, and two with experts."""
    import transformers as hf

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return {
        "llama": hf.LlamaConfig(**sizes),
        "qwen2": hf.Qwen2Config(**sizes, tie_word_embeddings=True),
        "gpt2": hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
        "qwen3_moe": hf.Qwen3MoeConfig(
            **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
        "mixtral": hf.MixtralConfig(**sizes, num_local_experts=4),
        "gpt_oss": hf.GptOssConfig(
            **{**sizes, "intermediate_size": 32}, num_local_experts=4
        ),
    }


@dataclass(frozen=True)
class Tuned:
    """A base of some architecture, and adapters of it that PEFT has written.

    Attributes:
        base: the base's folder.
        adapters: the adapters' folders.
    """

    base: Path
    adapters: tuple[Path, ...]


def write_tuned(folder: Path, config: Any, *settings: dict[str, Any]) -> Tuned:
    """Write a base, and an adapter with random factors for each of the settings."""
    import peft
    from transformers import AutoModelForCausalLM

    adapters = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        for number, of_adapter in enumerate(settings):
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            adapter = peft.get_peft_model(
                model, peft.LoraConfig(task_type="CAUSAL_LM", **of_adapter)
            )
            with torch.no_grad():
                for parameter in adapter.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(0.1 * torch.randn(parameter.shape))
            adapters.append(folder / f"adapter{number}")
            adapter.save_pretrained(adapters[-1])
    return Tuned(folder / "base", tuple(adapters))


def loaded(base: Path) -> Any:
    """The base in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)


def distinct(model: Any) -> State:
    """Parameters of a model, tied ones once."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def merged_by_peft(base: Path, adapter: Path) -> State:
    """The parameters that `merge_and_unload` gives, in float64."""
    import peft

    model = peft.PeftModel.from_pretrained(
        loaded(base), adapter, autocast_adapter_dtype=False
    )
    return distinct(model.merge_and_unload())


def taus_of(tuned: Tuned) -> list[State]:
    """Task vectors of adapters, by PEFT."""
    base = distinct(loaded(tuned.base))
    merged = [merged_by_peft(tuned.base, adapter) for adapter in tuned.adapters]
    return [{name: m[name] - base[name] for name in base} for m in merged]
