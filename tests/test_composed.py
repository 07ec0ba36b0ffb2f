"""The composed methods: mergekit's own, bit for bit, with MetaGPT's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    GeneralizedTaskArithmeticMerge,
    PerGroupValues,
    TensorGroup,
    merge_state_dicts,
)

from mergekit_metagpt.method.composed import COMPOSED
from tests import matrix
from tests.conftest import Family, make_family
from tests.families import merge_config, run_mergekit
from tests.matrix import Row, covers
from tests.oracle import (
    GRANULARITIES,
    Oracle,
    assert_same_states,
    assert_unchanged,
    naive_coefficients,
    naive_merge,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NAMES = [row.name for row in matrix.COMPOSED]
SEED = ("--random-seed", "20")

# What no method has for a default, so that a parameter that is not passed on shows.
SETTINGS: dict[str, Any] = {
    "density": 0.6,
    "gamma": 0.05,
    "epsilon": 0.2,
    "lambda": 0.7,
    "int8_mask": True,
}

Weights = dict[str, dict[Any, float]]


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three float32 fine-tunes of one base."""
    return make_family(tmp_path_factory.mktemp("trio"), dtype=torch.float32)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Weights]:
    """The weights that mergekit's method was called with, by tensor and input."""
    seen: Weights = {}
    inner = GeneralizedTaskArithmeticMerge.merge_group

    def spy(self: Any, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        seen[group.metadata.name or ""] = dict(parameters["weight"].items())
        return inner(self, group, **parameters)

    monkeypatch.setattr(GeneralizedTaskArithmeticMerge, "merge_group", spy)
    yield seen


def settings_for(method: str) -> dict[str, Any]:
    """Those of `SETTINGS` that a method of mergekit has."""
    known = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    return {name: value for name, value in SETTINGS.items() if name in known}


def assert_passed(weights: Weights, family: Family, granularity: str) -> None:
    """Check that every tensor's weights are MetaGPT's and sum to 1."""
    oracle = Oracle(family.base_state, family.states)
    assert weights.keys() == oracle.names
    for name, values in weights.items():
        found = torch.tensor(list(values.values()), dtype=torch.float64)
        assert abs(float(found.sum()) - 1) < 1e-12
        expected = oracle.lambdas(name, granularity)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def with_explicit_weights(
    config: Mapping[str, Any], method: str, weights: Weights
) -> dict[str, Any]:
    """The same merge by mergekit's method, every weight of every tensor written out."""
    models = []
    for entry in config["models"]:
        by_tensor = [
            {"filter": name, "value": values[model]}
            for name, values in weights.items()
            for model in values
            if str(model) == entry["model"]
        ]
        models.append({**entry, "parameters": {"weight": by_tensor}})
    settings = {k: v for k, v in config["parameters"].items() if k != "granularity"}
    return {**config, "merge_method": method, "models": models, "parameters": settings}


@covers(*NAMES)
def test_in_the_graph(row: Row, tmp_path: Path, trio: Family, passed: Weights) -> None:
    method = row.name.strip("`").removeprefix("metagpt_")
    with row.expect():
        for granularity in GRANULARITIES:
            passed.clear()
            config = merge_config(
                trio.base,
                trio.models,
                dtype="float32",
                merge_method=f"metagpt_{method}",
                parameters={**settings_for(method), "granularity": granularity},
            )
            ours = run_mergekit(config, tmp_path / granularity, *SEED)
            assert_passed(passed, trio, granularity)
            explicit = with_explicit_weights(config, method, dict(passed))
            theirs = run_mergekit(explicit, tmp_path / f"{granularity}-theirs", *SEED)
            assert_same_states(ours, theirs)
            assert any((ours[name] != trio.base_state[name]).any() for name in ours)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", COMPOSED)
def test_in_memory(
    trio: Family, passed: Weights, method: str, granularity: str
) -> None:
    states = dict(zip(("base", "a", "b", "c"), trio.all_states, strict=True))
    settings = settings_for(method)
    with assert_unchanged(t for state in states.values() for t in state.values()):
        torch.manual_seed(5)
        ours = merge_state_dicts(
            states,
            f"metagpt_{method}",
            base="base",
            parameters={**settings, "granularity": granularity},
        )
    assert_passed(passed, trio, granularity)
    torch.manual_seed(5)
    weight = PerGroupValues([passed[name] for name in trio.base_state])
    theirs = merge_state_dicts(
        states, method, base="base", parameters={**settings, "weight": weight}
    )
    assert_same_states(ours, theirs)


@pytest.mark.parametrize("method", COMPOSED)
def test_defaults_are_the_inner_methods(
    tmp_path: Path, family: Family, passed: Weights, method: str
) -> None:
    """Without any parameter, in bfloat16: nothing but the weights is ours."""
    config = merge_config(
        family.base, family.models, merge_method=f"metagpt_{method}", parameters={}
    )
    ours = run_mergekit(config, tmp_path / "ours", *SEED)
    explicit = with_explicit_weights(config, method, dict(passed))
    assert_same_states(ours, run_mergekit(explicit, tmp_path / "theirs", *SEED))


@pytest.mark.parametrize("method", COMPOSED)
def test_parameters_are_the_inner_methods_and_ours(method: str) -> None:
    inner, composed = (
        {
            parameter.name: parameter
            for parameter in merge_methods.get(name).spec.parameters
        }
        for name in (method, f"metagpt_{method}")
    )
    for name, parameter in inner.items():
        if name not in ("weight", "lambda"):  # ours are checked, and know `keep`
            assert composed[name].value_type == parameter.value_type
            assert composed[name].scope == parameter.scope
        assert composed[name].default == parameter.default or name == "weight"
    plain = {p.name: p for p in merge_methods.get("metagpt").spec.parameters}
    assert composed.keys() == {*inner, *plain}
    for name in ("granularity", "weight", "power", "exclude"):
        assert composed[name].default == plain[name].default
        assert composed[name].scope == plain[name].scope


def test_every_task_arithmetic_method_of_mergekit_is_composed() -> None:
    family = {
        method.spec.name
        for method in merge_methods.registered_methods()
        if isinstance(method, GeneralizedTaskArithmeticMerge)
    }
    # Composed with itself, task_arithmetic is metagpt.
    assert family - {"task_arithmetic"} == set(COMPOSED)
    assert [f"`metagpt_{name}`" for name in COMPOSED] == NAMES


def test_the_registered_object_does_the_work() -> None:
    for name in COMPOSED:
        composed = merge_methods.get(f"metagpt_{name}")
        ours, theirs = composed.spec, composed.inner.spec
        assert composed.inner is merge_methods.get(name)
        assert ours.contract == theirs.contract
        assert ours.optional_tensor_policy == theirs.optional_tensor_policy


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 2.0])
def test_lambda_is_applied_once(trio: Family, passed: Weights, scale: float) -> None:
    parameters = {"lambda": scale, "density": 1.0}
    merged = merge_state_dicts(
        trio.all_states,
        "metagpt_dare_linear",
        base=0,
        parameters=parameters,
        dtype=torch.float64,
    )
    assert_passed(passed, trio, "model")
    lambdas = trio.lambdas(scale=scale)
    for name, base in trio.base_state.items():
        tensors = [state[name] for state in trio.states]
        exact = naive_merge(base, tensors, lambdas(name))
        torch.testing.assert_close(merged[name], exact, rtol=1e-12, atol=1e-15)


def test_weight_power_and_exclude_shape_the_weights(
    trio: Family, passed: Weights
) -> None:
    importance = [1.0, 0.0, 3.0]
    merge_state_dicts(
        trio.all_states,
        "metagpt_ties",
        base=0,
        parameters={"weight": importance, "power": 1.0, "exclude": "embed, lm_head"},
    )
    kept = [
        {n: t for n, t in state.items() if "embed" not in n and "lm_head" not in n}
        for state in trio.all_states
    ]
    sq_norms = Oracle(kept[0], kept[1:]).sq_norms
    expected = naive_coefficients(sq_norms, importance, power=1.0)
    for values in passed.values():
        found = torch.tensor(list(values.values()), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_random_draws_differ_between_seeds(tmp_path: Path, trio: Family) -> None:
    """The seed matters: else the comparisons above would show nothing."""
    config = merge_config(
        trio.base,
        trio.models,
        merge_method="metagpt_dare_ties",
        parameters={"density": 0.5},
    )
    first, second = (
        run_mergekit(config, tmp_path / seed, "--random-seed", seed)
        for seed in ("1", "2")
    )
    assert any((first[name] != second[name]).any() for name in first)
