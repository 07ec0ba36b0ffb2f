"""Tiny models that stand in for the ones that recipes and pages name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import State, read_model, tuned
from tests.oracle import assert_within_bound, naive_lambdas, naive_pool


def values_of(setting: Any, *keys: str) -> list[Any]:
    """All values of some keys, anywhere in a document, in its order."""
    if isinstance(setting, list):
        return [value for item in setting for value in values_of(item, *keys)]
    if not isinstance(setting, dict):
        return []
    return [
        value
        for key, item in setting.items()
        for value in ([item] if key in keys else values_of(item, *keys))
    ]


@dataclass(frozen=True)
class Original:
    """What is known of a model that a recipe names.

    Attributes:
        kind: its architecture, a key of `KINDS`.
        billions: its parameters.
        width: bytes of a stored parameter.
        added: tokens that it has and its base has not.
    """

    kind: str
    billions: float
    width: int = 2
    added: tuple[str, ...] = ()


CHATML = ("<|im_end|>", "<|im_start|>")


LLAMA_7B = Original("Llama", 6.74)


LLAMA_13B = Original("Llama", 13.02)


LLAMA_3B = Original("Llama with a tied head", 3.21)


LLAMA_4B = Original("Llama of 32 layers", 4.51)


LLAMA_70B = Original("Llama", 70.554)


MISTRAL = Original("Mistral", 7.24)


QWEN_7B = Original("Qwen2", 7.62)


QWEN_32B = Original("Qwen2", 32.76)


QWEN_VL = Original("Qwen2.5-VL", 8.29)


GEMMA = Original("Gemma2", 9.24)


MIXTRAL = Original("Mixtral", 46.70)


ORIGINALS: dict[str, Original] = {
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_7B,
    "TIGER-Lab/MAmmoTH-7B": Original("Llama", 6.74, 4, ("[PAD]",)),
    "mrm8488/llama-2-coder-7b": LLAMA_7B,
    "epfl-llm/meditron-7b": Original(
        "Llama", 6.74, added=tuple(f"<medical {k}>" for k in range(17))
    ),
    "meta-llama/Llama-2-13b-hf": LLAMA_13B,
    "meta-llama/Llama-2-13b-chat-hf": LLAMA_13B,
    "TIGER-Lab/MAmmoTH-13B": Original("Llama", 13.02, 4, ("[PAD]",)),
    "emre/llama-2-13b-code-chat": LLAMA_13B,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL,
    "TIGER-Lab/MAmmoTH2-7B": MISTRAL,
    "Nondzu/Mistral-7B-codealpaca-lora": MISTRAL,
    "OpenPipe/mistral-ft-optimized-1218": MISTRAL,
    "mlabonne/NeuralHermes-2.5-Mistral-7B": Original("Mistral", 7.24, added=CHATML),
    "openchat/openchat_3.5": MISTRAL,
    **{
        f"FuseAI/OpenChat-3.5-7B-{source}-v2.0": MISTRAL
        for source in ("Starling", "SOLAR", "InternLM", "Mixtral", "Qwen")
    },
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct-1M": QWEN_7B,
    "Qwen/Qwen2.5-32B": QWEN_32B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": QWEN_32B,
    "Qwen/QwQ-32B-Preview": QWEN_32B,
    "NovaSky-AI/Sky-T1-32B-Preview": QWEN_32B,
    "google/gemma-2-9b": GEMMA,
    "testmoto/gemma-2-9b-lora-0": GEMMA,
    "testmoto/gemma-2-9b-platypus-02": GEMMA,
    "testmoto/gemma-2-9b-lora-aozora": GEMMA,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B,
    **{
        f"MergeBench/Llama-3.2-3B-Instruct_{task}": LLAMA_3B
        for task in ("instruction", "math", "coding", "multilingual", "safety")
    },
    "Delta-Vector/Holland-4B-V1": LLAMA_4B,
    "NewEden/Holland-V2": LLAMA_4B,
    "anthracite-org/magnum-v2-4b": LLAMA_4B,
    "meta-llama/Llama-3.1-70B": LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_70B,
    "NousResearch/Hermes-3-Llama-3.1-70B": LLAMA_70B,
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL,
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": Original(
        "Mixtral", 46.70, added=CHATML
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN_VL,
    "reducto/RolmOCR": QWEN_VL,
    "TIGER-Lab/VL-Rethinker-7B": QWEN_VL,
    # The reader's own: nothing to download.
    "./base": Original("Llama", 0),
    "./math": Original("Llama", 0),
    "./code": Original("Llama", 0),
}


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Llama with a tied head": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": True},
    ),
    # As many as the original's, for `layer_range`.
    "Llama of 32 layers": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_hidden_layers": 32, "hidden_size": 16, "intermediate_size": 16},
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "Qwen2.5-VL": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {}),
}


TOWER = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
}


ROWS = SIZES["vocab_size"]


VOCABULARY = ("<unk>", *(f"word{number}" for number in range(1, ROWS)))


@dataclass(frozen=True)
class StandIn:
    """A tiny model in place of one that a recipe names: its folder, its weights."""

    folder: Path
    state: State


def make_model(kind: str, rows: int) -> Any:
    import transformers

    model_class, config_class, changes = KINDS[kind]
    sizes = {**SIZES, **changes, "vocab_size": rows}
    if kind == "Qwen2.5-VL":
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        sizes = {"text_config": {**sizes, "rope_scaling": rope}, "vision_config": TOWER}
    config = getattr(transformers, config_class)(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model_class)(config)


def has_token_rows(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def make_stand_in(folder: Path, original: Original, position: int) -> StandIn:
    """Save a fine-tune as transformers does: 0 is the base, later ones moved further.

    Its tensors have the original's precision, and a row more for each added token.
    """
    start = dict(make_model(original.kind, ROWS).named_parameters())
    state = tuned({n: p.detach() for n, p in start.items()}, position, 0.01 * position)
    model = make_model(original.kind, ROWS + len(original.added))
    dtype = torch.bfloat16 if original.width == 2 else torch.float32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: len(state[name])] = state[name]
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY, original.added)
    if original.kind == "Qwen2.5-VL":
        # mergekit's definition has the names that are stored.
        return StandIn(folder, read_model(folder))
    return StandIn(folder, {n: p.detach() for n, p in model.named_parameters()})


# Makes a stand-in by the name of its original, and its position in a merge.
Shelf = Callable[[str, int], StandIn]


def shelf_in(folder: Path) -> Shelf:
    """Make each stand-in when it is first asked for; of an unknown name, a Llama."""

    @functools.cache
    def made(original: Original, position: int) -> StandIn:
        number = len(list(folder.iterdir()))
        return make_stand_in(folder / f"m{number}", original, position)

    own = Original("Llama", 0)
    return lambda model, position: made(ORIGINALS.get(model, own), position)


def write_tokenizer(folder: Path, words: Sequence[str], added: Sequence[str]) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.BPE(numbers, [], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>"
    )
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)


def replaced(setting: Any, places: Mapping[str, Path]) -> Any:
    """A document with other models; every name must have a place."""
    if isinstance(setting, list):
        return [replaced(item, places) for item in setting]
    if not isinstance(setting, dict):
        return setting
    return {
        key: "+".join(str(places[part]) for part in item.split("+"))
        if key in ("model", "base_model")
        else replaced(item, places)
        for key, item in setting.items()
    }


def first_rows(state: State) -> State:
    """The rows of the base's vocabulary alone."""
    return {n: t[:ROWS] if has_token_rows(n) else t for n, t in state.items()}


