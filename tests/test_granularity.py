"""`granularity`: which squared norms are pooled, against a naive oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from tests.conftest import Family, write_family
from tests.families import (
    State,
    assert_nothing_left,
    cast,
    console_script,
    llama_state,
    run_mergekit,
)
from tests.oracle import (
    GRANULARITIES,
    assert_within_bound,
    naive_coefficients,
    naive_merge,
    naive_pool,
    naive_sq_norms,
)

LAYERS = [f"model.layers.{index}." for index in range(3)]
Ranges = list[tuple[int, int]]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two float32 fine-tunes, whose tensors moved by different distances."""
    base = llama_state()
    rng = torch.Generator().manual_seed(0)
    states = [
        {
            name: tensor
            + 1e-3
            * (1 + (3 * k + at * at) % 7)
            * torch.randn(tensor.shape, generator=rng)
            for at, (name, tensor) in enumerate(base.items())
        }
        for k in range(2)
    ]
    return write_family(tmp_path_factory.mktemp("uneven"), base, states)


def pooling(family: Family, granularity: Any, **settings: Any) -> dict[str, Any]:
    """A merge in float64 that sets nothing but the granularity."""
    return family.config(parameters={"granularity": granularity}, **settings)


def sliced(family: Family, *ranges: tuple[int, int]) -> list[dict[str, Any]]:
    """`slices:` that stack the given layers, the same of every model."""
    everyone = [str(path) for path in family.paths]
    return [
        {"sources": [{"model": model, "layer_range": list(r)} for model in everyone]}
        for r in ranges
    ]


