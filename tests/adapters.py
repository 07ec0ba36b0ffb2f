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