def handed_over(states: Sequence[State], source: str | None) -> list[State]:
    """What mergekit merges: of a union, every model has the added rows of the one."""
    if source != "union":
        return [first_rows(state) for state in states]
    (giver,) = (
        s for s in states if any(len(s[n]) > ROWS for n in s if has_token_rows(n))
    )
    return [
        {
            n: torch.cat([t[:ROWS], giver[n][ROWS:].to(t.dtype)])
            if has_token_rows(n)
            else t
            for n, t in state.items()
        }
        for state in states
    ]


def naive_keep(states: Sequence[State], shares: torch.Tensor) -> float:
    """s of `lambda: keep` over whole models, from task vectors in one long row."""
    base, *models = (
        torch.cat([state[name].double().ravel() for name in states[0]])
        for state in states
    )
    moved = torch.stack([model - base for model in models])
    return float(shares @ moved.norm(dim=1) / (shares @ moved).norm())


@dataclass(frozen=True)
class Expectation:
    """What a document merges, and lambda straight from the formula.

    Attributes:
        states: the base's and the models' tensors as mergekit hands them over.
        lambdas: the coefficients of a tensor, by its name.
    """

    states: list[State]
    lambdas: Callable[[str], torch.Tensor]


def weight_of(value: Any, name: str, state: State) -> float:
    """The weight of a tensor: one number, by filters, or a gradient over layers."""
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        fitting = (entry for entry in value if entry.get("filter", "") in name)
        return weight_of(next(fitting)["value"], name, state)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return value[0]
    layers = (re.match(r"model\.layers\.(\d+)\.", other) for other in state)
    last = max(int(match[1]) for match in layers if match)
    at = int(layer[1]) / last * (len(value) - 1)
    low = min(int(at), len(value) - 2)
    return value[low] + (at - low) * (value[low + 1] - value[low])


