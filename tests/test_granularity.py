"""`granularity`: which squared norms are pooled, against a naive oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from tests.families import (
    State,
    assert_nothing_left,
    cast,
    console_script,
    llama_state,
    merge_config,
    run_mergekit,
    write_model,
)
from tests.oracle import (
    assert_merged_exactly,
    assert_within_bound,
    naive_coefficients,
    naive_lambdas,
    naive_merge,
    naive_pool,
    naive_sq_norms,
)

GRANULARITIES = ["model", "layer", "tensor"]
LAYERS = [f"model.layers.{index}." for index in range(3)]


@dataclass(frozen=True)
class Uneven:
    """A base and two fine-tunes that part from it by other amounts in each tensor."""

    base: State
    states: tuple[State, ...]
    paths: tuple[Path, ...]

    def config(self, granularity: Any, **settings: Any) -> dict[str, Any]:
        """A merge in float64 that sets nothing but the granularity."""
        config = merge_config(self.paths[0], self.paths[1:], **settings)
        config["parameters"] = {"granularity": granularity}
        return {"dtype": "float64", **config}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    """Stored in float32, one file each."""
    base = llama_state()
    rng = torch.Generator().manual_seed(0)
    states = tuple(
        {
            name: tensor
            + 1e-3
            * (1 + (3 * k + at * at) % 7)
            * torch.randn(tensor.shape, generator=rng)
            for at, (name, tensor) in enumerate(base.items())
        }
        for k in range(2)
    )
    folder = tmp_path_factory.mktemp("uneven")
    paths = [write_model(folder / f"m{k}", s) for k, s in enumerate((base, *states))]
    return Uneven(base, states, tuple(paths))


def sliced(paths: Sequence[Path], *ranges: tuple[int, int]) -> list[dict[str, Any]]:
    """`slices:` that stack the given layers, the same of every model."""
    return [
        {"sources": [{"model": str(p), "layer_range": list(r)} for p in paths]}
        for r in ranges
    ]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pools_as_it_says(tmp_path: Path, uneven: Uneven, granularity: str) -> None:
    merged = run_mergekit(uneven.config(granularity), tmp_path / "out")
    assert_merged_exactly(
        merged,
        uneven.base,
        uneven.states,
        lambda name: naive_lambdas(
            name, uneven.base, uneven.states, granularity=granularity
        ),
    )


def test_the_three_differ_and_model_is_the_default(
    tmp_path: Path, uneven: Uneven
) -> None:
    merged = {
        granularity: run_mergekit(uneven.config(granularity), tmp_path / granularity)
        for granularity in GRANULARITIES
    }
    config = uneven.config("model")
    del config["parameters"]
    default = run_mergekit(config, tmp_path / "default")
    for name in uneven.base:
        assert torch.equal(default[name], merged["model"][name])
        assert not torch.equal(merged["layer"][name], merged["model"][name])
        alone = naive_pool(name, "layer") == name
        assert torch.equal(merged["layer"][name], merged["tensor"][name]) == alone


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_in_memory_pools_the_tensors_of_the_call(
    uneven: Uneven, granularity: str
) -> None:
    from mergekit.merge_methods import merge_state_dicts

    merged = merge_state_dicts(
        [uneven.base, *uneven.states],
        "metagpt",
        base=0,
        dtype=torch.float64,
        parameters={"granularity": granularity},
    )
    assert_merged_exactly(
        merged,
        uneven.base,
        uneven.states,
        lambda name: naive_lambdas(
            name, uneven.base, uneven.states, granularity=granularity
        ),
    )


def test_layer_is_the_name_up_to_its_first_integer_component(tmp_path: Path) -> None:
    keys = {
        "model.layers.12.mlp.up_proj.weight": "model.layers.12",
        "model.layers.12.self_attn.q_proj.weight": "model.layers.12",
        "model.layers.1.mlp.up_proj.weight": "model.layers.1",
        "model.layers.1.mlp.experts.3.w1.weight": "model.layers.1",
        "vision_tower.encoder.layers.3.norm.weight": "vision_tower.encoder.layers.3",
        "transformer.h.0.attn.weight": "transformer.h.0",
        "transformer.h.0.mlp.weight": "transformer.h.0",
        "blocks.7": "blocks.7",
        "0.weight": "0",
        "conv1.weight": "conv1.weight",
        "stage2.block.weight": "stage2.block.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: naive_pool(name, "layer") for name in keys} == keys
    rng = torch.Generator().manual_seed(0)
    base, model = ({n: torch.randn(4, 3, generator=rng) for n in keys} for _ in "ab")
    paths = [write_model(tmp_path / f"m{k}", s) for k, s in enumerate((base, model))]
    pooled = mergekit_metagpt.scan(paths[0], paths[1:]).pool("layer")
    assert sorted(pooled.keys) == sorted(set(keys.values()))
    for key, found in zip(pooled.keys, pooled.sq_norms, strict=True):
        pool = {name: base[name] for name in keys if keys[name] == key}
        torch.testing.assert_close(
            found, naive_sq_norms(pool, [model]), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_scan_pools_nothing_where_everything_is_excluded(
    uneven: Uneven, granularity: str
) -> None:
    result = mergekit_metagpt.scan(uneven.paths[0], uneven.paths[1:])
    assert result.pool("model", ["weight"]).sq_norms.tolist() == [0.0, 0.0]
    pooled = result.pool(granularity, ["weight"])
    assert pooled.keys == ()
    assert pooled.sq_norms.shape == (0, 2)


FILTERED = [
    [{"filter": "mlp", "value": "tensor"}, {"value": "model"}],
    [{"filter": "mlp", "value": "tensor"}, {"filter": "*", "value": "layer"}],
    [{"filter": "self_attn", "value": "layer"}, {"filter": "mlp", "value": "tensor"}],
    [{"filter": "layers.1.", "value": "layer"}],
]


@pytest.mark.parametrize("setting", FILTERED, ids=str)
def test_filters_choose_the_pool_of_each_tensor(
    tmp_path: Path, uneven: Uneven, setting: list[dict[str, str]]
) -> None:
    def granularity(name: str) -> str:
        for entry in setting:
            if entry.get("filter", "*") == "*" or entry["filter"] in name:
                return entry["value"]
        return "model"

    # Under `model` a tensor has the ratio of the whole model, filters or not.
    merged = run_mergekit(uneven.config(setting), tmp_path / "out")
    assert_merged_exactly(
        merged,
        uneven.base,
        uneven.states,
        lambda name: naive_lambdas(
            name, uneven.base, uneven.states, granularity=granularity(name)
        ),
    )


def test_a_list_of_names_is_a_gradient_in_steps(tmp_path: Path, uneven: Uneven) -> None:
    # mergekit: names cannot be interpolated, so only the last layer has the last one.
    merged = run_mergekit(uneven.config(["model", "tensor"]), tmp_path / "out")
    assert_merged_exactly(
        merged,
        uneven.base,
        uneven.states,
        lambda name: naive_lambdas(
            name,
            uneven.base,
            uneven.states,
            granularity="tensor" if name.startswith(LAYERS[2]) else "model",
        ),
    )


def test_each_slice_may_have_a_granularity_of_its_own(
    tmp_path: Path, uneven: Uneven
) -> None:
    slices = sliced(uneven.paths, (0, 1), (1, 2), (2, 3))
    for entry, granularity in zip(slices, GRANULARITIES, strict=True):
        entry["parameters"] = {"granularity": granularity}
    config = merge_config(uneven.paths[0], [], slices=slices, dtype="float64")
    merged = run_mergekit(config, tmp_path / "out")

    def granularity_of(name: str) -> str:
        for layer, granularity in zip(LAYERS, GRANULARITIES, strict=True):
            if name.startswith(layer):
                return granularity
        # Embeddings belong to the first slice, norm and head to the last.
        return "model" if "embed_tokens" in name else "tensor"

    assert_merged_exactly(
        merged,
        uneven.base,
        uneven.states,
        lambda name: naive_lambdas(
            name, uneven.base, uneven.states, granularity=granularity_of(name)
        ),
    )


ALIGNED: list[list[tuple[int, int]]] = [
    [(0, 3)],
    [(0, 1), (1, 2), (2, 3)],
    [(0, 2), (2, 3)],
    [(0, 2)],
    [(0, 1)],
]


@pytest.mark.parametrize("ranges", ALIGNED, ids=str)
def test_layer_takes_slices_that_leave_layers_in_place(
    tmp_path: Path, uneven: Uneven, ranges: list[tuple[int, int]]
) -> None:
    config = uneven.config("layer", slices=sliced(uneven.paths, *ranges))
    merged = run_mergekit(config, tmp_path / "out")
    gone = tuple(LAYERS[ranges[-1][1] :])
    kept = {n: t for n, t in uneven.base.items() if not n.startswith(gone or "?")}
    assert_merged_exactly(
        merged,
        kept,
        uneven.states,
        lambda name: naive_lambdas(
            name, uneven.base, uneven.states, granularity="layer"
        ),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_layer_takes_slices_in_place_whatever_precisions(
    tmp_path: Path, uneven: Uneven, dtype: str | None
) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    states = [
        cast(state, kind)
        for state, kind in zip((uneven.base, *uneven.states), kinds, strict=True)
    ]
    paths = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = merge_config(paths[0], [], slices=sliced(paths, (0, 1), (1, 3)))
    config["parameters"] = {"granularity": "layer"}
    if dtype:
        config["dtype"] = dtype
    merged = run_mergekit(config, tmp_path / "out")
    handed = [cast(s, getattr(torch, dtype)) if dtype else s for s in states]
    if dtype is None:
        handed = [cast(state, torch.float32) for state in states]
    for name, tensor in merged.items():
        lambdas = naive_lambdas(name, states[0], states[1:], granularity="layer")
        others = [state[name] for state in handed[1:]]
        assert_within_bound(tensor, handed[0][name], others, lambdas)


MOVED: dict[str, list[tuple[int, int]]] = {
    "shifted": [(1, 3)],
    "swapped": [(1, 2), (0, 1), (2, 3)],
    "repeated": [(0, 2), (1, 3)],
    "more layers than any model": [(0, 3), (2, 3)],
    "only the last": [(0, 2), (1, 2)],
}
ADVICE = "use granularity: model or granularity: tensor"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", None])
@pytest.mark.parametrize("ranges", MOVED.values(), ids=MOVED)
def test_layer_refuses_slices_that_move_layers(
    tmp_path: Path, uneven: Uneven, ranges: list[tuple[int, int]], dtype: str | None
) -> None:
    config = uneven.config("layer", slices=sliced(uneven.paths, *ranges))
    config["dtype"] = dtype
    with pytest.raises(ValueError, match=f"(?i){ADVICE}") as error:
        run_mergekit(config, tmp_path / "out")
    message = str(error.value)
    assert message.startswith("granularity 'layer'")
    assert "model.layers." in message
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layer_refuses_slices_that_move_the_layers_of_one_model(
    tmp_path: Path, uneven: Uneven, which: int
) -> None:
    slices = sliced(uneven.paths, (0, 2))
    slices[0]["sources"][which]["layer_range"] = [1, 3]
    with pytest.raises(ValueError, match=ADVICE) as error:
        run_mergekit(uneven.config("layer", slices=slices), tmp_path / "out")
    assert str(uneven.paths[which]) in str(error.value)
    assert_nothing_left(tmp_path / "out")


def test_layer_refuses_moved_layers_where_a_filter_asks_for_it(
    tmp_path: Path, uneven: Uneven
) -> None:
    setting = [{"filter": "down_proj", "value": "layer"}, {"value": "model"}]
    config = uneven.config(setting, slices=sliced(uneven.paths, (1, 2), (0, 1)))
    with pytest.raises(ValueError, match=ADVICE):
        run_mergekit(config, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_layer_refuses_moved_layers_that_have_small_tensors_in_common(
    tmp_path: Path, uneven: Uneven
) -> None:
    # Norms that nothing trained are the same in every layer: only the large ones tell.
    def untrained(state: State) -> State:
        return {n: torch.ones(32) if "norm" in n else t for n, t in state.items()}

    states = [untrained(state) for state in (uneven.base, *uneven.states)]
    paths = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = merge_config(paths[0], [], slices=sliced(paths, (1, 2), (0, 1)))
    config["parameters"] = {"granularity": "layer"}
    with pytest.raises(ValueError, match=ADVICE):
        run_mergekit(config, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_layer_refuses_moved_layers_in_the_console_script(
    tmp_path: Path, uneven: Uneven
) -> None:
    config = uneven.config("layer", slices=sliced(uneven.paths, (1, 3)))
    done = console_script(config, tmp_path / "out")
    assert done.returncode != 0
    assert ADVICE in done.stderr
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("ranges", MOVED.values(), ids=MOVED)
def test_model_and_tensor_take_slices_that_move_layers(
    tmp_path: Path, uneven: Uneven, ranges: list[tuple[int, int]], granularity: str
) -> None:
    config = uneven.config(granularity, slices=sliced(uneven.paths, *ranges))
    merged = run_mergekit(config, tmp_path / "out")
    origins = [index for start, stop in ranges for index in range(start, stop)]
    assert {name.split(".")[2] for name in merged if ".layers." in name} == {
        str(index) for index in range(len(origins))
    }
    for index, origin in enumerate(origins):
        for source in (n for n in uneven.base if n.startswith(LAYERS[origin])):
            name = source.replace(LAYERS[origin], f"model.layers.{index}.")
            lambdas = naive_lambdas(
                source, uneven.base, uneven.states, granularity=granularity
            )
            tensors = [state[source] for state in uneven.states]
            exact = naive_merge(uneven.base[source], tensors, lambdas)
            torch.testing.assert_close(merged[name], exact, rtol=1e-10, atol=1e-12)


def test_power_zero_has_no_layers_to_mistake(tmp_path: Path, uneven: Uneven) -> None:
    config = uneven.config("layer", slices=sliced(uneven.paths, (1, 2), (0, 1)))
    config["parameters"]["power"] = 0
    merged = run_mergekit(config, tmp_path / "out")
    half = naive_coefficients(torch.ones(2, dtype=torch.float64))
    name = "mlp.up_proj.weight"
    tensors = [state[LAYERS[1] + name] for state in uneven.states]
    exact = naive_merge(uneven.base[LAYERS[1] + name], tensors, half)
    torch.testing.assert_close(merged[LAYERS[0] + name], exact, rtol=1e-10, atol=1e-12)