def test_each_pools_as_it_says_and_model_is_the_default(
    tmp_path: Path, uneven: Family
) -> None:
    merged = {}
    for granularity in GRANULARITIES:
        config = pooling(uneven, granularity)
        merged[granularity] = run_mergekit(config, tmp_path / granularity)
        uneven.assert_merged(merged[granularity], granularity=granularity)
    default = run_mergekit(uneven.config(), tmp_path / "default")
    for name in uneven.base_state:
        assert torch.equal(default[name], merged["model"][name])
        assert not torch.equal(merged["layer"][name], merged["model"][name])
        alone = naive_pool(name, "layer") == name
        assert torch.equal(merged["layer"][name], merged["tensor"][name]) == alone


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
    written = write_family(tmp_path, base, [model])
    pooled = mergekit_metagpt.scan(written.base, written.models).pool("layer")
    assert sorted(pooled.keys) == sorted(set(keys.values()))
    for key, found in zip(pooled.keys, pooled.sq_norms, strict=True):
        pool = {name: base[name] for name in keys if keys[name] == key}
        torch.testing.assert_close(
            found, naive_sq_norms(pool, [model]), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_scan_pools_nothing_where_everything_is_excluded(
    uneven: Family, granularity: str
) -> None:
    result = mergekit_metagpt.scan(uneven.base, uneven.models)
    assert result.pool("model", ["weight"]).sq_norms.tolist() == [0.0, 0.0]
    pooled = result.pool(granularity, ["weight"])
    assert pooled.keys == ()
    assert pooled.sq_norms.shape == (0, 2)


MODEL, LAYER, TENSOR = GRANULARITIES
FILTERED: list[tuple[list[Any], Callable[[str], str]]] = [
    (
        [{"filter": "mlp", "value": TENSOR}, {"value": MODEL}],
        lambda name: TENSOR if "mlp" in name else MODEL,
    ),
    (
        [{"filter": "mlp", "value": TENSOR}, {"filter": "*", "value": LAYER}],
        lambda name: TENSOR if "mlp" in name else LAYER,
    ),
    (
        [{"filter": "layers.1.", "value": LAYER}],
        lambda name: LAYER if "layers.1." in name else MODEL,
    ),
    # A gradient in steps: names cannot be interpolated, so only the last layer has
    # the last one.
    ([MODEL, TENSOR], lambda name: TENSOR if name.startswith(LAYERS[2]) else MODEL),
]


@pytest.mark.parametrize(("setting", "expected"), FILTERED)
def test_filters_and_gradients_choose_the_pool_of_each_tensor(
    tmp_path: Path, uneven: Family, setting: Any, expected: Callable[[str], str]
) -> None:
    # Under `model` a tensor has the ratio of the whole model, filters or not.
    merged = run_mergekit(pooling(uneven, setting), tmp_path / "out")
    uneven.assert_merged(
        merged, lambda name: uneven.lambdas(granularity=expected(name))(name)
    )


def test_each_slice_may_have_a_granularity_of_its_own(
    tmp_path: Path, uneven: Family
) -> None:
    slices = sliced(uneven, (0, 1), (1, 2), (2, 3))
    for entry, granularity in zip(slices, GRANULARITIES, strict=True):
        entry["parameters"] = {"granularity": granularity}
    merged = run_mergekit(uneven.config(slices=slices), tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        # Embeddings belong to the first slice, norm and head to the last.
        granularity = MODEL if "embed_tokens" in name else TENSOR
        for layer, of_layer in zip(LAYERS, GRANULARITIES, strict=True):
            if name.startswith(layer):
                granularity = of_layer
        return uneven.lambdas(granularity=granularity)(name)

    uneven.assert_merged(merged, lambdas)


ALIGNED: list[Ranges] = [
    [(0, 3)],
    [(0, 1), (1, 2), (2, 3)],
    [(0, 2), (2, 3)],
    [(0, 2)],
    [(0, 1)],
]


@pytest.mark.parametrize("ranges", ALIGNED, ids=str)
def test_layer_takes_slices_that_leave_layers_in_place(
    tmp_path: Path, uneven: Family, ranges: Ranges
) -> None:
    config = pooling(uneven, "layer", slices=sliced(uneven, *ranges))
    merged = run_mergekit(config, tmp_path / "out")
    gone = tuple(LAYERS[ranges[-1][1] :])
    base = {n: t for n, t in uneven.base_state.items() if not n.startswith(gone or "?")}
    kept = replace(uneven, base_state=base)
    kept.assert_merged(merged, uneven.lambdas(granularity="layer"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_layer_takes_slices_in_place_whatever_precisions(
    tmp_path: Path, uneven: Family, dtype: str | None
) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    everyone = uneven.all_states
    states = [cast(state, kind) for state, kind in zip(everyone, kinds, strict=True)]
    stored = write_family(tmp_path, states[0], states[1:])
    slices = sliced(stored, (0, 1), (1, 3))
    config = pooling(stored, "layer", slices=slices, dtype=dtype)
    merged = run_mergekit(config, tmp_path / "out")
    handed = [cast(state, getattr(torch, dtype or "float32")) for state in states]
    for name, tensor in merged.items():
        lambdas = stored.lambdas(granularity="layer")(name)
        others = [state[name] for state in handed[1:]]
        assert_within_bound(tensor, handed[0][name], others, lambdas)


MOVED: dict[str, Ranges] = {
    "shifted": [(1, 3)],
    "swapped": [(1, 2), (0, 1), (2, 3)],
    "repeated": [(0, 2), (1, 3)],
    "more layers than any model": [(0, 3), (2, 3)],
    "only the last": [(0, 2), (1, 2)],
}
ADVICE = "use granularity: model or granularity: tensor"


def assert_refused(config: dict[str, Any], out: Path) -> str:
    """Check that a merge that moves layers is refused; return the reason."""
    with pytest.raises(ValueError, match=f"(?i){ADVICE}") as error:
        run_mergekit(config, out)
    assert_nothing_left(out)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", None])
@pytest.mark.parametrize("ranges", MOVED.values(), ids=MOVED)
def test_layer_refuses_slices_that_move_layers(
    tmp_path: Path, uneven: Family, ranges: Ranges, dtype: str | None
) -> None:
    slices = sliced(uneven, *ranges)
    config = pooling(uneven, "layer", slices=slices, dtype=dtype)
    message = assert_refused(config, tmp_path / "out")
    assert message.startswith("granularity 'layer'")
    assert "model.layers." in message


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layer_refuses_slices_that_move_the_layers_of_one_model(
    tmp_path: Path, uneven: Family, which: int
) -> None:
    slices = sliced(uneven, (0, 2))
    slices[0]["sources"][which]["layer_range"] = [1, 3]
    message = assert_refused(pooling(uneven, "layer", slices=slices), tmp_path / "out")
    assert str(uneven.paths[which]) in message


def test_layer_refuses_moved_layers_where_a_filter_asks_for_it(
    tmp_path: Path, uneven: Family
) -> None:
    setting = [{"filter": "down_proj", "value": "layer"}, {"value": "model"}]
    slices = sliced(uneven, (1, 2), (0, 1))
    assert_refused(pooling(uneven, setting, slices=slices), tmp_path / "out")


def test_layer_refuses_moved_layers_that_have_small_tensors_in_common(
    tmp_path: Path, uneven: Family
) -> None:
    # Norms that nothing trained are the same in every layer: only the large ones tell.
    def untrained(state: State) -> State:
        return {n: torch.ones(32) if "norm" in n else t for n, t in state.items()}

    base, *states = map(untrained, uneven.all_states)
    alike = write_family(tmp_path, base, states)
    slices = sliced(alike, (1, 2), (0, 1))
    assert_refused(pooling(alike, "layer", slices=slices, dtype=None), tmp_path / "out")


def test_layer_refuses_moved_layers_in_the_console_script(
    tmp_path: Path, uneven: Family
) -> None:
    config = pooling(uneven, "layer", slices=sliced(uneven, (1, 3)))
    done = console_script(config, tmp_path / "out")
    assert done.returncode != 0
    assert ADVICE in done.stderr
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("ranges", MOVED.values(), ids=MOVED)
def test_model_and_tensor_take_slices_that_move_layers(
    tmp_path: Path, uneven: Family, ranges: Ranges, granularity: str
) -> None:
    config = pooling(uneven, granularity, slices=sliced(uneven, *ranges))
    merged = run_mergekit(config, tmp_path / "out")
    origins = [index for start, stop in ranges for index in range(start, stop)]
    assert {name.split(".")[2] for name in merged if ".layers." in name} == {
        str(index) for index in range(len(origins))
    }
    lambdas = uneven.lambdas(granularity=granularity)
    for index, origin in enumerate(origins):
        for source in (n for n in uneven.base_state if n.startswith(LAYERS[origin])):
            name = source.replace(LAYERS[origin], f"model.layers.{index}.")
            assert_moved(merged[name], source, uneven, lambdas(source))


def assert_moved(
    merged: torch.Tensor, source: str, family: Family, lambdas: torch.Tensor
) -> None:
    """Check a merged tensor against those that it was merged from."""
    tensors = [state[source] for state in family.states]
    exact = naive_merge(family.base_state[source], tensors, lambdas)
    torch.testing.assert_close(merged, exact, rtol=1e-10, atol=1e-12)


def test_power_zero_has_no_layers_to_mistake(tmp_path: Path, uneven: Family) -> None:
    slices = sliced(uneven, (1, 2), (0, 1))
    config = pooling(uneven, "layer", slices=slices)
    config["parameters"]["power"] = 0
    merged = run_mergekit(config, tmp_path / "out")
    half = naive_coefficients(torch.ones(2, dtype=torch.float64))
    name = "mlp.up_proj.weight"
    assert_moved(merged[LAYERS[0] + name], LAYERS[1] + name, uneven, half)
