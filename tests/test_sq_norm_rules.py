"""The seven rules of n_t of the method: one test for each sentence of a rule."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.scanning import one_pass
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.oracle import (
    assert_same_bits,
    assert_within_bound,
    naive_coefficients,
    naive_merge,
    naive_sq_norm,
    naive_sq_norms,
    solved_coefficients,
)

States = tuple[State, ...]
Log = pytest.LogCaptureFixture

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = [f"model.layers.{index}" for index in range(3)]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base() -> State:
    """Random weights in float32. Tests make changed copies."""
    return llama_state()


@pytest.fixture(scope="module")
def models(base: State) -> tuple[State, State, State]:
    """Three fine-tunes of it, of different distances."""
    a, b, c = (tuned(base, k, size) for k, size in enumerate((1e-2, 2e-2, 3e-2), 1))
    return a, b, c


def written(folder: Path, *states: State, **options: Any) -> list[Path]:
    """Store each state as a checkpoint of its own."""
    return [
        write_model(folder / f"model{k}", state, **options)
        for k, state in enumerate(states)
    ]


def scanned(folder: Path, *states: State, **options: Any) -> torch.Tensor:
    """n_t of all states but the first, which is the base, from stored checkpoints."""
    first, *others = written(folder, *states, **options)
    return mergekit_metagpt.scan(first, others).pool("model").sq_norms


def exact_sum(base: torch.Tensor, model: torch.Tensor) -> float:
    """||model - base||^2 in rational arithmetic, rounded once."""
    pairs = zip(base.flatten().tolist(), model.flatten().tolist(), strict=True)
    return float(sum((Fraction(m) - Fraction(b)) ** 2 for b, m in pairs))


def assert_close(
    found: torch.Tensor | Sequence[float],
    expected: torch.Tensor | Sequence[float],
    tolerance: float = 1e-7,
) -> None:
    """Check every value, relative to its size."""
    first = torch.as_tensor(found, dtype=torch.float64)
    second = torch.as_tensor(expected, dtype=torch.float64)
    assert first.shape == second.shape
    error = ((first - second).abs() - tolerance * second.abs()).max()
    assert error <= 0, f"got {first.tolist()}, expected {second.tolist()}"


def assert_lambda(
    merged: State,
    base: State,
    models: Sequence[State],
    expected: torch.Tensor,
    names: Iterable[str] | None = None,
) -> None:
    """Check the coefficients that a float64 merge used on the given tensors."""
    assert_close(solved_coefficients(merged, base, models, names), expected)


def names_with(state: State, part: str) -> list[str]:
    """Names that contain a part; there are some."""
    found = [name for name in state if part in name]
    assert found
    return found


def sources(models: Iterable[Path], start: int, stop: int, **more: Any) -> Any:
    """One slice of a configuration, the same layers of every model."""
    entries = [{"model": str(m), "layer_range": [start, stop]} for m in models]
    return {"sources": entries, **more}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of task vectors that the scan's kernel measures, call by call."""
    counts: list[int] = []
    kernel = squared_norms.flat_sq_norms

    def counting(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> list[float]:
        counts.append(sum(tensor.numel() for tensor in tuned))
        return kernel(base, tuned)

    monkeypatch.setattr(squared_norms, "flat_sq_norms", counting)
    return counts


def elements(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


# 1. A property of a pair (base, model), not of the plan.


def test_1_a_property_of_the_pair_not_of_the_other_models(
    tmp_path: Path, base: State, models: States
) -> None:
    first, *others = written(tmp_path, base, *models)
    together = mergekit_metagpt.scan(first, others).pool("model").sq_norms
    for k, other in enumerate(others):
        alone = mergekit_metagpt.scan(first, [other]).pool("model").sq_norms
        assert_same_bits(together[k : k + 1], alone)


def test_1_under_model_and_layer_whatever_slices(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, *models)
    config = merge_config(paths[0], [], slices=[sources(paths, 0, 2)])
    config["dtype"] = "float64"
    whole = naive_coefficients(naive_sq_norms(base, models))
    merged = run_mergekit(config, tmp_path / "model")
    assert not any(LAYERS[2] in name for name in merged)
    assert_lambda(merged, base, models, whole)

    config["parameters"] = {"granularity": "layer"}
    merged = run_mergekit(config, tmp_path / "layer")
    for layer in LAYERS[:2]:
        names = names_with(base, layer)
        pool = {name: base[name] for name in names}
        expected = naive_coefficients(naive_sq_norms(pool, models))
        assert_lambda(merged, base, models, expected, names)


def vanishing_in_bfloat16(base: State) -> tuple[State, State, State]:
    """A base, a model that bfloat16 cannot tell from it, and one that it can."""
    coarse = cast(cast(base, torch.bfloat16), torch.float32)
    near = {name: tensor * (1 + 2.0**-10) for name, tensor in coarse.items()}
    far = {name: tensor.clone() for name, tensor in coarse.items()}
    for name in names_with(far, "proj"):
        far[name].view(-1)[::512] *= 1.125
    return coarse, near, far


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_1_under_model_and_layer_whatever_dtype(
    tmp_path: Path, base: State, granularity: str
) -> None:
    coarse, near, far = vanishing_in_bfloat16(base)
    first, *others = written(tmp_path, coarse, near, far)
    config = merge_config(first, others, dtype="bfloat16")
    config["parameters"] = {"granularity": granularity}
    merged = run_mergekit(config, tmp_path / "out")
    lambdas = naive_coefficients(naive_sq_norms(coarse, [near, far]))
    for name, tensor in merged.items():
        if granularity == "layer":
            key = next((layer for layer in LAYERS if layer in name), name)
            pool = {n: coarse[n] for n in names_with(coarse, key)}
            lambdas = naive_coefficients(naive_sq_norms(pool, [near, far]))
        if "proj" in name:
            assert 0.4 < lambdas[1] < 0.8
        handed = [cast(state, torch.bfloat16)[name] for state in (coarse, near, far)]
        assert_within_bound(tensor, handed[0], handed[1:], lambdas)


def write_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    """Add a tokenizer with the given vocabulary, in that order, to a checkpoint."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_1_under_model_and_layer_whatever_tokenizer(
    tmp_path: Path, base: State, models: States, source: str, granularity: str
) -> None:
    tokens = [chr(0x4E00 + number) for number in range(100)]
    paths = written(tmp_path, base, *models[:2])
    write_tokenizer(paths[0], tokens[:96])
    write_tokenizer(paths[1], tokens[:96])
    # The second model's vocabulary is the base's backwards, and four tokens more.
    more = {
        name: torch.cat([tensor, tensor[:4] + 0.5])
        if name in (EMBED, HEAD)
        else tensor.clone()
        for name, tensor in models[1].items()
    }
    write_model(paths[2], more, llama_config(vocab_size=100))
    write_tokenizer(paths[2], [*tokens[95::-1], *tokens[96:]])
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["tokenizer"] = {"source": source}
    config["parameters"] = {"granularity": granularity}
    merged = run_mergekit(config, tmp_path / "out")
    assert len(merged[EMBED]) == (100 if source == "union" else 96)

    # Measured row by row as stored, on the rows that both have.
    pool = base if granularity == "model" else {EMBED: base[EMBED]}
    lambdas = naive_coefficients(naive_sq_norms(pool, models[:2]))
    aligned = [base[EMBED], models[0][EMBED], models[1][EMBED].flip(0)]
    states: list[State] = [{EMBED: tensor} for tensor in aligned]
    rows = {EMBED: merged[EMBED][:96]}
    assert_lambda(rows, states[0], states[1:], lambdas)
    if granularity == "model":
        assert_lambda(merged, base, models[:2], lambdas, names_with(base, LAYERS[0]))


def test_1_also_tensors_that_mergekit_will_not_write(
    tmp_path: Path, base: State, models: States
) -> None:
    extra = "model.vision.patch.weight"
    wide = {**base, extra: torch.zeros(50, 40)}
    wider = [
        {**model, extra: torch.full((50, 40), 0.1 * (3 - k))}
        for k, model in enumerate(models)
    ]
    paths = written(tmp_path, wide, *wider)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")
    assert extra not in merged
    expected = naive_coefficients(naive_sq_norms(wide, wider))
    assert_lambda(merged, base, models, expected)


def test_1_every_floating_point_tensor_and_no_other(
    tmp_path: Path, base: State, models: States
) -> None:
    ids = torch.arange(64)
    wide = {**base, "model.position_ids": ids}
    wider = [{**model, "model.position_ids": ids + 1000} for model in models]
    assert_close(scanned(tmp_path, wide, *wider), naive_sq_norms(base, models))


def test_1_every_tensor_that_base_and_model_share(
    tmp_path: Path, base: State, models: States
) -> None:
    wide = {**base, "model.only_in_base.weight": torch.ones(9)}
    wider = [{**models[0], "model.only_in_model.weight": torch.ones(9)}, models[1]]
    found = scanned(tmp_path, wide, *wider)
    assert_close(found, naive_sq_norms(base, models[:2]))


def test_1_inspect_can_print_it_without_merging(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, *models)
    before = sorted(tmp_path.rglob("*"))
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    assert sorted(tmp_path.rglob("*")) == before
    config = merge_config(paths[0], paths[1:], dtype="float64")
    for granularity in ("model", "layer"):
        config["parameters"] = {"granularity": granularity}
        merged = run_mergekit(config, tmp_path / granularity)
        pooled = result.pool(granularity)
        for key, sq_norms in zip(
            pooled.keys, pooled.sq_norms.view(len(pooled.keys), -1), strict=True
        ):
            names = names_with(base, "" if granularity == "model" else key)
            expected = mergekit_metagpt.coefficients(sq_norms)
            assert_lambda(merged, base, models, expected, names)


def test_1_memoised_per_pair(
    tmp_path: Path, base: State, models: States, measured: list[int]
) -> None:
    paths = written(tmp_path, base, *models)
    # Two slices, twelve layers' tensors, and still each pair once.
    slices = [sources(paths[:3], 0, 1), sources(paths[:3], 1, 3)]
    run_mergekit(merge_config(paths[0], [], slices=slices), tmp_path / "one")
    # Of each scan the base's norm too.
    assert sum(measured) == (2 + 1) * elements(base)
    run_mergekit(merge_config(paths[0], [paths[2], paths[3]]), tmp_path / "two")
    assert sum(measured) == (3 + 2) * elements(base)
    # Another base is another pair.
    run_mergekit(merge_config(paths[3], [paths[0], paths[2]]), tmp_path / "three")
    assert sum(measured) == (5 + 3) * elements(base)


def test_1_memo_belongs_to_the_files(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, *models)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    run_mergekit(config, tmp_path / "one")
    shutil.rmtree(paths[1])
    changed = [tuned(base, 9, 5e-2), *models[1:]]
    write_model(paths[1], changed[0])
    merged = run_mergekit(config, tmp_path / "two")
    expected = naive_coefficients(naive_sq_norms(base, changed))
    assert_lambda(merged, base, changed, expected)


def test_1_ratio_over_the_group_at_hand_slices_with_different_models(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, *models)
    members = [(1, 2), (3, 1), (2,)]
    slices = [
        sources([paths[0], *(paths[k] for k in chosen)], index, index + 1)
        for index, chosen in enumerate(members)
    ]
    config = merge_config(paths[0], [], slices=slices, dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")
    for layer, chosen in zip(LAYERS, members, strict=True):
        states = [models[k - 1] for k in chosen]
        expected = naive_coefficients(naive_sq_norms(base, states))
        assert_lambda(merged, base, states, expected, names_with(base, layer))


def test_1_ratio_over_the_group_at_hand_a_slice_with_its_own_base(
    tmp_path: Path, base: State, models: States
) -> None:
    a, b, c = models
    paths = written(tmp_path, base, *models)
    slices = [
        sources([paths[0], paths[1], paths[2]], 0, 1),
        sources([paths[3], paths[1], paths[2]], 1, 2, base_model=str(paths[3])),
        # The same three models: now the global base is a fine-tune like the others.
        sources([paths[3], paths[0], paths[1]], 2, 3, base_model=str(paths[3])),
    ]
    config = merge_config(paths[0], [], slices=slices, dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")
    for layer, origin, states in zip(
        LAYERS, (base, c, c), ([a, b], [a, b], [base, a]), strict=True
    ):
        expected = naive_coefficients(naive_sq_norms(origin, states))
        assert_lambda(merged, origin, states, expected, names_with(base, layer))


def granite_config() -> Any:
    """An architecture with weights that mergekit holds for optional: biases."""
    from transformers import GraniteConfig

    sizes = llama_config().to_dict()
    keys = [key for key in sizes if key.endswith("_size") or key.startswith("num_")]
    changes = {key: sizes[key] for key in keys}
    return GraniteConfig(**changes, architectures=["GraniteForCausalLM"])


def test_1_ratio_over_the_group_at_hand_an_optional_tensor_that_one_model_lacks(
    tmp_path: Path, base: State, models: States
) -> None:
    biases = [f"{LAYERS[0]}.self_attn.{letter}_proj.bias" for letter in "qkv"]
    wide, *wider = [
        {**state, **{name: torch.randn(32 if "q_" in name else 16) for name in biases}}
        for state in (base, *models)
    ]
    del wider[2][biases[0]], wider[1][biases[1]], wider[2][biases[1]]
    for state in wider:
        del state[biases[2]]
    paths = written(tmp_path, wide, *wider, config=granite_config())
    config = merge_config(paths[0], paths[1:], dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")

    sq_norms = torch.tensor(
        [
            sum(naive_sq_norm(wide[n], state[n]) for n in wide if n in state)
            for state in wider
        ],
        dtype=torch.float64,
    )
    everywhere = [name for name in base if LAYERS[0] in name]
    expected = naive_coefficients(sq_norms)
    assert_lambda(merged, wide, wider, expected, everywhere)
    expected = naive_coefficients(sq_norms[:2])
    assert_lambda(merged, wide, wider[:2], expected, biases[:1])
    one = torch.ones(1, dtype=torch.float64)
    assert_lambda(merged, wide, wider[:1], one, biases[1:2])
    assert_same_bits(merged[biases[2]], wide[biases[2]].double())


def test_1_under_tensor_measured_on_what_mergekit_hands_over(
    tmp_path: Path, base: State, models: States
) -> None:
    coarse, near, far = vanishing_in_bfloat16(base)
    paths = written(tmp_path / "dtype", coarse, near, far)
    config = merge_config(paths[0], paths[1:], dtype="bfloat16")
    config["parameters"] = {"granularity": "tensor"}
    merged = run_mergekit(config, tmp_path / "dtype" / "out")
    for name in names_with(base, "proj"):
        # In bfloat16 the near model is the base: the far one gets all.
        assert_same_bits(merged[name], far[name].bfloat16())

    paths = written(tmp_path / "moved", base, *models)
    slices = [sources(paths, 2, 3), sources(paths, 0, 2)]
    config = merge_config(paths[0], [], slices=slices, dtype="float64")
    config["parameters"] = {"granularity": "tensor"}
    merged = run_mergekit(config, tmp_path / "moved" / "out")
    for index, origin in enumerate((2, 0, 1)):
        for name in names_with(base, LAYERS[index]):
            source = name.replace(LAYERS[index], LAYERS[origin])
            tensors = [model[source] for model in models]
            sq_norms = naive_sq_norms({"": base[source]}, [{"": t} for t in tensors])
            exact = naive_merge(base[source], tensors, naive_coefficients(sq_norms))
            torch.testing.assert_close(merged[name], exact, rtol=1e-12, atol=1e-14)


# 2. A weight counts once.


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != HEAD}


def with_head(state: State, kind: str) -> State:
    """The state with its head absent, a copy of its embedding, or its own."""
    if kind == "own":
        return dict(state)
    return headless(state) | ({HEAD: state[EMBED]} if kind == "copy" else {})


def test_2_a_head_that_is_absent_is_the_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    found = scanned(tmp_path, *map(headless, (base, *models)))
    assert_close(found, naive_sq_norms(headless(base), models))


def test_2_a_head_stored_with_the_same_bits_is_the_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    found = scanned(tmp_path, *(with_head(s, "copy") for s in (base, *models)))
    assert_close(found, naive_sq_norms(headless(base), models))


def test_2_a_head_that_differs_in_one_bit_is_its_own(
    tmp_path: Path, base: State, models: States
) -> None:
    first, second = (with_head(state, "copy") for state in (base, models[0]))
    second[HEAD] = second[HEAD].clone()
    second[HEAD].view(torch.int32)[7, 7] ^= 1
    expected = naive_sq_norms(first, [second])
    assert_close(scanned(tmp_path, first, second), expected)


def test_2_names_come_from_mergekits_tied_names(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, architectures=["GPT2LMHeadModel"])
    rng = torch.Generator().manual_seed(0)
    embed, norm = torch.randn(60, 8, generator=rng), torch.randn(8, generator=rng)
    shift = torch.randn(60, 8, generator=rng)
    # mergekit knows both spellings, and both of them as what a head is tied to.
    short = {"wte.weight": embed, "ln_f.weight": norm}
    long = {
        "transformer.wte.weight": embed + shift,
        "transformer.ln_f.weight": norm + 1,
        HEAD: embed + shift,
    }
    once = naive_sq_norm(embed, embed + shift) + naive_sq_norm(norm, norm + 1)
    stored_twice, own = {**short, HEAD: embed}, {**long, HEAD: embed - shift}
    with_own = once + naive_sq_norm(embed, embed - shift)
    for number, (first, second, expected) in enumerate(
        [
            (short, long, once),
            (long, short, once),
            (stored_twice, long, once),
            (short, own, with_own),
            (stored_twice, own, with_own),
        ]
    ):
        found = scanned(tmp_path / str(number), first, second, config=config)
        assert_close(found, [expected])


def test_2_equal_tensors_that_nothing_ties_count_each(
    tmp_path: Path, base: State
) -> None:
    norms = [f"{layer}.input_layernorm.weight" for layer in LAYERS]
    model = base | {name: base[name] + 0.5 for name in norms}
    assert_close(scanned(tmp_path, base, model), [3 * 32 * 0.25])


@pytest.mark.parametrize("in_base", ["absent", "copy"])
@pytest.mark.parametrize(
    "in_models", list(itertools.product(["absent", "copy"], repeat=2))
)
def test_2_stored_once_twice_or_in_one_checkpoint_only_the_same_lambda(
    tmp_path: Path,
    base: State,
    models: States,
    in_base: str,
    in_models: tuple[str, str],
) -> None:
    states = [with_head(base, in_base)]
    states += [with_head(m, k) for m, k in zip(models, in_models, strict=False)]
    paths = written(tmp_path, *states)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")
    bare = headless(base)
    expected = naive_coefficients(naive_sq_norms(bare, models[:2]))
    assert_lambda(merged, base, models[:2], expected, bare)
    if HEAD in merged:
        assert_same_bits(merged[HEAD], merged[EMBED])


def test_2_a_head_of_the_model_only_is_measured_against_the_bases_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    for number, kind in enumerate(("absent", "copy")):
        found = scanned(tmp_path / str(number), with_head(base, kind), models[0])
        expected = naive_sq_norms(with_head(base, "copy"), models[:1])
        assert_close(found, expected)


def test_2_a_head_of_the_base_only_is_measured_against_the_models_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    for number, kind in enumerate(("absent", "copy")):
        found = scanned(tmp_path / str(number), base, with_head(models[0], kind))
        expected = naive_sq_norms(base, [with_head(models[0], "copy")])
        assert_close(found, expected)


def test_2_heads_of_their_own_count_beside_the_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    found = scanned(tmp_path, base, *models)
    assert_close(found, naive_sq_norms(base, models))
    assert not torch.allclose(found, naive_sq_norms(headless(base), models))


def test_2_under_layer_a_tied_head_looks_up_its_embedding(
    tmp_path: Path, base: State, models: States
) -> None:
    # a is tied, whether it stores its head or not; b has a head of its own.
    for number, kind in enumerate(("absent", "copy")):
        states = [with_head(models[0], kind), models[1]]
        folder = tmp_path / str(number)
        paths = written(folder, with_head(base, "copy"), *states)
        config = merge_config(paths[0], paths[1:], dtype="float64")
        config["parameters"] = {"granularity": "layer"}
        merged = run_mergekit(config, folder / "out")
        sq_norms = [
            naive_sq_norm(base[EMBED], models[0][EMBED]),
            naive_sq_norm(base[EMBED], models[1][HEAD]),
        ]
        expected = naive_coefficients(torch.tensor(sq_norms, dtype=torch.float64))
        heads = [with_head(models[0], "copy"), models[1]]
        assert_lambda(merged, with_head(base, "copy"), heads, expected, [HEAD])
        sq_norms[1] = naive_sq_norm(base[EMBED], models[1][EMBED])
        expected = naive_coefficients(torch.tensor(sq_norms, dtype=torch.float64))
        assert_lambda(merged, base, heads, expected, [EMBED])


@pytest.mark.parametrize("as_modules", [False, True])
def test_2_in_memory_entries_that_share_storage_count_once(
    base: State, models: States, as_modules: bool
) -> None:
    from mergekit.merge_methods import merge_state_dicts
    from transformers import LlamaForCausalLM

    shared: list[Any] = [with_head(s, "copy") for s in (base, *models)]
    if as_modules:
        for number, state in enumerate(shared):
            module = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
            module.load_state_dict(state)
            shared[number] = module
    with torch.no_grad():
        merged = merge_state_dicts(shared, "metagpt", base=0, dtype=torch.float64)
    expected = naive_coefficients(naive_sq_norms(headless(base), models))
    assert_lambda(merged, base, models, expected, headless(base))

    clones = [{n: t.clone() for n, t in with_head(s, "own").items()} for s in models]
    merged = merge_state_dicts([base, *clones], "metagpt", base=0, dtype=torch.float64)
    expected = naive_coefficients(naive_sq_norms(base, models))
    assert_lambda(merged, base, models, expected)


# 3. Measured at the coarser of the two stored precisions.


@pytest.mark.parametrize("of_model", FLOATS, ids=str)
@pytest.mark.parametrize("of_base", FLOATS, ids=str)
def test_3_measured_at_the_coarser_of_the_two_stored_precisions(
    tmp_path: Path, base: State, of_base: torch.dtype, of_model: torch.dtype
) -> None:
    # Numbers that float32 rounds, and fine-tunes down to what it cannot see.
    fine = tuned(cast(base, torch.float64), 7, 1e-4)
    others = [tuned(fine, k, size) for k, size in enumerate((1e-2, 1e-4, 1e-9))]
    first, others = cast(fine, of_base), [cast(model, of_model) for model in others]
    assert_close(scanned(tmp_path, first, *others), naive_sq_norms(first, others), 1e-9)


@pytest.mark.parametrize(
    ("of_base", "of_model"), list(itertools.permutations(FLOATS, 2)), ids=str
)
def test_3_an_untouched_weight_contributes_exactly_zero(
    tmp_path: Path, base: State, of_base: torch.dtype, of_model: torch.dtype
) -> None:
    # Small numbers too: they are float16's subnormals.
    scaled = base | {UP: base[UP] * 1e-3}
    first = cast(scaled, of_base)
    untouched = cast(first, of_model)
    assert scanned(tmp_path / "1", first, untouched).tolist() == [0.0]
    touched = untouched | {UP: untouched[UP].clone()}
    touched[UP][3, 4] += 1
    found = scanned(tmp_path / "2", first, touched)
    assert_close(found, [naive_sq_norm(first[UP][3, 4], touched[UP][3, 4])])


@pytest.mark.parametrize("finer", ["base", "model"])
def test_3_a_float32_side_is_rounded_to_bfloat16_and_the_reverse(
    tmp_path: Path, base: State, finer: str
) -> None:
    # A fine-tune far smaller than bfloat16's rounding noise, beside an honest one.
    states = [base, tuned(base, 1, 1e-2)]
    coarse = [cast(state, torch.bfloat16) for state in states]
    mixed = [states[0], coarse[1]] if finer == "base" else [coarse[0], states[1]]
    noise = naive_sq_norm(base[UP], coarse[0][UP].float())
    assert noise > 0
    assert_close(scanned(tmp_path, *mixed), naive_sq_norms(coarse[0], coarse[1:]))


@pytest.mark.parametrize("power", [2.0, 1.0])
def test_3_rounding_noise_is_no_learning_in_a_merge(
    tmp_path: Path, base: State, models: States, power: float
) -> None:
    untouched = cast(base, torch.bfloat16)
    paths = written(tmp_path, base, untouched, models[0])
    config = merge_config(paths[0], paths[1:], dtype="float32")
    config["parameters"] = {"power": power}
    merged = run_mergekit(config, tmp_path / "out")
    lambdas = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name, tensor in merged.items():
        pair = [untouched[name].float(), models[0][name]]
        assert_within_bound(tensor, base[name], pair, lambdas)


def test_3_each_tensor_by_its_own_two_precisions(
    tmp_path: Path, base: State, models: States
) -> None:
    def store(state: State, kinds: Sequence[torch.dtype]) -> State:
        return {
            name: tensor.to(kinds[at % len(kinds)])
            for at, (name, tensor) in enumerate(state.items())
        }

    first = store(base, FLOATS)
    others = [store(m, FLOATS[k : k + 2]) for k, m in enumerate(models)]
    assert_close(scanned(tmp_path, first, *others), naive_sq_norms(first, others), 1e-9)


def test_3_numbers_beyond_the_coarser_precisions_range_are_measured_as_they_are(
    tmp_path: Path, base: State
) -> None:
    first = base | {UP: base[UP].clone()}
    first[UP][0, 0] = 1e5
    model = cast(base, torch.float16)
    model[UP][0, 0] = 65504
    expected = naive_sq_norm(base[UP].half(), model[UP]) + (1e5 - 65504.0) ** 2
    expected -= naive_sq_norm(base[UP].half()[0, 0], model[UP][0, 0])
    assert_close(scanned(tmp_path, first, model), [expected])


@pytest.mark.parametrize(
    ("of_base", "of_model"), list(itertools.permutations(FLOATS, 2)), ids=str
)
def test_3_in_memory_and_under_tensor_too(
    tmp_path: Path,
    base: State,
    models: States,
    of_base: torch.dtype,
    of_model: torch.dtype,
) -> None:
    from mergekit.merge_methods import merge_tensors

    first = base[UP].to(of_base)
    untouched, other = first.to(of_model), models[0][UP].to(of_model)
    tensors = [first, untouched, other]
    merged = merge_tensors(tensors, "metagpt", base_index=0, dtype=torch.float64)
    assert_same_bits(merged, other.double())

    if {of_base, of_model} == {torch.float32, torch.bfloat16}:
        paths = written(tmp_path, *({**base, UP: tensor} for tensor in tensors))
        config = merge_config(paths[0], paths[1:])
        config["parameters"] = {"granularity": "tensor"}
        merged = run_mergekit(config, tmp_path / "out")[UP]
        lambdas = torch.tensor([0.0, 1.0], dtype=torch.float64)
        first, *others = (tensor.float() for tensor in tensors)
        assert_within_bound(merged, first, others, lambdas)


# 4. Resized vocabularies.


def resized(state: State, rows: int) -> State:
    """The state with a vocabulary of another size; new rows are far from all others."""
    new = {}
    for name in (EMBED, HEAD):
        more = torch.full((max(0, rows - len(state[name])), 32), 5.0)
        new[name] = torch.cat([state[name][:rows], more.to(state[name].dtype)])
    return {**state, **new}


@pytest.mark.parametrize("rows", [101, 90])
def test_4_the_rows_that_both_have_are_measured(
    tmp_path: Path, base: State, models: States, rows: int
) -> None:
    paths = written(tmp_path, base)
    other = write_model(
        tmp_path / "other", resized(models[0], rows), llama_config(vocab_size=rows)
    )
    result = mergekit_metagpt.scan(paths[0], [other])
    common = min(rows, 96)
    cut = [resized(state, common) for state in (base, models[0])]
    assert_close(result.pool("model").sq_norms, naive_sq_norms(cut[0], cut[1:]))


@pytest.mark.parametrize("kind", ["absent", "copy"])
def test_4_the_rows_that_both_have_of_a_tied_head_count_once(
    tmp_path: Path, base: State, models: States, kind: str
) -> None:
    other = with_head(resized(models[0], 101), kind)
    found = scanned(tmp_path, with_head(base, "copy"), other)
    assert_close(found, naive_sq_norms(headless(base), models[:1]))


@pytest.mark.parametrize("shape", [(10, 12), (7, 8), (10, 5)])
def test_4_the_overlap_where_exactly_one_axis_differs(
    tmp_path: Path, base: State, shape: tuple[int, int]
) -> None:
    name = "model.positions.weight"
    first, second = torch.randn(10, 8), torch.randn(shape)
    found = scanned(tmp_path, {**base, name: first}, {**base, name: second})
    rows, columns = min(10, shape[0]), min(8, shape[1])
    part = slice(rows), slice(columns)
    assert_close(found, [naive_sq_norm(first[part], second[part])])


@pytest.mark.parametrize("shape", [(11, 9), (10, 8, 1), (80,)])
def test_4_more_than_one_differing_axis_is_an_error(
    tmp_path: Path, base: State, shape: tuple[int, ...]
) -> None:
    name = "model.positions.weight"
    states = [{**base, name: torch.zeros(10, 8)}, {**base, name: torch.zeros(shape)}]
    paths = written(tmp_path, *states)
    with pytest.raises(ValueError, match=name):
        mergekit_metagpt.scan(paths[0], paths[1:])
    with pytest.raises(ValueError, match=name):
        run_mergekit(merge_config(paths[0], paths[1:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def reordered(state: State) -> State:
    """The state with its vocabulary backwards."""
    return {**state, **{name: state[name].flip(0) for name in (EMBED, HEAD)}}


def test_4_a_vocabulary_in_another_order_is_measured_row_against_row(
    tmp_path: Path, base: State
) -> None:
    near = tuned(base, 1, 2e-3)
    found = scanned(tmp_path, base, reordered(near))
    assert_close(found, naive_sq_norms(base, [reordered(near)]))
    assert found.item() > 10 * naive_sq_norms(base, [near]).item()


def test_4_warn_when_the_embeddings_hold_most_of_n_t(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    near = tuned(base, 1, 2e-3)
    first, *others = written(tmp_path, base, models[0], reordered(near))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    (warning,) = said(caplog, "embeddings")
    assert str(others[1]) in warning
    assert str(others[0]) not in warning


def test_4_the_warning_points_to_exclude(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    near = tuned(base, 1, 2e-3)
    first, *others = written(tmp_path, base, models[0], reordered(near))
    run_mergekit(merge_config(first, others), tmp_path / "1")
    (warning,) = said(caplog, "embeddings")
    remedy = "embed_tokens,lm_head"
    assert f"exclude: {remedy}" in warning
    caplog.clear()
    config = merge_config(first, others, parameters={"exclude": remedy})
    run_mergekit(config, tmp_path / "2")
    assert not said(caplog, "embeddings")


def test_4_no_warning_when_the_embeddings_hold_little(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    paths = written(tmp_path, base, *models)
    run_mergekit(merge_config(paths[0], paths[1:]), tmp_path / "out")
    assert not said(caplog, "embeddings")


# 5. Numbers. (Squared norms are summed wholly in float64: docs/architecture.md.)


def test_5_tiny_tensors(tmp_path: Path) -> None:
    shapes = [(), (1,), (1, 1), (2, 0, 3), (0,), (3,), (2, 5)]
    rng = torch.Generator().manual_seed(0)
    first, second, third = (
        {f"w{k}": torch.randn(shape, generator=rng) for k, shape in enumerate(shapes)}
        for _ in range(3)
    )
    paths = written(tmp_path, first, second, third)
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    for name, row in zip(result.names, result.sq_norms, strict=True):
        exact = [exact_sum(first[name], other[name]) for other in (second, third)]
        assert_close(row, exact, 1e-12)
    total = result.pool("model").sq_norms
    assert_close(total, naive_sq_norms(first, [second, third]), 1e-12)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("numel", [5, 70_000])
def test_5_magnitudes_from_subnormal_to_near_overflow(
    tmp_path: Path, dtype: torch.dtype, numel: int
) -> None:
    info = torch.finfo(dtype)
    smallest, rng = info.tiny * info.eps, torch.Generator().manual_seed(0)
    scales = [smallest, 9 * smallest, info.tiny, info.tiny**0.5]
    scales += [1.0, info.max**0.5, info.max / 4, info.max]
    first, second, third = {}, {}, {}
    for at, scale in enumerate(scales):
        for state in (first, second, third):
            wide = scale * (2 * torch.rand(numel, generator=rng).double() - 1)
            state[f"w{at}"] = wide.to(dtype)
    # float32's extremes are too far apart for one sum: look at each tensor's.
    paths = written(tmp_path, first, second, third)
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    for name, row in zip(result.names, result.sq_norms, strict=True):
        exact = naive_sq_norms({name: first[name]}, [second, third])
        assert bool((exact > 0).all())
        assert_close(row, exact, 1e-12)
        ours, theirs = mergekit_metagpt.coefficients(row), naive_coefficients(exact)
        assert_close(ours, theirs)
    total = result.pool("model").sq_norms
    assert_close(total, naive_sq_norms(first, [second, third]), 1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_5_large_constant_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    # Sums in float32, of blocks of 1,000 and however exact the rest, are off by 4e-7
    # here, and differences rounded to float32 by 1.2e-7.
    numel, names = (1 << 20) + 1000, ("w0", "w1")
    starts = torch.tensor([1.0 + 2.0**-7, 0.1], dtype=dtype).tolist()
    steps = torch.tensor([-(2.0**-12), 1 / 3], dtype=dtype).tolist()
    states = [
        {
            n: torch.full((numel,), v, dtype=dtype)
            for n, v in zip(names, values, strict=True)
        }
        for values in (starts, steps, [0.11, 1.7], [-3.1e-3, 1e-3])
    ]
    found = scanned(tmp_path, *states)
    expected = [
        float(
            sum(
                numel
                * (Fraction(s[n][0].item()) - Fraction(states[0][n][0].item())) ** 2
                for n in names
            )
        )
        for s in states[1:]
    ]
    assert_close(found, expected, 1e-10)
    lambdas = naive_coefficients(torch.tensor(expected, dtype=torch.float64))
    assert_close(mergekit_metagpt.coefficients(found), lambdas)


def test_5_differences_are_not_rounded_to_float32(tmp_path: Path) -> None:
    # The exact difference has one bit more than float32: off by 1.2e-7 if rounded.
    first = {"w": torch.full((1000,), -(2.0**-24)), "v": torch.zeros(1000)}
    second = {"w": torch.ones(1000), "v": torch.zeros(1000)}
    third = {"w": first["w"], "v": torch.full((1000,), 1e3)}
    found = mergekit_metagpt.coefficients(scanned(tmp_path, first, second, third))
    sq_norms = [1000 * (1 + 2.0**-24) ** 2, 1e9]
    expected = naive_coefficients(torch.tensor(sq_norms, dtype=torch.float64))
    assert_close(found, expected, 1e-8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models with a tensor that the scan divides between workers."""
    folder = tmp_path_factory.mktemp("large")
    rng = torch.Generator().manual_seed(0)
    shapes = {"model.a.weight": (4100, 4099), "model.b.weight": (999, 998)}
    states: list[State] = [{}, {}, {}]
    for name, shape in shapes.items():
        # So far apart that every order of adding the squares rounds differently.
        scale = torch.randint(-12, 13, shape, generator=rng)
        for state in states:
            values = torch.randn(shape, generator=rng)
            state[name] = torch.ldexp(values, scale).bfloat16()
    return written(folder, *states)


@pytest.mark.parametrize("segment", [None, 1 << 21])
def test_5_the_same_bits_whatever_the_number_of_workers(
    large: list[Path], segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if segment:  # many parts of one tensor, without gigabytes of it
        monkeypatch.setattr(one_pass, "SEGMENT", segment)
    results = [
        mergekit_metagpt.scan(large[0], large[1:], workers=workers)
        for workers in (1, 2, 5)
    ]
    for result in results[1:]:
        assert result.names == results[0].names
        assert_same_bits(result.sq_norms, results[0].sq_norms)
        for granularity in ("model", "layer", "tensor"):
            first, second = (r.pool(granularity) for r in (results[0], result))
            assert_same_bits(first.sq_norms, second.sq_norms)


def test_5_the_same_bits_whatever_the_shard_layout(
    tmp_path: Path, base: State, models: States
) -> None:
    found = []
    for shards, backwards in itertools.product((1, 2, 5, len(base)), (False, True)):
        order = sorted(base, reverse=backwards)
        states = [{name: state[name] for name in order} for state in (base, *models)]
        folder = tmp_path / f"{shards}{backwards}"
        paths = written(folder, *states[:1])
        paths += written(folder / "tuned", *states[1:], shards=shards)
        found += [mergekit_metagpt.scan(paths[0], paths[1:])]
        found += [mergekit_metagpt.scan(paths[1], [paths[0], *paths[2:]])]
    for result in found:
        other = found[0] if result.names == found[0].names else None
        assert other is not None
    for result, other in zip(found[2:], found, strict=False):
        assert_same_bits(result.sq_norms, other.sq_norms)
        assert_same_bits(result.pool("model").sq_norms, other.pool("model").sq_norms)


def test_5_the_same_bits_in_two_runs(large: list[Path]) -> None:
    first, second = (mergekit_metagpt.scan(large[0], large[1:]) for _ in range(2))
    assert_same_bits(first.sq_norms, second.sq_norms)


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_5_tensors_are_summed_in_name_order(
    tmp_path: Path, base: State, models: States, granularity: str
) -> None:
    paths = written(tmp_path, base, *models, shards=3)
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    assert list(result.names) == sorted(base)
    pooled = result.pool(granularity)
    pools = {"model": ""} if granularity == "model" else {k: k for k in pooled.keys}
    for at, part in enumerate(pools.values()):
        rows = [at for at, name in enumerate(result.names) if part in name]
        columns = result.sq_norms[rows].T.tolist()
        in_order = [sum(column) for column in columns]
        found = pooled.sq_norms.view(len(pools), -1)[at].tolist()
        assert found == in_order


def test_5_the_same_bits_whatever_device_the_merge_runs_on(
    tmp_path: Path, base: State, models: States
) -> None:
    # mergekit runs a worker per accelerator under `with torch.device(...)`.
    paths = written(tmp_path, base, *models)
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            results += [mergekit_metagpt.scan(paths[0], paths[1:])]
            results += [mergekit_metagpt.scan(paths[0], paths[1:], gram=True)]
            results[-1].pool("layer")
    for result in results[1:]:
        assert result.sq_norms.device.type == "cpu"
        assert_same_bits(result.sq_norms, results[0].sq_norms)
        assert_same_bits(
            result.pool("model").sq_norms, results[0].pool("model").sq_norms
        )


def test_5_the_same_bits_with_and_without_the_gram_matrix(large: list[Path]) -> None:
    first = mergekit_metagpt.scan(large[0], large[1:])
    second = mergekit_metagpt.scan(large[0], large[1:], gram=True)
    assert_same_bits(first.sq_norms, second.sq_norms)


THREADS = """
import sys, threading, torch
import mergekit_metagpt
from mergekit.merge_methods import merge_tensors

mergekit_metagpt.register()
rng = torch.Generator().manual_seed(0)
numbers = torch.randn(2_000_000, generator=rng)
# A base of zeros, so that every bit of lambda shows in the result.
tensors = [torch.zeros_like(numbers), numbers, numbers.flip(0).square()]
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    found = mergekit_metagpt.scan(sys.argv[1], sys.argv[2:]).pool("model").sq_norms
    assert torch.get_num_threads() == threads
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads], "the scan left its own number for later threads"
    merged = merge_tensors(tensors, "metagpt", base_index=0, dtype=torch.float64)
    print(*(value.hex() for value in [*found.tolist(), *merged[:9].tolist()]))
"""


@pytest.fixture(scope="module")
def with_other_threads(large: list[Path]) -> list[list[str]]:
    """For several numbers of torch threads: n_t of a scan, elements of a merge."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *map(str, large)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_5_the_same_bits_whatever_torchs_threads(
    with_other_threads: list[list[str]],
) -> None:
    assert len(with_other_threads) == 3
    assert len({tuple(values[:2]) for values in with_other_threads}) == 1


def test_5_the_same_bits_in_memory_whatever_torchs_threads(
    with_other_threads: list[list[str]],
) -> None:
    assert len({tuple(values[2:]) for values in with_other_threads}) == 1


# 6. n_t = 0.


def test_6_for_positive_power_that_lambda_is_zero(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, base, *models[:2])
    lambdas = naive_coefficients(naive_sq_norms(base, [base, *models[:2]]))
    assert lambdas[0] == 0
    merged = run_mergekit(merge_config(paths[0], paths[1:]), tmp_path / "out")
    for name, tensor in merged.items():
        tensors = [state[name] for state in (base, *models[:2])]
        assert_within_bound(tensor, base[name], tensors, lambdas)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_6_if_all_are_zero_the_base_is_returned(
    tmp_path: Path, base: State, granularity: str
) -> None:
    paths = written(tmp_path, base, base, base)
    config = merge_config(paths[0], paths[1:], parameters={"granularity": granularity})
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in base.items():
        assert_same_bits(merged[name], tensor)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("power", [2.0, 0.5, -1.0])
def test_6_if_all_are_zero_there_is_a_warning(
    tmp_path: Path, base: State, power: float, granularity: str, caplog: Log
) -> None:
    paths = written(tmp_path, base, base, base)
    config = merge_config(paths[0], paths[1:])
    config["parameters"] = {"power": power, "granularity": granularity}
    run_mergekit(config, tmp_path / "out")
    (warning,) = said(caplog, "base is kept")
    assert str(paths[0]) in warning


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_6_power_zero_looks_at_no_norm_and_scans_nothing(
    tmp_path: Path, base: State, models: States, granularity: str, measured: list[int]
) -> None:
    paths = written(tmp_path, base, base, *models[:2])
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"power": 0, "granularity": granularity}
    merged = run_mergekit(config, tmp_path / "out")
    assert not measured
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    assert_lambda(merged, base, models[:2], third)


@pytest.mark.parametrize("power", [-1.0, -2.0])
def test_6_negative_power_leaves_out_a_model_with_zero(
    tmp_path: Path, base: State, models: States, power: float
) -> None:
    paths = written(tmp_path, base, models[0], base, models[1])
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"power": power}
    merged = run_mergekit(config, tmp_path / "out")
    sq_norms = naive_sq_norms(base, models[:2])
    expected = naive_coefficients(sq_norms, power=power)
    assert_lambda(merged, base, models[:2], expected)


def test_6_negative_power_leaves_out_with_a_warning(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    paths = written(tmp_path, base, models[0], base, models[1])
    config = merge_config(paths[0], paths[1:], parameters={"power": -1})
    run_mergekit(config, tmp_path / "out")
    (warning,) = said(caplog, "left out")
    assert str(paths[2]) in warning
    assert str(paths[1]) not in warning
    assert str(paths[3]) not in warning


@pytest.mark.parametrize("power", [2.0, -1.0])
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-22, 1e-38])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_6_never_an_absolute_epsilon(
    tmp_path: Path, base: State, granularity: str, size: float, power: float
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    # The same step in two directions, so that both are told apart: n is 1 : 4.
    models = [
        {name: size * k * torch.roll(t, k, -1) for name, t in base.items()}
        for k in (1, 2)
    ]
    paths = written(tmp_path, zeros, *models)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"granularity": granularity, "power": power}
    merged = run_mergekit(config, tmp_path / "out")
    for pool in [list(base)] if granularity == "model" else names_with(base, "proj"):
        names = pool if isinstance(pool, list) else [pool]
        if granularity == "layer":
            names = [n for n in base if n.split(".")[:3] == names[0].split(".")[:3]]
        part = {name: zeros[name] for name in names}
        sq_norms = naive_sq_norms(part, models)
        assert bool((sq_norms > 0).all())
        expected = naive_coefficients(sq_norms, power=power)
        for name in names:
            exact = naive_merge(zeros[name], [m[name] for m in models], expected)
            error = (merged[name] - exact).abs().max()
            assert error <= 1e-7 * exact.abs().max()


# 7. Degenerate results are said aloud.


def shares(base: State, wanted: Sequence[float]) -> list[State]:
    """Fine-tunes of which each one's n_t is the wanted share of the sum."""
    states = [tuned(base, k + 1) for k in range(len(wanted))]
    sq_norms = naive_sq_norms(base, states).tolist()
    return [
        {n: base[n] + (share / norm) ** 0.5 * (state[n] - base[n]) for n in base}
        for state, share, norm in zip(states, wanted, sq_norms, strict=True)
    ]


DEGENERATE = "Usual causes"


@pytest.mark.parametrize(
    ("wanted", "culprit"),
    [((0.93, 0.07), 0), ((0.04, 0.92, 0.04), 1), ((0.91, 0.05, 0.04), 0)],
)
def test_7_a_lambda_above_nine_tenths_gives_one_warning_that_names_the_model(
    tmp_path: Path, base: State, wanted: tuple[float, ...], culprit: int, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, wanted))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    (warning,) = said(caplog, DEGENERATE)
    found = [k for k, other in enumerate(others) if str(other) in warning]
    assert found == [culprit]


@pytest.mark.parametrize(
    ("wanted", "culprit"), [((0.85, 0.12, 0.03), 2), ((0.5, 0.02, 0.23, 0.25), 1)]
)
def test_7_a_lambda_below_a_tenth_of_the_average_gives_one_warning_that_names_it(
    tmp_path: Path, base: State, wanted: tuple[float, ...], culprit: int, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, wanted))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    (warning,) = said(caplog, DEGENERATE)
    found = [k for k, other in enumerate(others) if str(other) in warning]
    assert found == [culprit]


@pytest.mark.parametrize(
    "wanted", [(0.89, 0.11), (0.5, 0.46, 0.04), (0.7, 0.03, 0.13, 0.14)]
)
def test_7_no_warning_for_less(
    tmp_path: Path, base: State, wanted: tuple[float, ...], caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, wanted))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    assert said(caplog, "lambda of")
    assert not said(caplog, DEGENERATE)


