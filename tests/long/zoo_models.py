"""The animals of the zoo: architectures, and the layouts that their files are in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.families import State, read_model, tuned, write_model
from tests.layouts import CLASSES, DECODER, ENCODER, ROPE, SIZES, TOWER, VISION

# Of files: as `save_pretrained` writes them, by the names of the loaded model, and as
# repositories on the hub have them. An architecture has as many as differ.
SAVED, LOADED, HUB = "saved", "loaded", "hub"

Sizes = Mapping[str, Any]
Extra = Callable[[State], State]


def more(*names: str, size: tuple[int, ...] = (4,)) -> Extra:
    """Tensors of ones under these names, with `#` for the number of each layer."""
    found = [name.replace("#", str(k)) for name in names for k in range(2)]
    return lambda state: {name: torch.ones(size).bfloat16() for name in found}


def positions(name: str) -> Extra:
    """A buffer of integers under this name."""
    return lambda state: {name: torch.arange(32)[None]}


def next_token(state: State) -> State:
    """A layer beyond the last, for predicting one more token, as DeepSeek-V3 has it."""
    made = {
        name.replace("model.layers.1.", "model.layers.2."): tensor
        for name, tensor in state.items()
        if name.startswith("model.layers.1.")
    }
    embedding, norm = state["model.embed_tokens.weight"], state["model.norm.weight"]
    own = {
        "embed_tokens.weight": embedding,
        "shared_head.head.weight": state["lm_head.weight"],
        "eh_proj.weight": torch.cat([embedding[:32], embedding[-32:]], dim=1),
        **{f"{part}.weight": norm for part in ("enorm", "hnorm", "shared_head.norm")},
    }
    return made | {f"model.layers.2.{name}": tensor for name, tensor in own.items()}


@dataclass(frozen=True)
class Animal:
    """An architecture: transformers' class, and what its configuration takes.

    Attributes:
        hub: a pattern of saved names, and what repositories on the hub have for it.
        weights: tensors that these have besides, and that the class does not load.
        buffers: the same, but a merge may leave them out: they say nothing new.
    """

    name: str
    sizes: Sizes
    hub: Mapping[str, str] = field(default_factory=dict)
    weights: Extra = lambda state: {}
    buffers: Extra = lambda state: {}


PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PADDED = {**DECODER, **PAD}
WIDE = {**PADDED, "head_dim": 8}
MOE = {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {**SIZES, **PAD, "max_position_embeddings": 32}
QWEN_MOE = {**WIDE, "num_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
QWEN_NEXT = {**QWEN_MOE, "layer_types": ["linear_attention", "full_attention"]}
QWEN_NEXT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN_NEXT |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
# The first layer has no experts.
ROUTED = {**SIZES, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2}
ROUTED |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "topk_group": 1}
ROUTED |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
ROUTED |= {"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
ROUTED |= {"v_head_dim": 8}
ROUTED_WIDE = {**ROUTED, "head_dim": 8}
ERNIE = {**DECODER, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}
ERNIE |= {"moe_num_shared_experts": 1}
JAMBA = {**DECODER, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}
JAMBA |= {f"{part}_layer_period": 2 for part in ("attn", "expert")}
JAMBA |= {f"{part}_layer_offset": 1 for part in ("attn", "expert")}
MAMBA2 = {**SIZES, "num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1}
HYBRID = {**MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}
HYBRID |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4}
PAIR = {"vocab_size": 96, "d_model": 32, "max_position_embeddings": 32, **PAD}
for part in ("encoder", "decoder"):
    PAIR |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64}
PAIR |= {"decoder_start_token_id": 1}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
T5 |= {"num_heads": 4}
T5_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SWIN = {"image_size": 28, "patch_size": 7, "embed_dim": 16, "depths": [1, 1]}
SWIN |= {"num_heads": [2, 2], "window_size": 2}
WAVE = {**SIZES, "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3]}
WAVE |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
WAVE |= {"num_conv_pos_embedding_groups": 4}
TEXT = {**ENCODER, "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 16}
BOTH = {"text_config": TEXT, "vision_config": VISION}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", **VISION}
INTERN = {"model_type": "internvl_vision", **VISION}
INTERN |= {"image_size": [28, 28], "patch_size": [14, 14]}
MERGER = {**TOWER, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
MERGER |= {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
MERGER |= {"num_position_embeddings": 16}


def sees(text: str, tower: Sizes, **others: Any) -> dict[str, Any]:
    """A configuration: a language model of that type with a tower that sees."""
    language = {"model_type": text, **WIDE, "rope_scaling": None}
    seen = {"text_config": language, "vision_config": tower, "image_token_index": 95}
    return {**seen, **others}


def reads(text: Sizes) -> dict[str, Any]:
    """The configuration of a Qwen3-VL."""
    rope = {**ROPE, "type": "default", "rope_type": "default"}
    return {"text_config": {**text, "rope_scaling": rope}, "vision_config": MERGER}


# Of transformers 4, on the hub; transformers 5 has no part of that name in a tower.
OLD_TOWER = {r"^vision_tower\.": "vision_tower.vision_model."}
BARE = {r"^transformer\.": ""}
OLD_NORMS = {r"Norm\.weight$": "Norm.gamma", r"Norm\.bias$": "Norm.beta"}
OLD_CONV = {
    r"parametrizations\.weight\.original0": "weight_g",
    r"parametrizations\.weight\.original1": "weight_v",
}
NEOX = "gpt_neox.layers.#.attention"
WORDS = "transformer.word_embeddings.weight"
NEO = "transformer.h.#.attn.attention.masked_bias"

# The usual decoders, named as transformers' classes are.
USUAL = "Mistral Qwen2 Qwen3 Gemma Gemma2 Phi Phi3 StableLm Starcoder2 Cohere2 Olmo2"
USUAL += " Olmo3 Granite Glm4 SmolLM3 SeedOss Exaone4 Apertus Arcee Nemotron"

ANIMALS = {
    **{name: Animal(f"{name}ForCausalLM", WIDE) for name in USUAL.split()},
    "Llama": Animal(
        *("LlamaForCausalLM", DECODER),
        buffers=more("model.layers.#.self_attn.rotary_emb.inv_freq"),
    ),
    "Gemma 3 text": Animal("Gemma3ForCausalLM", WIDE),
    "Gemma 3": Animal(
        "Gemma3ForConditionalGeneration",
        sees("gemma3_text", SIGLIP, mm_tokens_per_image=4),
        OLD_TOWER,
    ),
    "GPT-2": Animal(
        *("GPT2LMHeadModel", GPT, BARE),
        buffers=more("h.#.attn.bias", size=(1, 1, 32, 32)),
    ),
    "GPT-NeoX": Animal(
        *("GPTNeoXForCausalLM", SIZES),
        buffers=more(
            f"{NEOX}.rotary_emb.inv_freq", f"{NEOX}.bias", f"{NEOX}.masked_bias"
        ),
    ),
    "GPT-J": Animal("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "GPT-Neo": Animal(
        *("GPTNeoForCausalLM", {**GPT, "attention_types": [[["global", "local"], 1]]}),
        buffers=more(NEO, size=()),
    ),
    "GPT-BigCode": Animal("GPTBigCodeForCausalLM", GPT),
    "BLOOM": Animal("BloomForCausalLM", GPT, BARE),
    "OPT": Animal(
        "OPTForCausalLM", {**PADDED, "ffn_dim": 64, "word_embed_proj_dim": 32}
    ),
    "Falcon": Animal("FalconForCausalLM", GPT),
    "Falcon 40B": Animal(
        *("FalconForCausalLM", {**GPT, "new_decoder_architecture": True}),
        buffers=lambda state: {"lm_head.weight": state[WORDS]},
    ),
    "MPT": Animal("MptForCausalLM", GPT),
    "Cohere": Animal("CohereForCausalLM", PADDED),
    "Cohere, query norms": Animal("CohereForCausalLM", {**PADDED, "use_qk_norm": True}),
    "Mixtral": Animal("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "OLMoE": Animal("OlmoeForCausalLM", QWEN_MOE),
    "GraniteMoE": Animal("GraniteMoeForCausalLM", MOE),
    "Qwen2-MoE": Animal("Qwen2MoeForCausalLM", QWEN_MOE),
    "Qwen3-MoE": Animal("Qwen3MoeForCausalLM", QWEN_MOE),
    "Qwen3-Next": Animal(
        *("Qwen3NextForCausalLM", QWEN_NEXT),
        weights=more("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"),
    ),
    "DeepSeek-V2": Animal("DeepseekV2ForCausalLM", ROUTED),
    "DeepSeek-V3": Animal("DeepseekV3ForCausalLM", ROUTED, weights=next_token),
    "dots1": Animal("Dots1ForCausalLM", ROUTED_WIDE),
    "GLM-4-MoE": Animal("Glm4MoeForCausalLM", ROUTED_WIDE, weights=next_token),
    "GLM-4-MoE-lite": Animal("Glm4MoeLiteForCausalLM", ROUTED, weights=next_token),
    "ERNIE-4.5-MoE": Animal(
        *("Ernie4_5_MoeForCausalLM", ERNIE),
        weights=more("model.mtp_emb_norm.0.weight", "model.mtp_linear_proj.0.weight"),
    ),
    "PhiMoE": Animal("PhimoeForCausalLM", MOE),
    "MiniMax-M2": Animal("MiniMaxM2ForCausalLM", MOE),
    "Hunyuan-MoE": Animal(
        "HunYuanMoEV1ForCausalLM", {**WIDE, "num_experts": 4, "moe_topk": 2}
    ),
    "LFM2-MoE": Animal(
        "Lfm2MoeForCausalLM",
        {**QWEN_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "GPT-OSS": Animal("GptOssForCausalLM", MOE),
    "Jamba": Animal("JambaForCausalLM", JAMBA),
    "Granite hybrid": Animal("GraniteMoeHybridForCausalLM", HYBRID),
    "Mamba": Animal("MambaForCausalLM", {**SIZES, "state_size": 4}),
    "Mamba2": Animal("Mamba2ForCausalLM", MAMBA2),
    "RWKV": Animal("RwkvForCausalLM", {**SIZES, "attention_hidden_size": 32}),
    "T5": Animal("T5ForConditionalGeneration", T5),
    "T5 1.1": Animal("T5ForConditionalGeneration", {**T5, **T5_GATED}),
    "BART": Animal("BartForConditionalGeneration", PAIR),
    "Whisper": Animal("WhisperForConditionalGeneration", {**PAIR, **AUDIO}),
    "Wav2Vec2": Animal("Wav2Vec2ForCTC", WAVE, OLD_CONV),
    "BERT": Animal(
        *("BertForMaskedLM", ENCODER, OLD_NORMS),
        weights=more(
            *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
            "cls.seq_relationship.weight",
        ),
        buffers=positions("bert.embeddings.position_ids"),
    ),
    "RoBERTa": Animal(
        *("RobertaForMaskedLM", ENCODER),
        weights=more("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
        buffers=positions("roberta.embeddings.position_ids"),
    ),
    "DistilBERT": Animal("DistilBertForMaskedLM", ENCODER),
    "DeBERTa-v3": Animal("DebertaV2ForSequenceClassification", ENCODER),
    "ModernBERT": Animal(CLASSES["ModernBERT"][0], CLASSES["ModernBERT"][2]),
    "NomicBERT": Animal("NomicBertModel", ENCODER),
    "ViT": Animal("ViTForImageClassification", VISION),
    "BEiT": Animal("BeitForImageClassification", VISION),
    "DINOv2": Animal("Dinov2Model", VISION),
    "DINOv3": Animal(CLASSES["DINOv3"][0], CLASSES["DINOv3"][2]),
    "Swin": Animal("SwinForImageClassification", SWIN),
    "CLIP": Animal(
        "CLIPModel", BOTH, buffers=positions("text_model.embeddings.position_ids")
    ),
    "SigLIP": Animal("SiglipModel", BOTH),
    "LLaVA": Animal("LlavaForConditionalGeneration", sees("llama", CLIP), OLD_TOWER),
    "LLaVA, Pixtral": Animal("LlavaForConditionalGeneration", sees("mistral", PIXTRAL)),
    "LLaVA-Next": Animal(
        "LlavaNextForConditionalGeneration", sees("llama", CLIP), OLD_TOWER
    ),
    "LLaVA-OneVision": Animal(
        "LlavaOnevisionForConditionalGeneration", sees("qwen2", SIGLIP), OLD_TOWER
    ),
    "PaliGemma": Animal(
        "PaliGemmaForConditionalGeneration",
        sees("gemma", SIGLIP, projection_dim=32),
        OLD_TOWER,
    ),
    "Aya-Vision": Animal(
        "AyaVisionForConditionalGeneration",
        sees("cohere2", SIGLIP, alignment_intermediate_size=64),
        OLD_TOWER,
    ),
    "InternVL": Animal(
        "InternVLForConditionalGeneration", sees("qwen2", INTERN, image_token_id=95)
    ),
    "Mistral 3": Animal("Mistral3ForConditionalGeneration", sees("mistral", PIXTRAL)),
    "SmolVLM": Animal(
        "SmolVLMForConditionalGeneration",
        {"text_config": {"model_type": "llama", **PADDED}, "vision_config": VISION},
    ),
    **{
        name: Animal(CLASSES[name][0], CLASSES[name][2])
        for name in ("Qwen2-VL", "Qwen2.5-VL")
    },
    "Qwen3-VL": Animal("Qwen3VLForConditionalGeneration", reads(WIDE)),
    "Qwen3-VL-MoE": Animal("Qwen3VLMoeForConditionalGeneration", reads(QWEN_MOE)),
}


@dataclass(frozen=True)
class Family:
    """A base and two models in one layout.

    Attributes:
        folders: the base's, then the models'.
        states: what each holds, by the names of the loaded model; with what it ignores.
        ignored: names of the latter.
    """

    layout: str
    folders: tuple[Path, ...]
    states: tuple[State, ...]
    ignored: frozenset[str] = frozenset()


def floating(state: State) -> State:
    """The floating-point tensors, each once: a tied one under its first name."""
    found: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found.setdefault(tensor.data_ptr(), name)
    return {name: state[name] for name in found.values()}


def renamed(state: State, patterns: Mapping[str, str]) -> State:
    """The state after every replacement in its names."""
    for pattern, new in patterns.items():
        state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    return state


def shapes(folder: Path) -> dict[str, torch.Size]:
    """What tells two layouts of a model from each other."""
    return {name: tensor.shape for name, tensor in read_model(folder).items()}


def families(animal: Animal, folder: Path) -> Iterator[Family]:
    """Write a base and two models of an architecture in each of its layouts."""
    import transformers

    model_class = getattr(transformers, animal.name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**animal.sizes)).bfloat16()
    # So that no tensor of the base is all zeros or ones, and models stay close to it.
    start = tuned(floating(model.state_dict()), 9, 0.1)
    states = [tuned(start, number, 0.01 * number) for number in range(3)]
    ignored: list[State] = []
    found: dict[str, list[Path]] = {SAVED: [], LOADED: [], HUB: []}
    for number, state in enumerate(states):
        model.load_state_dict(state, strict=False)
        for layout, folders in found.items():
            folders.append(folder / f"{layout}-{number}")
            if layout != HUB:
                original = layout == SAVED
                model.save_pretrained(folders[-1], save_original_format=original)
                continue
            saved = read_model(found[SAVED][-1])
            ignored.append(animal.weights(saved))
            written = renamed(saved, animal.hub) | ignored[-1] | animal.buffers(saved)
            write_model(folders[-1], written, model.config)
    for layout, folders in found.items():
        if layout != SAVED and shapes(folders[0]) == shapes(found[SAVED][0]):
            continue
        if layout == HUB:
            states = [s | more for s, more in zip(states, ignored, strict=True)]
        besides = frozenset(ignored[0] if layout == HUB else ())
        yield Family(layout, tuple(folders), tuple(states), besides)
