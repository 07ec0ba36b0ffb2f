"""Merges through mergekit against a float64 oracle on whole state dicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mergekit_metagpt
from tests.conftest import Family, write_family
from tests.families import (
    State,
    cast,
    console_script,
    llama_config,
    merge_config,
    read_model,
    run_mergekit,
    said,
    write_model,
)
from tests.oracle import (
    assert_same_bits,
    assert_within_bound,
    naive_coefficients,
    naive_merge,
    naive_sq_norms,
    solved_coefficients,
    ulp,
)

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


@dataclass(frozen=True)
class Weights:
    """A base and its fine-tunes in float32, and the configuration of all."""

    base: State
    models: tuple[State, ...]
    config: object

    def write(
        self, folder: Path, count: int, dtype: torch.dtype, *, shards: int
    ) -> Family:
        """Store the base and the first `count` fine-tunes, the base in `shards`."""
        base = cast(self.base, dtype)
        states = tuple(cast(state, dtype) for state in self.models[:count])
        return Family(
            base=write_model(folder / "base", base, self.config, shards=shards),
            models=tuple(
                write_model(
                    folder / f"tuned{k}",
                    state,
                    self.config,
                    shards=1 if shards == 1 else 1 + k % 3,
                )
                for k, state in enumerate(states)
            ),
            base_state=base,
            states=states,
        )


def sequences(rng: torch.Generator, vocabulary: int, count: int) -> torch.Tensor:
    """Token sequences of a random Markov chain, shape `(count, 24)`."""
    likely = torch.randint(vocabulary, (vocabulary, 3), generator=rng)
    tokens = torch.randint(vocabulary, (count, 1), generator=rng)
    for _ in range(23):
        choice = torch.randint(3, (count,), generator=rng)
        following = likely[tokens[:, -1], choice]
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens


def train(model: torch.nn.Module, seed: int, steps: int, rate: float) -> State:
    """Minimise next-token loss on a Markov chain of its own; return the weights."""
    rng = torch.Generator().manual_seed(seed)
    data = sequences(rng, 96, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        batch = data[torch.arange(16 * step, 16 * (step + 1)) % len(data)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@pytest.fixture(scope="session")
def weights() -> Weights:
    """A trained base and twelve short fine-tunes at a small learning rate."""
    from transformers import LlamaForCausalLM

    config = llama_config(hidden_size=48, intermediate_size=96)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy CPUs, more make such small steps 10 times slower
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config)
        base = train(model, seed=0, steps=60, rate=5e-3)
        models = []
        for k in range(12):
            model.load_state_dict(base)
            models.append(train(model, seed=k + 1, steps=3 + k % 3, rate=2e-5))
    torch.set_num_threads(threads)
    return Weights(base, tuple(models), config)


def assert_said_lambda(
    lines: Sequence[str], models: Sequence[Path], lambdas: torch.Tensor
) -> None:
    """Check that exactly one line names every model with its coefficient."""
    assert len(lines) == 1, lines
    for model, value in zip(models, lambdas.tolist(), strict=True):
        assert f"{value:.4g} {model}" in lines[0]


def assert_merged(
    merged: State, base: State, models: Sequence[State], lambdas: torch.Tensor
) -> None:
    """Check every element of every tensor against the bound of the method."""
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        tensors = [model[name] for model in models]
        assert_within_bound(tensor, base[name], tensors, lambdas)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_equals_the_oracle(
    tmp_path: Path,
    weights: Weights,
    dtype: torch.dtype,
    count: int,
    shards: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = weights.write(tmp_path, count, dtype, shards=shards)
    base, states = family.base_state, family.states
    expected = naive_coefficients(naive_sq_norms(base, states))

    pooled = mergekit_metagpt.scan(family.base, family.models).pool("model")
    found = mergekit_metagpt.coefficients(pooled.sq_norms)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)

    config = merge_config(family.base, family.models)
    assert config.keys() == {"merge_method", "base_model", "models"}
    merged = run_mergekit(config, tmp_path / "out")
    assert_said_lambda(said(caplog, "coefficients of"), family.models, expected)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert_merged(merged, base, states, expected)

    exact = run_mergekit({**config, "dtype": "float64"}, tmp_path / "out64")
    found = solved_coefficients(exact, base, states)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("stored", HALVES, ids=str)
def test_share_of_correctly_rounded_elements(
    tmp_path: Path,
    weights: Weights,
    stored: torch.dtype,
    record_property: Callable[[str, object], None],
) -> None:
    for model in weights.models:
        moved = naive_sq_norms(weights.base, [model])
        size = sum(float(t.square().sum()) for t in weights.base.values())
        assert moved.item() < 1e-6 * size, "not a fine-tune of realistic size"

    family = weights.write(tmp_path, 3, stored, shards=1)
    base, states = family.base_state, family.states
    expected = naive_coefficients(naive_sq_norms(base, states))
    merged = run_mergekit(merge_config(family.base, family.models), tmp_path / "out")
    hits = count = 0
    for name, tensor in merged.items():
        exact = naive_merge(base[name], [state[name] for state in states], expected)
        near = (tensor.double() - exact).abs() <= 0.5 * ulp(exact, tensor.dtype)
        hits += int(near.sum())
        count += near.numel()
    record_property(f"elements correctly rounded, {stored}", f"{hits / count:.4%}")
    assert hits / count >= 0.99


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_console_script_needs_nothing_but_the_models(
    tmp_path: Path, weights: Weights, dtype: str | None
) -> None:
    family = weights.write(tmp_path, 3, torch.bfloat16, shards=2)
    base, states = family.base_state, family.states
    expected = naive_coefficients(naive_sq_norms(base, states))
    config = merge_config(family.base, family.models)
    if dtype:
        config["dtype"] = dtype
    done = console_script(config, tmp_path / "out", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "coefficients of" in line]
    assert_said_lambda(lines, family.models, expected)

    merged = read_model(tmp_path / "out")
    assert {t.dtype for t in merged.values()} == {
        torch.float32 if dtype else torch.bfloat16
    }
    assert_merged(merged, base, states, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_golden_linear_and_task_arithmetic_give_the_same(
    tmp_path: Path, weights: Weights, stored: torch.dtype
) -> None:
    family = weights.write(tmp_path, 3, stored, shards=1)
    lambdas = mergekit_metagpt.coefficients(
        mergekit_metagpt.scan(family.base, family.models).pool("model").sq_norms
    )
    weighted = [
        {"model": str(model), "parameters": {"weight": value}}
        for model, value in zip(family.models, lambdas.tolist(), strict=True)
    ]
    ours = run_mergekit(
        merge_config(family.base, family.models, dtype="float32"), tmp_path / "ours"
    )
    for method, base in (("linear", None), ("task_arithmetic", family.base)):
        config = merge_config(base, [], dtype="float32")
        config |= {"merge_method": method, "models": weighted}
        theirs = run_mergekit(config, tmp_path / method)
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            size = family.base_state[name].double().abs()
            for state in family.states:
                size = size + state[name].double().abs()
            error = (tensor.double() - theirs[name].double()).abs()
            assert bool((error <= 8 * 2.0**-24 * size).all()), (method, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_unchanged_weight_is_the_base_in_another_dtype(
    tmp_path: Path, weights: Weights, dtype: str
) -> None:
    base = weights.base
    states = [dict(state) for state in weights.models[:2]]
    for state in states:
        for name in list(state)[::2]:
            state[name] = base[name]
    config = write_family(tmp_path, base, states).config(dtype=dtype)
    merged = run_mergekit(config, tmp_path / "out")
    for name in list(base)[::2]:
        assert_same_bits(merged[name], base[name].to(getattr(torch, dtype)))