def test_7_with_two_models_or_more(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    paths = written(tmp_path, base, models[0])
    run_mergekit(merge_config(paths[0], paths[1:]), tmp_path / "out")
    assert not said(caplog, DEGENERATE)


def test_7_the_warning_names_usual_causes_and_ways_out(
    tmp_path: Path, base: State, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, (0.95, 0.05)))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    (warning,) = said(caplog, DEGENERATE)
    for part in ("LoRA", "full fine-tune", "wrong base", "vocabulary"):
        assert part in warning
    for way_out in ("power: 1", "weight", "exclude"):
        assert way_out in warning


def test_7_said_through_logging_at_warning(
    tmp_path: Path, base: State, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, (0.95, 0.05)))
    run_mergekit(merge_config(first, others), tmp_path / "1")
    (record,) = [r for r in caplog.records if DEGENERATE in r.getMessage()]
    assert record.name == "mergekit_metagpt"
    assert record.levelno == logging.WARNING
    caplog.clear()
    logger = logging.getLogger("mergekit_metagpt")
    logger.setLevel(logging.ERROR)
    try:
        run_mergekit(merge_config(first, others), tmp_path / "2")
    finally:
        logger.setLevel(logging.NOTSET)
    assert not said(caplog, DEGENERATE)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_7_once_per_merge_and_again_at_the_next(
    tmp_path: Path, base: State, granularity: str, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, (0.98, 0.02)))
    config = merge_config(first, others, parameters={"granularity": granularity})
    for number, fresh in enumerate((True, True, False, False), 1):
        run_mergekit(config, tmp_path / str(number), fresh=fresh)
        assert len(said(caplog, DEGENERATE)) == number


def test_7_once_per_merge_however_many_slices_bases_and_models(
    tmp_path: Path, base: State, caplog: Log
) -> None:
    states = [base, *shares(base, (0.98, 0.015, 0.005))]
    paths = written(tmp_path, *states, states[0])
    slices = [
        sources(paths[:3], 0, 1),
        sources([paths[0], paths[1], paths[3]], 1, 2),
        sources([paths[4], *paths[1:3]], 2, 3, base_model=str(paths[4])),
    ]
    config = merge_config(paths[0], [], slices=slices)
    for number in (1, 2):
        run_mergekit(config, tmp_path / str(number))
        assert len(said(caplog, DEGENERATE)) == number
