"""`weight`, `power`, `lambda`, `exclude` against a naive oracle, and bad values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts

from tests.conftest import Family, write_family
from tests.families import assert_nothing_left, llama_state, run_mergekit, tuned
from tests.oracle import (
    GRANULARITIES,
    assert_same_bits,
    exact_coefficients,
    naive_coefficients,
    naive_pool,
    naive_sq_norms,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three fine-tunes in float32."""
    base = llama_state()
    states = [tuned(base, k, size) for k, size in enumerate((1e-3, 2e-3, 3e-3), 1)]
    return write_family(tmp_path_factory.mktemp("trio"), base, states)


def weights(*values: Any) -> list[dict[str, Any]]:
    """Parameters of each model; None is no weight."""
    return [{} if value is None else {"weight": value} for value in values]


def depth(name: str) -> float:
    """mergekit's t: 0 at the first layer (and outside of all layers), 1 at the last."""
    parts = name.split(".")
    return int(parts[2]) / 2 if parts[1] == "layers" else 0.0


# weight


FACTORS = [(1.0, 0.5, 3.0), (0.0, 1.0, 2.0), (0.0, 0.0, 0.1), (1e300, 1e-300, 7.0)]


@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
@every_granularity
@pytest.mark.parametrize("weight", FACTORS, ids=str)
def test_weight_is_a_factor_in_the_ratio(
    tmp_path: Path,
    trio: Family,
    weight: tuple[float, ...],
    granularity: str,
    power: float,
) -> None:
    settings = {"granularity": granularity, "power": power}
    config = trio.config(*weights(*weight), parameters=settings)
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(merged, weight=weight, **settings)


Weight = Callable[[str], tuple[float, ...]]
FILTERS = [{"filter": "mlp", "value": 0.2}, {"value": 2.0}]
ELSEWHERE_1 = [{"filter": "layers.1.", "value": 0}]
GRADIENT_IN_FILTER = [{"filter": "self_attn", "value": [0, 1]}, {"value": 3}]
WEIGHTS: dict[str, tuple[list[Any], Weight]] = {
    "of one model": ([None, 5], lambda name: (1, 5, 1)),
    # YAML reads 1e-1 as a string.
    "an integer, in scientific notation": ([2, "1e-1", 1.0], lambda name: (2, 0.1, 1)),
    "by filter": (
        [FILTERS, ELSEWHERE_1],
        lambda name: (0.2 if "mlp" in name else 2.0, "layers.1." not in name, 1.0),
    ),
    "by gradient": (
        [[0.0, 1.0], [1.0, 4.0, 1.0], 0.5],
        lambda name: (depth(name), 4.0 - 6.0 * abs(depth(name) - 0.5), 0.5),
    ),
    "by gradient within a filter": (
        [GRADIENT_IN_FILTER],
        lambda name: (depth(name) if "self_attn" in name else 3.0, 1.0, 1.0),
    ),
}


@every_granularity
@pytest.mark.parametrize("case", WEIGHTS)
def test_weight_of_each_model(
    tmp_path: Path, trio: Family, case: str, granularity: str
) -> None:
    values, weight = WEIGHTS[case]
    parameters = {"granularity": granularity}
    config = trio.config(*weights(*values), parameters=parameters)
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(
        merged,
        lambda name: trio.lambdas(granularity=granularity, weight=weight(name))(name),
    )


def test_weight_of_all_models_alike_changes_nothing(
    tmp_path: Path, trio: Family
) -> None:
    config = trio.config(parameters={"weight": 0.3})
    trio.assert_merged(run_mergekit(config, tmp_path / "out"))


def test_weight_of_the_base_is_ignored(tmp_path: Path, trio: Family) -> None:
    config = trio.config()
    entry = {"model": str(trio.base), "parameters": {"weight": 100.0}}
    config["models"].insert(1, entry)
    trio.assert_merged(run_mergekit(config, tmp_path / "out"))


NO_WEIGHT = "weight is 0 for every model"


@pytest.mark.parametrize("power", [2, 0, -1])
@every_granularity
def test_weight_zero_for_all_is_an_error(
    tmp_path: Path, trio: Family, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power}
    only = trio.config(*weights(0), parameters=settings)
    del only["models"][1:]
    by_filter = [{"filter": "*", "value": 0}]
    for number, config in enumerate(
        (
            trio.config(*weights(0, 0.0, 0), parameters=settings),
            trio.config(parameters={**settings, "weight": 0}),
            trio.config(parameters={**settings, "weight": by_filter}),
            only,
        )
    ):
        with pytest.raises(ValueError, match=NO_WEIGHT):
            run_mergekit(config, tmp_path / str(number))
        assert_nothing_left(tmp_path / str(number))


