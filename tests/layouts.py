"""Tiny models of many architectures, in each layout that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.families import (
    State,
    tuned,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

ORIGINAL, LOADED = True, False


DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}


ENCODER: dict[str, Any] = {**SIZES, "max_position_embeddings": 32}


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


TOWER: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14}


ROPE: dict[str, Any] = {"type": "mrope", "mrope_section": [1, 1, 2]}


CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 96,
            "n_positions": 32,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "BERT with a classifier": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "BERT encoder": ("BertModel", "BertConfig", ENCODER),
    "ModernBERT": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            **ENCODER,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**DECODER, "rope_scaling": ROPE},
            "vision_config": {
                **TOWER,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 32,
            },
        },
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {
                **DECODER,
                "rope_scaling": ROPE,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            "vision_config": {
                **TOWER,
                "embed_dim": 32,
                "hidden_size": 32,
                "mlp_ratio": 2,
            },
        },
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            # As in real ones, the language model holds most of the parameters.
            "text_config": {"model_type": "llama", **DECODER, "intermediate_size": 512},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_seq_length": 4,
            "image_token_index": 95,
        },
    ),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **DECODER,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_local_experts": 4},
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **SIZES,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),
    "DINOv3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**VISION, "num_register_tokens": 2},
    ),
    "NomicBERT": ("NomicBertModel", "NomicBertConfig", ENCODER),
}


Layouts = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Trio:
    """A base and two models as transformers writes them.

    Attributes:
        folders: the base's, then the models', by layout.
        states: their parameters by the names of the loaded model.
    """

    folders: Mapping[bool, tuple[Path, ...]]
    states: tuple[State, ...]

    def paths(self, layouts: Layouts) -> list[Path]:
        return [self.folders[kind][k] for k, kind in enumerate(layouts)]


def make_model(name: str) -> Any:
    """A model with random weights."""
    import transformers

    model_class, config_class, sizes = CLASSES[name]
    config = getattr(transformers, config_class)(**sizes, architectures=[model_class])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model_class)(config)


def save_trio(folder: Path, name: str) -> Trio:
    """Make a model with random weights and two with noise, saved in both layouts."""
    model = make_model(name)
    start = {n: t.detach().clone() for n, t in model.named_parameters()}
    folders: dict[bool, list[Path]] = {ORIGINAL: [], LOADED: []}
    states = []
    for number in range(3):
        state = tuned(start, number, 0.01 * number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(state[key])
        for kind, saved in folders.items():
            saved.append(folder / f"{number}-{kind}")
            model.save_pretrained(saved[-1], save_original_format=kind)
        states.append(state)
    return Trio({kind: tuple(f) for kind, f in folders.items()}, tuple(states))