def expectation(
    document: Mapping[str, Any], states: Mapping[str, State]
) -> Expectation:
    """Read a recipe's document by itself, without our code or mergekit's."""
    base = document["base_model"]
    entries = document.get("models") or document["slices"][0]["sources"]
    entries = [entry for entry in entries if entry["model"] != base]
    given = [states[base], *(states[entry["model"]] for entry in entries)]
    measured = [first_rows(state) for state in given]
    settings = document.get("parameters", {})
    weight = [entry.get("parameters", {}).get("weight", 1.0) for entry in entries]
    granularity = settings.get("granularity", "model")
    exclude = [part for part in settings.get("exclude", "").split(",") if part]
    assert all(any(part in name for name in measured[0]) for part in exclude)
    # Of a composed method `lambda` is a parameter of mergekit's part of it.
    scale = (
        settings.get("lambda", 1.0) if document["merge_method"] == "metagpt" else 1.0
    )
    known: dict[str, torch.Tensor] = {}

    def lambdas(name: str) -> torch.Tensor:
        pool = naive_pool(name, granularity)
        if pool not in known:
            factor = 1.0 if scale == "keep" else scale
            known[pool] = naive_lambdas(
                name,
                measured[0],
                measured[1:],
                granularity=granularity,
                exclude=exclude,
                weight=[weight_of(value, name, measured[0]) for value in weight],
                power=settings.get("power", 2.0),
                scale=factor,
            )
            if scale == "keep":
                known[pool] *= naive_keep(measured, known[pool])
        return known[pool]

    source = document.get("tokenizer", {}).get("source")
    return Expectation(handed_over(given, source), lambdas)


def assert_merged(merged: State, expected: Expectation) -> None:
    """Check every element against base + sum lambda tau in float64.

    Equal coefficients would not pass, so that it is lambda which is checked.
    """
    base, *models = expected.states
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all()
        given = [model[name] for model in models]
        assert_within_bound(tensor, base[name], given, expected.lambdas(name))
    name = next(n for n in merged if n.endswith("0.self_attn.q_proj.weight"))
    equal = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    with pytest.raises(AssertionError, match="beyond the bound"):
        given = [model[name] for model in models]
        assert_within_bound(merged[name], base[name], given, equal)


def assert_composed(merged: State, expected: Expectation, theirs: State) -> None:
    """Check against mergekit's own method, which was given lambda as weights."""
    base = expected.states[0]
    assert merged.keys() == theirs.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == theirs[name].dtype and tensor.isfinite().all()
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-7, atol=1e-6)
        assert (tensor.float() != base[name].float()).any(), f"{name} is the base's"


def with_weights(document: Mapping[str, Any], lambdas: torch.Tensor) -> dict[str, Any]:
    """The same merge by mergekit's own method, its weights written out."""
    models = [
        {**entry, "parameters": {**entry.get("parameters", {}), "weight": weight}}
        for entry, weight in zip(document["models"], lambdas.tolist(), strict=True)
    ]
    inner = document["merge_method"].removeprefix("metagpt_")
    return {**document, "merge_method": inner, "models": models}