def test_weight_zero_in_one_merge_says_nothing_of_the_next(
    tmp_path: Path, trio: Family
) -> None:
    nothing, all_of_them = (trio.config(parameters={"weight": w}) for w in (0, 1))
    for number in range(2):
        with pytest.raises(ValueError, match=NO_WEIGHT):
            run_mergekit(nothing, tmp_path / f"{number}a", fresh=False)
        merged = run_mergekit(all_of_them, tmp_path / f"{number}b", fresh=False)
        trio.assert_merged(merged)


ZEROS: dict[str, tuple[list[Any], Callable[[str], bool]]] = {
    "a filter": ([{"filter": UP, "value": 0}, {"value": 1}], lambda name: name == UP),
    "a gradient from 0": ([0, 1], lambda name: depth(name) == 0),
    "a gradient to 0": ([1, 0], lambda name: depth(name) == 1),
}


@every_granularity
@pytest.mark.parametrize("case", ZEROS)
def test_weight_zero_for_all_on_some_tensors_keeps_the_bases(
    tmp_path: Path, trio: Family, case: str, granularity: str
) -> None:
    weight, is_kept = ZEROS[case]
    parameters = {"granularity": granularity, "weight": weight}
    config = trio.config(parameters=parameters, dtype=None)
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base_state.items():
        if is_kept(name):
            assert_same_bits(merged[name], tensor)
        else:
            assert not torch.equal(merged[name], tensor)


@pytest.mark.parametrize("zero", [0, 1])
def test_weight_zero_for_all_in_one_slice_keeps_the_bases(
    tmp_path: Path, trio: Family, zero: int
) -> None:
    slices: list[dict[str, Any]] = []
    for number, layers in enumerate(([0, 1], [1, 3])):
        everyone = trio.paths
        entries = [{"model": str(path), "layer_range": layers} for path in everyone]
        weight = float(number != zero)
        slices.append({"sources": entries, "parameters": {"weight": weight}})
    merged = run_mergekit(trio.config(slices=slices, dtype=None), tmp_path / "out")
    for name, tensor in trio.base_state.items():
        last = not name.startswith(("model.layers.0.", "model.embed"))
        assert torch.equal(merged[name], tensor) == (last == bool(zero))


# power


POWERS = [0.0, 1.0, -1.0, 2.0, 0.5, 30.0, 1000.0, -1000.0, 1e308, -1e308]


