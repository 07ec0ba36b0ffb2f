"""`weight`, `power`, `lambda`, `exclude` against a naive oracle, and bad values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import (
    State,
    assert_nothing_left,
    llama_state,
    merge_config,
    run_mergekit,
    tuned,
    write_model,
)
from tests.oracle import (
    assert_merged_exactly,
    assert_same_bits,
    exact_coefficients,
    naive_coefficients,
    naive_lambdas,
    naive_pool,
    naive_sq_norms,
)

GRANULARITIES = ["model", "layer", "tensor"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = [f"model.layers.{index}." for index in range(3)]
FACTORS = [(1.0, 0.5, 3.0), (0.0, 1.0, 2.0), (0.0, 0.0, 0.1), (1e300, 1e-300, 7.0)]

Lambdas = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Trio:
    """A base and three fine-tunes, in memory and on disk."""

    base: State
    states: tuple[State, ...]
    paths: tuple[Path, ...]

    def config(
        self, parameters: dict[str, Any], *own: dict[str, Any], **settings: Any
    ) -> dict[str, Any]:
        """A merge in float64 with shared parameters and some of each model's own."""
        config = merge_config(self.paths[0], self.paths[1:], dtype="float64")
        config["parameters"] = parameters
        for entry, values in zip(config["models"], own, strict=False):
            entry["parameters"] = values
        return {**config, **settings}

    def lambdas(self, **settings: Any) -> Lambdas:
        """The oracle's lambda, by the name of a tensor."""
        return lambda name: naive_lambdas(name, self.base, self.states, **settings)

    def assert_merged(self, merged: State, lambdas: Lambdas) -> None:
        assert_merged_exactly(merged, self.base, self.states, lambdas)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Stored in float32."""
    base = llama_state()
    sizes = (1e-3, 2e-3, 3e-3)
    states = tuple(tuned(base, k + 1, size) for k, size in enumerate(sizes))
    folder = tmp_path_factory.mktemp("trio")
    paths = [write_model(folder / f"m{k}", s) for k, s in enumerate((base, *states))]
    return Trio(base, states, tuple(paths))


def weights(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"weight": value} for value in values]


# weight


@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weight", FACTORS, ids=str)
def test_weight_is_a_factor_in_the_ratio(
    tmp_path: Path,
    trio: Trio,
    weight: tuple[float, ...],
    granularity: str,
    power: float,
) -> None:
    settings = {"granularity": granularity, "power": power}
    merged = run_mergekit(trio.config(settings, *weights(weight)), tmp_path / "out")
    trio.assert_merged(merged, trio.lambdas(weight=weight, **settings))


def test_weight_of_all_models_alike_changes_nothing(tmp_path: Path, trio: Trio) -> None:
    merged = run_mergekit(trio.config({"weight": 0.3}), tmp_path / "out")
    trio.assert_merged(merged, trio.lambdas())


def test_weight_of_one_model_leaves_the_others_at_one(
    tmp_path: Path, trio: Trio
) -> None:
    config = trio.config({}, {}, {"weight": 5})
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(merged, trio.lambdas(weight=(1, 5, 1)))


def test_weight_may_be_an_integer_or_in_scientific_notation(
    tmp_path: Path, trio: Trio
) -> None:
    # YAML reads 1e-1 as a string.
    config = trio.config({}, *weights([2, "1e-1", 1.0]))
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(merged, trio.lambdas(weight=(2, 0.1, 1)))


def test_weight_of_the_base_is_ignored(tmp_path: Path, trio: Trio) -> None:
    config = trio.config({})
    entry = {"model": str(trio.paths[0]), "parameters": {"weight": 100.0}}
    config["models"].insert(1, entry)
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(merged, trio.lambdas())


def test_weight_by_filter(tmp_path: Path, trio: Trio) -> None:
    first = [{"filter": "mlp", "value": 0.2}, {"value": 2.0}]
    second = [{"filter": "layers.1.", "value": 0}]  # elsewhere the default, 1
    config = trio.config({}, {"weight": first}, {"weight": second})
    merged = run_mergekit(config, tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        weight = [0.2 if "mlp" in name else 2.0, float("layers.1." not in name), 1.0]
        return naive_lambdas(name, trio.base, trio.states, weight=weight)

    trio.assert_merged(merged, lambdas)


def depth(name: str) -> float:
    """mergekit's t: 0 at the first layer (and outside of all layers), 1 at the last."""
    parts = name.split(".")
    return int(parts[2]) / 2 if parts[1] == "layers" else 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_by_gradient(tmp_path: Path, trio: Trio, granularity: str) -> None:
    config = trio.config(
        {"granularity": granularity},
        *weights([[0.0, 1.0], [1.0, 4.0, 1.0], 0.5]),
    )
    merged = run_mergekit(config, tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        t = depth(name)
        weight = (t, 4.0 - 6.0 * abs(t - 0.5), 0.5)
        return naive_lambdas(
            name, trio.base, trio.states, granularity=granularity, weight=weight
        )

    trio.assert_merged(merged, lambdas)


def test_weight_by_gradient_within_a_filter(tmp_path: Path, trio: Trio) -> None:
    setting = [{"filter": "self_attn", "value": [0, 1]}, {"value": 3}]
    merged = run_mergekit(trio.config({}, {"weight": setting}), tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        weight = (depth(name) if "self_attn" in name else 3.0, 1.0, 1.0)
        return naive_lambdas(name, trio.base, trio.states, weight=weight)

    trio.assert_merged(merged, lambdas)


NO_WEIGHT = "weight is 0 for every model"


@pytest.mark.parametrize("power", [2, 0, -1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_zero_for_all_is_an_error(
    tmp_path: Path, trio: Trio, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power}
    for number, config in enumerate(
        (
            trio.config(settings, *weights([0, 0.0, 0])),
            trio.config({**settings, "weight": 0}),
            trio.config({**settings, "weight": [{"filter": "*", "value": 0}]}),
        )
    ):
        out = tmp_path / str(number)
        with pytest.raises(ValueError, match=NO_WEIGHT):
            run_mergekit(config, out)
        assert_nothing_left(out)


def test_weight_zero_of_the_only_model_is_an_error(tmp_path: Path, trio: Trio) -> None:
    config = trio.config({})
    config["models"] = [{"model": str(trio.paths[1]), "parameters": {"weight": 0}}]
    with pytest.raises(ValueError, match=NO_WEIGHT):
        run_mergekit(config, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_weight_zero_for_all_is_an_error_in_memory(trio: Trio) -> None:
    from mergekit.merge_methods import merge_state_dicts, merge_tensors

    states = [trio.base, *trio.states]
    parameters = {"weight": [0, 0.0, 0]}
    with pytest.raises(ValueError, match=NO_WEIGHT):
        merge_state_dicts(states, "metagpt", base=0, parameters=parameters)
    tensors = [state[EMBED] for state in states]
    with pytest.raises(ValueError, match=NO_WEIGHT):
        merge_tensors(tensors, "metagpt", base_index=0, parameters=parameters)


def test_weight_zero_in_one_merge_says_nothing_of_the_next(
    tmp_path: Path, trio: Trio
) -> None:
    nothing, all_of_them = trio.config({"weight": 0}), trio.config({"weight": 1})
    for number in range(2):
        with pytest.raises(ValueError, match=NO_WEIGHT):
            run_mergekit(nothing, tmp_path / f"{number}a", fresh=False)
        merged = run_mergekit(all_of_them, tmp_path / f"{number}b", fresh=False)
        trio.assert_merged(merged, trio.lambdas())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_zero_for_all_by_filter_on_one_tensor_keeps_the_bases(
    tmp_path: Path, trio: Trio, granularity: str
) -> None:
    kept = "model.layers.1.mlp.up_proj.weight"
    setting = [{"filter": kept, "value": 0}, {"value": 1}]
    config = trio.config({"granularity": granularity, "weight": setting})
    del config["dtype"]
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base.items():
        if name == kept:
            assert_same_bits(merged[name], tensor)
        else:
            assert not torch.equal(merged[name], tensor)


@pytest.mark.parametrize("first", [0, 1])
def test_weight_zero_for_all_by_gradient_on_one_layer_keeps_the_bases(
    tmp_path: Path, trio: Trio, first: int
) -> None:
    # t is 0 in the first layer, and for embeddings, norm and head; 1 in the last.
    config = trio.config({"weight": [first, 1 - first]})
    del config["dtype"]
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base.items():
        if depth(name) == first:
            assert_same_bits(merged[name], tensor)
        else:
            assert not torch.equal(merged[name], tensor)


@pytest.mark.parametrize("zero", [0, 1])
def test_weight_zero_for_all_in_one_slice_keeps_the_bases(
    tmp_path: Path, trio: Trio, zero: int
) -> None:
    slices: list[dict[str, Any]] = []
    for number, layers in enumerate(([0, 1], [1, 3])):
        entries = [{"model": str(path), "layer_range": layers} for path in trio.paths]
        weight = float(number != zero)
        slices.append({"sources": entries, "parameters": {"weight": weight}})
    config = merge_config(trio.paths[0], [], slices=slices)
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base.items():
        last = not name.startswith((LAYERS[0], "model.embed"))
        assert torch.equal(merged[name], tensor) == (last == bool(zero))


# power


POWERS = [0.0, 1.0, -1.0, 2.0, 0.5, 30.0, 1000.0, -1000.0, 1e308, -1e308]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_power_is_the_exponent_of_the_norms(
    tmp_path: Path, trio: Trio, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power}
    config = trio.config(settings, {}, {"weight": 3.0})
    merged = run_mergekit(config, tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        pool = {
            other: tensor
            for other, tensor in trio.base.items()
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


@pytest.mark.parametrize("power", [1000.0, 1e308, -1e308])
def test_large_power_shares_between_equal_models(
    tmp_path: Path, trio: Trio, power: float
) -> None:
    near, far = tuned(trio.base, 9, 1e-6), trio.states[2]
    winner, loser = (far, near) if power > 0 else (near, far)
    states = [winner, loser, winner]
    paths = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = merge_config(trio.paths[0], paths, dtype="float64")
    config["parameters"] = {"power": power}
    merged = run_mergekit(config, tmp_path / "out")
    half = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    assert_merged_exactly(merged, trio.base, states, lambda name: half)


# lambda


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scale", [0.5, -0.5, 1, 2, -3.0])
def test_lambda_scales_the_merged_task_vector(
    tmp_path: Path, trio: Trio, scale: float, granularity: str
) -> None:
    settings = {"granularity": granularity, "lambda": scale}
    config = trio.config(settings, {"weight": 0.5})
    merged = run_mergekit(config, tmp_path / "out")
    trio.assert_merged(
        merged,
        trio.lambdas(granularity=granularity, weight=(0.5, 1, 1), scale=float(scale)),
    )


@pytest.mark.parametrize("power", [2, 0, -1])
def test_lambda_zero_is_the_base(tmp_path: Path, trio: Trio, power: float) -> None:
    config = trio.config({"lambda": 0, "power": power})
    del config["dtype"]
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in trio.base.items():
        assert_same_bits(merged[name], tensor)


def test_lambda_by_filter_and_gradient(tmp_path: Path, trio: Trio) -> None:
    setting = [{"filter": "mlp", "value": [0.0, 2.0]}, {"value": 0.5}]
    merged = run_mergekit(trio.config({"lambda": setting}), tmp_path / "out")

    def lambdas(name: str) -> torch.Tensor:
        scale = 2 * depth(name) if "mlp" in name else 0.5
        return naive_lambdas(name, trio.base, trio.states, scale=scale)

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


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("exclude", EXCLUDES)
def test_exclude_takes_tensors_out_of_n_t_which_are_merged_all_the_same(
    tmp_path: Path, trio: Trio, exclude: str, granularity: str
) -> None:
    settings = {"granularity": granularity, "exclude": exclude}
    config = trio.config(settings, *weights([1, 2, 0.5]))
    merged = run_mergekit(config, tmp_path / "out")
    # The oracle takes the weights alone where `exclude` empties a pool.
    lambdas = trio.lambdas(
        granularity=granularity, exclude=EXCLUDES[exclude], weight=(1, 2, 0.5)
    )
    trio.assert_merged(merged, lambdas)
    for name, tensor in trio.base.items():
        assert not torch.equal(merged[name], tensor.double())


@pytest.mark.parametrize("power", [2, -1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_exclude_of_everything_leaves_the_weights_alone(
    tmp_path: Path, trio: Trio, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power, "exclude": "weight"}
    config = trio.config(settings, *weights([1, 2, 5]))
    merged = run_mergekit(config, tmp_path / "out")
    alone = torch.tensor([1, 2, 5], dtype=torch.float64) / 8
    trio.assert_merged(merged, lambda name: alone)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_exclude_in_memory(trio: Trio, granularity: str) -> None:
    from mergekit.merge_methods import merge_state_dicts

    parameters = {"granularity": granularity, "exclude": "mlp, lm_head"}
    merged = merge_state_dicts(
        [trio.base, *trio.states],
        "metagpt",
        base=0,
        dtype=torch.float64,
        parameters={**parameters, "weight": [1, 2, 5]},
    )
    trio.assert_merged(
        merged,
        trio.lambdas(
            granularity=granularity, exclude=["mlp", "lm_head"], weight=(1, 2, 5)
        ),
    )


@pytest.mark.parametrize(
    ("exclude", "counts"), [("lm_head", True), ("embed_tokens", False)]
)
def test_exclude_knows_a_tied_head_by_its_embeddings_name(
    tmp_path: Path, trio: Trio, exclude: str, counts: bool
) -> None:
    tied = [
        {n: t for n, t in s.items() if n != HEAD} for s in (trio.base, *trio.states)
    ]
    for state in tied[1:]:
        state[EMBED] = state[EMBED] + 0.01
    paths = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(tied)]
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"exclude": exclude}
    merged = run_mergekit(config, tmp_path / "out")
    left_out = [] if counts else [EMBED]
    assert_merged_exactly(
        merged,
        tied[0],
        tied[1:],
        lambda name: naive_lambdas(name, tied[0], tied[1:], exclude=left_out),
    )


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
    tmp_path: Path, trio: Trio, name: str, value: Any, legal: str
) -> None:
    for own in (False, True) if name == "weight" else (False,):
        parameters = {name: value}
        config = trio.config({}, {}, parameters) if own else trio.config(parameters)
        with pytest.raises(ValueError, match=f"^{name} is ") as error:
            run_mergekit(config, tmp_path / "out")
        assert legal in str(error.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "legal"), [case for case in BAD if not isinstance(case[1], list)]
)
def test_a_bad_value_is_named_with_the_legal_ones_in_memory(
    trio: Trio, name: str, value: Any, legal: str
) -> None:
    from mergekit.merge_methods import merge_state_dicts

    states = [trio.base, *trio.states]
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        merge_state_dicts(states, "metagpt", base=0, parameters={name: value})
    assert legal in str(error.value)


def test_a_bad_value_is_quoted(tmp_path: Path, trio: Trio) -> None:
    for value in ("block", "heavy"):
        name = "granularity" if value == "block" else "weight"
        with pytest.raises(ValueError, match=f"^{name} is '{value}'; expected "):
            run_mergekit(trio.config({name: value}), tmp_path / "out")