@pytest.mark.parametrize("power", POWERS)
@every_granularity
def test_power_is_the_exponent_of_the_norms(
    tmp_path: Path, trio: Family, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power}
    config = trio.config({}, {"weight": 3.0}, parameters=settings)
    merged = run_mergekit(config, tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        pool = {
            other: tensor
            for other, tensor in trio.base_state.items()
            if naive_pool(other, granularity) == naive_pool(name, granularity)
        }
        sq_norms = naive_sq_norms(pool, trio.states).tolist()
        return exact_coefficients(sq_norms, (1, 3, 1), power)

    trio.assert_merged(merged, lambdas)


def test_the_two_oracles_agree() -> None:
    sq_norms = torch.tensor([0.3, 0.7, 1e-3], dtype=torch.float64)
    for power in (2.0, 1.0, 0.0, -3.0):
        first = exact_coefficients(sq_norms.tolist(), (1, 2, 5), power)
        second = naive_coefficients(sq_norms, (1, 2, 5), power)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


# lambda


@every_granularity
@pytest.mark.parametrize("scale", [0.5, -0.5, 1, 2, -3.0])
def test_lambda_scales_the_merged_task_vector(
    tmp_path: Path, trio: Family, scale: float, granularity: str
) -> None:
    parameters = {"granularity": granularity, "lambda": scale}
    config = trio.config({"weight": 0.5}, parameters=parameters)
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(
        merged, granularity=granularity, weight=(0.5, 1, 1), scale=float(scale)
    )


@pytest.mark.parametrize("power", [2, 0, -1])
def test_lambda_zero_is_the_base(tmp_path: Path, trio: Family, power: float) -> None:
    config = trio.config(parameters={"lambda": 0, "power": power}, dtype=None)
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base_state.items():
        assert_same_bits(merged[name], tensor)


def test_lambda_by_filter_and_gradient(tmp_path: Path, trio: Family) -> None:
    setting = [{"filter": "mlp", "value": [0.0, 2.0]}, {"value": 0.5}]
    config = trio.config(parameters={"lambda": setting})
    merged = run_mergekit(config, tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        scale = 2 * depth(name) if "mlp" in name else 0.5
        return trio.lambdas(scale=scale)(name)

    trio.assert_merged(merged, lambdas)


# exclude

EXCLUDES = {
    "embed_tokens": ["embed_tokens"],
    "embed_tokens,lm_head": ["embed_tokens", "lm_head"],
    " mlp ,, norm , ": ["mlp", "norm"],
    "layers.1.": ["layers.1."],
    "self_attn.q_proj.weight": ["self_attn.q_proj.weight"],
    "": [],
    " , ": [],
}


@every_granularity
@pytest.mark.parametrize("exclude", EXCLUDES)
def test_exclude_takes_tensors_out_of_n_t_which_are_merged_all_the_same(
    tmp_path: Path, trio: Family, exclude: str, granularity: str
) -> None:
    parameters = {"granularity": granularity, "exclude": exclude}
    config = trio.config(*weights(1, 2, 0.5), parameters=parameters)
    merged = run_mergekit(config, tmp_path / "out")
    # The oracle takes the weights alone where `exclude` empties a pool.
    trio.assert_merged(
        merged,
        granularity=granularity,
        exclude=EXCLUDES[exclude],
        weight=(1, 2, 0.5),
    )
    for name, tensor in trio.base_state.items():
        assert not torch.equal(merged[name], tensor.double())


@pytest.mark.parametrize("power", [2, -1])
@every_granularity
def test_exclude_of_everything_leaves_the_weights_alone(
    tmp_path: Path, trio: Family, granularity: str, power: float
) -> None:
    parameters = {"granularity": granularity, "power": power, "exclude": "weight"}
    config = trio.config(*weights(1, 2, 5), parameters=parameters)
    alone = torch.tensor([1, 2, 5], dtype=torch.float64) / 8
    trio.assert_merged(run_mergekit(config, tmp_path / "out"), lambda name: alone)


@pytest.mark.parametrize(
    ("exclude", "left_out"), [("lm_head", []), ("embed_tokens", [EMBED])]
)
def test_exclude_knows_a_tied_head_by_its_embeddings_name(
    tmp_path: Path, trio: Family, exclude: str, left_out: Sequence[str]
) -> None:
    base, *states = (
        {name: tensor for name, tensor in state.items() if name != HEAD}
        for state in trio.all_states
    )
    for state in states:
        state[EMBED] = state[EMBED] + 0.01
    tied = write_family(tmp_path, base, states)
    config = tied.config(parameters={"exclude": exclude})
    tied.assert_merged(run_mergekit(config, tmp_path / "out"), exclude=left_out)


# Bad values

BAD: list[tuple[str, Any, str]] = [
    ("granularity", "block", "'model', 'layer' or 'tensor'"),
    ("granularity", "Model", "'model', 'layer' or 'tensor'"),
    ("granularity", "", "'model', 'layer' or 'tensor'"),
    ("granularity", 3, "'model', 'layer' or 'tensor'"),
    ("granularity", ["model", "rows"], "'model', 'layer' or 'tensor'"),
    ("granularity", [{"filter": "mlp", "value": "rows"}], "'model', 'layer'"),
    ("weight", -1, ">= 0"),
    ("weight", -1e-9, ">= 0"),
    ("weight", math.nan, ">= 0"),
    ("weight", math.inf, ">= 0"),
    ("weight", "heavy", ">= 0"),
    ("weight", [1, -1], ">= 0"),
    ("weight", [{"filter": "mlp", "value": -1}, {"value": 1}], ">= 0"),
    ("power", math.nan, "finite"),
    ("power", math.inf, "finite"),
    ("power", -math.inf, "finite"),
    ("power", "two", "finite"),
    ("power", [{"filter": "mlp", "value": math.inf}], "finite"),
    ("lambda", math.nan, "finite"),
    ("lambda", -math.inf, "finite"),
    ("lambda", "all", "finite"),
    ("exclude", 7, "string"),
    ("exclude", True, "string"),
]


@pytest.mark.parametrize(("name", "value", "legal"), BAD)
def test_a_bad_value_is_named_with_the_legal_ones(
    tmp_path: Path, trio: Family, name: str, value: Any, legal: str
) -> None:
    parameters = {name: value}
    shown = f"'{value}'" if isinstance(value, str) else ""

    def refuse(merge: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=f"^{name} is {shown}") as error:
            merge()
        assert legal in str(error.value)
        assert not (tmp_path / "out").exists()

    refuse(lambda: run_mergekit(trio.config(parameters=parameters), tmp_path / "out"))
    if name == "weight":
        refuse(lambda: run_mergekit(trio.config({}, parameters), tmp_path / "out"))
    if not isinstance(value, list):
        states = trio.all_states
        options = {"base": 0, "parameters": parameters}
        refuse(lambda: merge_state_dicts(states, "metagpt", **options))
