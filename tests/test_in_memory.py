"""Tensors in memory: pools of one call, ties, gradients, dtypes, ids of files."""

from __future__ import annotations

import functools
import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods import PerGroupValues, TensorGroup
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors

from mergekit_metagpt import coefficients, scan
from mergekit_metagpt.arithmetic.scaled_sums import scaled_sum
from tests import families
from tests.conftest import Family
from tests.families import (
    SHAPES,
    State,
    cast,
    merge_config,
    opened,
    run_mergekit,
    said,
    write_model,
)
from tests.oracle import (
    GRANULARITIES,
    ORDER,
    assert_same_bits,
    assert_same_states,
    assert_unchanged,
    assert_within_bound,
    naive_coefficients,
    naive_lambdas,
    naive_sq_norm,
    naive_sq_norms,
    solved_coefficients,
)

F64, F32, F16, BF16 = ORDER

Models = dict[Hashable, State]
Lambdas = Callable[[str], torch.Tensor]

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def relatives(
    count: int = 3,
    dtype: torch.dtype = F64,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> Models:
    """A base and `count` fine-tunes."""
    names = ["base", *(f"tuned{k}" for k in range(count))]
    return dict(zip(names, families.relatives(count, dtype, shapes), strict=True))


def tuned_of(models: Models) -> list[State]:
    return [state for model, state in models.items() if model != "base"]


def merge(
    models: Models,
    *,
    base: Hashable | None = "base",
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **parameters: Any,
) -> State:
    """Merge, and check on the way that the inputs stay as they are."""
    options = {"base": base, "dtype": dtype, "out_dtype": out_dtype}
    with assert_unchanged([t for state in models.values() for t in state.values()]):
        return merge_state_dicts(models, "metagpt", parameters=parameters, **options)


def lambdas_of(models: Models, **settings: Any) -> Lambdas:
    """The oracle's lambda, by the name of a tensor."""
    base, states = models["base"], tuned_of(models)
    return lambda name: naive_lambdas(name, base, states, **settings)


def assert_merged(
    merged: State,
    models: Models,
    lambdas: Lambdas | None = None,
    *,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> None:
    """Check names, dtypes, the bound on every element, and in float64 lambda.

    `dtype` is what the tensors are cast to before they are summed.
    """
    lambdas = lambdas or lambdas_of(models, **settings)
    assert list(merged) == list(models["base"])
    for name, tensor in merged.items():
        work = dtype or models["base"][name].dtype
        assert tensor.dtype == work
        base, *states = (
            state[name].detach().to(work)
            for state in (models["base"], *tuned_of(models))
        )
        assert_within_bound(tensor, base, states, lambdas(name))
        if work == F64 and tensor.numel() >= len(states):
            given = [{name: state} for state in states]
            found = solved_coefficients(merged, {name: base}, given, [name])
            torch.testing.assert_close(found, lambdas(name), rtol=1e-9, atol=1e-12)


# --- pools ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("dtype", ORDER)
@every_granularity
def test_squared_norms_are_pooled_over_the_tensors_of_the_call(
    granularity: str, dtype: torch.dtype, count: int
) -> None:
    models = relatives(count, dtype)
    merged = merge(models, granularity=granularity)
    assert_merged(merged, models, granularity=granularity)


def test_one_call_with_some_tensors_is_a_model_of_these() -> None:
    part = relatives(shapes=dict(list(SHAPES.items())[:2]))
    assert_merged(merge(part), part)
    first = next(iter(SHAPES))
    assert not torch.allclose(lambdas_of(part)(first), lambdas_of(relatives())(first))


@every_granularity
@pytest.mark.parametrize("name", [None, "model.layers.3.mlp.weight", "odd name"])
@pytest.mark.parametrize("ids", [None, ["x", "y", "z"]])
def test_merge_tensors_is_a_pool_of_one(
    granularity: str, name: str | None, ids: list[str] | None
) -> None:
    models = relatives(2, shapes={"w": (5, 3)})
    base, first, second = (state["w"] for state in models.values())
    merged = merge_tensors(
        [first, base, second],
        "metagpt",
        base_index=1,
        ids=ids,
        name=name,
        parameters={"granularity": granularity},
    )
    assert_merged({"w": merged}, models)


@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0, 5.5])
def test_power_weight_and_lambda_enter_as_in_the_formula(power: float) -> None:
    models, weight = relatives(), [1.0, 0.5, 3.0]
    merged = merge(models, power=power, weight=weight, **{"lambda": 0.7})
    assert_merged(merged, models, power=power, weight=weight, scale=0.7)


@pytest.mark.parametrize(
    "weight",
    [
        [1.0, 2.0, 0.0],
        {"tuned2": 0.0, "tuned0": 1.0, "tuned1": 2.0},
        {"tuned0": 1, "tuned1": "2", "tuned2": 0, "base": 9.0},
    ],
)
def test_weight_by_order_or_by_id(weight: Any) -> None:
    models = relatives()
    assert_merged(merge(models, weight=weight), models, weight=[1.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("granularity", "exclude"),
    [("model", "embed_tokens, norm,"), ("model", ".,lm_head"), ("tensor", "scale")],
)
def test_excluded_tensors_are_merged_but_do_not_count(
    granularity: str, exclude: str
) -> None:
    models = relatives()
    merged = merge(models, granularity=granularity, exclude=exclude)
    # The oracle takes the average where `exclude` empties a pool.
    parts = [part.strip() for part in exclude.split(",") if part]
    assert_merged(merged, models, granularity=granularity, exclude=parts)


# --- parameters per group ------------------------------------------------------------


def with_counters(models: Models) -> Models:
    """Put an integer buffer before, between and after the weights."""
    return {
        model: {
            "first": torch.arange(3),
            **dict(list(state.items())[:2]),
            "steps": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            **dict(list(state.items())[2:]),
            "last": torch.tensor([1], dtype=torch.int8),
        }
        for model, state in models.items()
    }


def per_group(models: Models, values: Mapping[str, Any]) -> PerGroupValues[Any]:
    """Values by tensor name, as mergekit wants them: along all names, buffers too."""
    return PerGroupValues([values.get(name) for name in models["base"]])


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    ("parameter", "options", "oracles"),
    [
        (
            "weight",
            [[1.0, 1.0, 2.0], {"tuned0": 0, "tuned1": 1, "tuned2": 3}, 1.0],
            [[1.0, 1.0, 2.0], [0, 1, 3], [1, 1, 1]],
        ),
        ("power", [2.0, 0.0, -1.5], None),
        ("lambda", [1.0, 0.25, -2.0], None),
        ("granularity", ["model", "tensor", "layer"], None),
        ("exclude", ["layers.0", "embed", "mlp"], [["layers.0"], ["embed"], ["mlp"]]),
    ],
)
def test_parameters_may_differ_between_groups(
    parameter: str, options: list[Any], oracles: list[Any] | None, buffers: bool
) -> None:
    models = relatives()
    given = with_counters(models) if buffers else models
    values = {name: options[at % 3] for at, name in enumerate(SHAPES)}
    merged = merge(given, **{parameter: per_group(given, values)})
    assert list(merged) == list(given["base"])

    def lambdas(name: str) -> torch.Tensor:
        value = (oracles or options)[list(SHAPES).index(name) % 3]
        keyword = "scale" if parameter == "lambda" else parameter
        return lambdas_of(models, **{keyword: value})(name)

    assert_merged({name: merged[name] for name in SHAPES}, models, lambdas)


# --- modules, ties, shared storage ---------------------------------------------------


class Tied(torch.nn.Module):
    """A model whose head is its embedding, or has weights of its own."""

    def __init__(self, seed: int, *, tied: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.nn.Parameter:
            weight = torch.randn(shape, generator=generator, dtype=F64)
            return torch.nn.Parameter(weight)

        self.embed, self.body, own = drawn(9, 4), drawn(4, 4), drawn(9, 4)
        self.head = self.embed if tied else own
        self.register_buffer("steps", torch.tensor(3))


@pytest.mark.parametrize("as_states", [False, True])
@pytest.mark.parametrize(
    ("tied", "counted"),
    [
        ((True, True, True), [("embed", "body")] * 2),
        # A head of the model's or of the base's own counts beside the embedding.
        ((True, True, False), [("embed", "body"), ("embed", "body", "head")]),
        ((False, True, True), [("embed", "body", "head")] * 2),
    ],
)
def test_a_shared_parameter_counts_once(
    tied: Sequence[bool], counted: list[tuple[str, ...]], as_states: bool
) -> None:
    modules = [Tied(seed, tied=kind) for seed, kind in enumerate(tied)]
    base, *states = (dict(module.state_dict()) for module in modules)
    with torch.no_grad():
        merged = merge_state_dicts(
            [base, *states] if as_states else modules, "metagpt", base=0
        )
    assert list(merged) == ["embed", "body", "head", "steps"]
    assert_same_bits(merged.pop("steps"), torch.tensor(3))
    if all(tied):
        assert_same_bits(merged["embed"], merged["head"])
    norms = [
        sum(naive_sq_norm(base[name], state[name]) for name in names)
        for state, names in zip(states, counted, strict=True)
    ]
    found = solved_coefficients(merged, base, states)
    expected = naive_coefficients(torch.tensor(norms, dtype=F64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_modules_and_state_dicts_give_the_same_bits(dtype: torch.dtype) -> None:
    """Also where autograd records the merge of the modules."""
    modules = [Tied(seed).to(dtype) for seed in range(3)]
    states = [module.state_dict() for module in modules]
    recorded = merge_state_dicts(modules, "metagpt", base=0)
    plain = merge_state_dicts(states, "metagpt", base=0)
    assert recorded["embed"].requires_grad and not plain["embed"].requires_grad
    for name, tensor in plain.items():
        assert_same_bits(recorded[name].detach(), tensor)
    for base, *tuned in (modules, states):
        assert_same_bits(
            scan(base, tuned).sq_norms, scan(states[0], states[1:]).sq_norms
        )


@pytest.mark.parametrize("settings", [{}, {"power": 1.0, "exclude": "embed"}])
def test_the_coefficients_of_a_merge_can_be_had_as_a_value(
    settings: dict[str, Any],
) -> None:
    modules = [Tied(seed, tied=seed != 1) for seed in range(3)]
    base, *tuned = (module.state_dict() for module in modules)
    merged = merge_state_dicts([base, *tuned], "metagpt", base=0, parameters=settings)
    exclude = settings.get("exclude", "").split() or ()
    pooled = scan(base, tuned).pool("model", exclude)
    found = coefficients(pooled.sq_norms, power=settings.get("power", 2.0))
    for name in ("embed", "body", "head"):
        expected = scaled_sum(base[name], [state[name] for state in tuned], found)
        assert_same_bits(merged[name], expected)


def test_a_scan_of_state_dicts_is_one_of_their_files(tmp_path: Path) -> None:
    models = relatives(2, F32)
    files = [write_model(tmp_path / str(k), s) for k, s in enumerate(models.values())]
    states = list(models.values())
    on_disk = scan(files[0], files[1:], gram=True)
    at_hand = scan(states[0], states[1:], gram=True)
    assert at_hand.names == on_disk.names
    for kind in ("sq_norms", "base_sq_norms", "gram"):
        assert_same_bits(getattr(at_hand, kind), getattr(on_disk, kind))
    layers = at_hand.pool("layer"), on_disk.pool("layer")
    assert layers[0].keys == layers[1].keys
    some = {name: t for name, t in states[1].items() if "mlp" in name}
    partly = scan(states[0], [some, {**states[2], "steps": torch.tensor(3)}])
    rows = ["mlp" in name for name in partly.names]
    assert_same_bits(partly.sq_norms[rows], at_hand.sq_norms[rows])
    assert not partly.sq_norms[[not row for row in rows], 0].any()


def test_what_a_scan_in_memory_refuses(tmp_path: Path) -> None:
    base, tuned = relatives(1, F32).values()
    name = "model.layers.0.mlp.weight"
    with pytest.raises(TypeError, match="1 of 2 models are in memory"):
        scan(base, [tmp_path])
    for tensor, said_of_it in (
        (torch.zeros(5, 4), r"\[5, 4\] in model 0, in the base \[4, 4\]"),
        (torch.zeros(4, 4, dtype=torch.int8), "torch.int8; expected floating"),
        (torch.full((4, 4), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{said_of_it}"):
            scan(base, [{**tuned, name: tensor}])
    endless = {name: torch.full((4, 4), torch.inf)}
    assert scan(endless, [endless]).sq_norms.tolist() == [[0.0]]


def test_copies_count_twice() -> None:
    models = relatives(2, shapes={"embed": (9, 4), "body": (4, 4)})
    for state in models.values():
        state["head"] = state["embed"].clone()
    assert_merged(merge(models), models)


def test_the_same_model_twice_is_two_models() -> None:
    models = relatives(2, F32)
    models["again"] = models["tuned0"]
    assert_merged(merge(models), models)


def test_a_tied_head_looks_up_the_embeddings_pool() -> None:
    shapes = {"embed": (9, 4), "layers.0.head": (9, 4), "layers.0.body": (4, 4)}
    models = relatives(shapes=shapes)
    for state in models.values():
        state["layers.0.head"] = state["embed"]
    # A layer of one tensor that counts: each has a pool of its own, or the embedding's.
    merged = merge(models, granularity="layer")
    assert_merged(merged, models, granularity="tensor")


@pytest.mark.parametrize("exclude", ["", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_is_its_embedding_in_any_order(
    exclude: str, head_first: bool
) -> None:
    models: Models = {}
    for model, state in relatives().items():
        head = {"lm_head.weight": state["model.embed_tokens.weight"]}
        models[model] = {**head, **state, **head} if head_first else {**state, **head}
    # It counts once, by its embedding's name.
    not_counted = ["lm_head", *([exclude] if exclude == "embed_tokens" else [])]
    merged = merge(models, exclude=exclude)
    assert_merged(merged, models, exclude=not_counted)


def test_views_of_one_flat_buffer_are_weights_of_their_own() -> None:
    models = relatives()
    flat: Models = {}
    for model, state in models.items():
        buffer = torch.cat([tensor.flatten() for tensor in state.values()])
        parts = buffer.split([tensor.numel() for tensor in state.values()])
        pairs = zip(state.items(), parts, strict=True)
        flat[model] = {name: part.view(t.shape) for (name, t), part in pairs}
    assert_same_states(merge(flat), merge(models))


def test_temporary_tensors_do_not_pass_for_one_another() -> None:
    # Equal addresses at different times are no shared storage.
    class Fleeting(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return super().__getitem__(name).clone()

    models = relatives()
    fleeting = {model: Fleeting(state) for model, state in models.items()}
    merged = merge_state_dicts(fleeting, "metagpt", base="base")
    assert_same_states(merged, merge(models))


# --- groups called directly ----------------------------------------------------------


@every_granularity
def test_unnamed_groups(granularity: str) -> None:
    models = relatives()
    groups = [
        TensorGroup.from_tensors([state[n] for state in models.values()], base_index=0)
        for n in SHAPES
    ]
    parameters = {"granularity": granularity, "exclude": "None"}
    merged = merge_methods.get("metagpt")(groups, parameters=parameters)
    # Without names each tensor is a layer of its own.
    pool = "model" if granularity == "model" else "tensor"
    named = dict(zip(SHAPES, merged, strict=True))
    assert_merged(named, models, granularity=pool)


def group_of(name: str, base: int = 0, **states: State) -> TensorGroup:
    tensors = [state[name] for state in states.values()]
    return TensorGroup.from_tensors(
        tensors, ids=list(states), base_index=base, name=name
    )


def test_groups_may_have_different_models_and_bases() -> None:
    a, b, c, d = families.relatives(3, shapes={"x": (4,), "y": (5,)})
    groups = [group_of("x", a=a, b=b, c=c), group_of("y", 2, b=b, d=d, a=a)]
    first, second = merge_methods.get("metagpt")(groups)
    # b counts in both tensors, c and d in one each; the ratio is the group's own.
    n_b = naive_sq_norm(a["x"], b["x"]) + naive_sq_norm(a["y"], b["y"])
    for name, merged, other in (("x", first, c), ("y", second, d)):
        norms = [n_b, naive_sq_norm(a[name], other[name])]
        lambdas = naive_coefficients(torch.tensor(norms, dtype=F64))
        assert_within_bound(merged, a[name], [b[name], other[name]], lambdas)


def test_squared_norms_of_another_base_are_another_pool() -> None:
    a, b, c, d = families.relatives(3, shapes={"x": (4,), "y": (5,)})
    group = group_of("x", a=a, b=b, c=c)
    (alone,) = merge_methods.get("metagpt")([group])
    beside, _ = merge_methods.get("metagpt")([group, group_of("y", d=d, b=b, c=c)])
    assert_same_bits(beside, alone)


def test_no_groups_give_no_tensors() -> None:
    assert merge_methods.get("metagpt")([]) == ()


# --- tensors of no elements, buffers -------------------------------------------------


@every_granularity
def test_a_tensor_of_no_elements_keeps_its_shape(granularity: str) -> None:
    shapes = {"a": (0,), "b": (2, 0), "c": (3,)}
    merged = merge(relatives(shapes=shapes), granularity=granularity)
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == shapes
    del shapes["c"]
    empty = merge(relatives(shapes=shapes), granularity=granularity)
    assert not any(tensor.numel() for tensor in empty.values())


def test_a_model_of_buffers_only() -> None:
    models: Models = {model: {"steps": torch.tensor(5)} for model in ("base", "a")}
    assert merge(models) == {"steps": torch.tensor(5)}


@every_granularity
def test_an_integer_tensor_is_no_weight(granularity: str) -> None:
    counters = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    options = {"name": "counter", "parameters": {"granularity": granularity}}
    with pytest.raises(TypeError, match=r"counter of 0 .*int64"):
        merge_tensors(counters, "metagpt", base_index=0, **options)


# --- dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes",
    [*((base, F64, other) for base in ORDER for other in ORDER), (F16, F16, BF16)],
)
def test_mixed_precisions_are_measured_at_the_coarser_and_merged_at_the_finer(
    dtypes: tuple[torch.dtype, ...],
) -> None:
    pairs = zip(relatives(2).items(), dtypes, strict=True)
    models: Models = {model: cast(state, dtype) for (model, state), dtype in pairs}
    finer = functools.reduce(torch.promote_types, dtypes)
    assert_merged(merge(models), models, dtype=finer)


@pytest.mark.parametrize("dtype", [None, *ORDER])
@pytest.mark.parametrize("out_dtype", [None, *ORDER])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_dtype_casts_the_inputs_of_the_sum_and_out_dtype_its_result(
    dtype: torch.dtype | None, out_dtype: torch.dtype | None, granularity: str
) -> None:
    models, work = relatives(dtype=F32), dtype or F32
    merged = merge(models, dtype=dtype, out_dtype=out_dtype, granularity=granularity)
    uncast = merge(models, dtype=dtype, granularity=granularity)
    # n_t is a property of the tensors given, whatever the merge is done in.
    assert_merged(uncast, models, dtype=work, granularity=granularity)
    assert_same_states(merged, cast(uncast, out_dtype or work))


# --- NaN and infinity ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("owner", ["base", "tuned1"])
@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize(
    "parameters",
    [
        *({"granularity": granularity} for granularity in GRANULARITIES),
        *({"power": power} for power in (0.0, -1.0)),
        {"exclude": "layers.0"},
        {"weight": [1.0, 0.0, 1.0]},
    ],
)
def test_a_weight_that_is_not_finite_names_tensor_and_model(
    bad: float, owner: str, dtype: torch.dtype, parameters: dict[str, Any]
) -> None:
    models = relatives(dtype=dtype)
    models[owner]["model.layers.0.mlp.weight"][1, 2] = bad
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.weight of {owner} .*NaN"):
        merge(models, **parameters)


def test_a_weight_that_is_not_finite_in_an_unnamed_tensor() -> None:
    tensors = [torch.ones(2), torch.tensor([1.0, float("nan")])]
    with pytest.raises(ValueError, match=r"a tensor of 1 .*NaN"):
        merge_tensors(tensors, "metagpt", base_index=0)


def test_differences_whose_square_exceeds_float64_are_named() -> None:
    models = relatives()
    models["tuned1"]["lm_head.weight"] *= 1e200
    with pytest.raises(ValueError, match=r"lm_head\.weight .*float64"):
        merge(models)


# --- degenerate inputs ---------------------------------------------------------------


@pytest.mark.parametrize("power", [2.0, 1.0, -1.0])
@every_granularity
def test_models_that_equal_the_base_keep_it_and_say_so_once(
    power: float, granularity: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = relatives(0, BF16)["base"]
    copies = {n: t.clone() for n, t in base.items()}
    models: Models = {"base": base, "a": copies, "b": base}
    assert_same_states(merge(models, power=power, granularity=granularity), base)
    assert len(said(caplog, "no model differs from the base")) == 1


@pytest.mark.parametrize(("power", "share"), [(2.0, 0.0), (0.0, 1 / 3), (-2.0, 0.0)])
def test_an_untouched_model_counts_by_the_sign_of_power(
    power: float, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    models = relatives(2)
    base, *states = models.values()
    rest = naive_coefficients(naive_sq_norms(base, states), power=power) * (1 - share)
    models["same"] = {n: t.clone() for n, t in base.items()}
    merged = merge(models, power=power)
    found = solved_coefficients(merged, base, states)
    torch.testing.assert_close(found, rest, rtol=1e-9, atol=0)
    assert len(said(caplog, "left out")) == (power < 0)


def test_a_model_that_takes_nearly_all_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = relatives(2)
    for name, tensor in models["tuned1"].items():
        tensor += 100 * (tensor - models["base"][name])
    for _ in range(2):
        caplog.clear()
        merge(models, granularity="tensor")
        assert len(said(caplog, " and takes 100")) == 1
    caplog.clear()
    merge(models, power=0.0)
    assert not said(caplog, "")


def test_a_merge_in_memory_is_silent_but_for_warnings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    merge(relatives())
    assert not said(caplog, "")
    caplog.set_level(logging.INFO, logger="mergekit_metagpt")
    merge(relatives())
    (table,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert "tuned2" in table


def test_the_base_alone_is_returned(family: Family) -> None:
    tensor = torch.ones(3)
    assert_same_bits(merge_tensors([tensor], "metagpt", base_index=0), tensor)
    state = relatives(0)["base"]
    for base in ("base", *references(family)[:1]):
        merged = afresh(lambda base=base: merge({base: state}, base=base))
        assert_same_states(merged, state)
    merged = merge({"base": state}, out_dtype=BF16)
    assert_same_states(merged, cast(state, BF16))


# --- errors --------------------------------------------------------------------------


def test_a_merge_without_a_base_says_what_to_add() -> None:
    with pytest.raises(ValueError, match="base_model"):
        merge(relatives(), base=None)
    with pytest.raises(ValueError, match="base_model"):
        merge_tensors([torch.ones(2), torch.ones(2)], "metagpt")


@pytest.mark.parametrize(
    ("parameter", "value", "legal"),
    [
        ("granularity", None, "'model', 'layer' or 'tensor'"),
        ("weight", [1.0, 1.0, -1.0], ">= 0"),
        ("lambda", None, "finite"),
        ("exclude", PerGroupValues([""] * 5 + [["lm_head"]]), "comma-separated"),
    ],
)
def test_bad_parameters_that_no_file_can_hold(
    parameter: str, value: Any, legal: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter} is .*{legal}"):
        merge(relatives(), **{parameter: value})


@pytest.mark.parametrize("weight", [0.0, [0, 0.0, 0], PerGroupValues([0.0] * 6)])
@every_granularity
def test_no_weight_at_all_is_an_error(weight: Any, granularity: str) -> None:
    with pytest.raises(ValueError, match="weight is 0 for every model"):
        merge(relatives(), weight=weight, granularity=granularity)


# --- gradients -----------------------------------------------------------------------


SMALL = {"layers.0.w": (2, 2), "layers.0.b": (), "layers.1.w": (3,)}


@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
@every_granularity
@pytest.mark.parametrize("owners", [["base", "tuned0", "tuned1"], ["base"], ["tuned1"]])
def test_gradients_reach_every_input_also_through_lambda(
    power: float, granularity: str, owners: list[str]
) -> None:
    models = relatives(2, shapes=SMALL)
    places = [(owner, name) for owner in owners for name in SMALL]
    parameters = {"power": power, "granularity": granularity, "lambda": 0.8}
    parameters["weight"] = [1.0, 0.5]

    def merged(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = {model: dict(state) for model, state in models.items()}
        for (owner, name), value in zip(places, values, strict=True):
            states[owner][name] = value
        result = merge_state_dicts(
            states, "metagpt", base="base", parameters=parameters
        )
        return tuple(result.values())

    inputs = [models[owner][name].requires_grad_() for owner, name in places]
    assert torch.autograd.gradcheck(merged, inputs)


def test_gradients_with_an_untouched_model_and_shared_storage() -> None:
    base, model = families.relatives(1, shapes={"w": (2, 2)})
    inputs = [base["w"].requires_grad_(), model["w"].requires_grad_()]

    def merged(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        tensors = (first, second, inputs[0].detach())
        states = [{"w": tensor, "head": tensor} for tensor in tensors]
        return merge_state_dicts(states, "metagpt", base=0)["head"]

    assert torch.autograd.gradcheck(merged, inputs)


def test_tensors_on_a_device_are_merged_there(device: torch.device) -> None:
    models = relatives(dtype=F32)
    placed = {
        model: {name: tensor.to(device) for name, tensor in state.items()}
        for model, state in models.items()
    }
    merged = merge(placed)
    there = placed["base"]["lm_head.weight"].device
    assert {tensor.device for tensor in merged.values()} == {there}
    assert_merged({n: t.cpu() for n, t in merged.items()}, models)


# --- ids -----------------------------------------------------------------------------


class Key:
    """Any hashable thing."""


@pytest.mark.parametrize(
    "ids",
    [
        [0, 1, 2, 3],
        [("a", 1), ("a", 2), frozenset(), 2.5],
        ["./no/such/base", "/nor/this", "http://x", ""],
        [Key(), Key(), Key(), Key()],
        [False, True, "x", b"y"],
        [ModelReference.parse(f"./no/such/{name}") for name in "abcd"],
        [ModelReference.parse("./no/such/a"), "mixed", 7, Key()],
    ],
    ids=["numbers", "tuples", "strings", "objects", "falsy", "references", "mixed"],
)
@every_granularity
def test_ids_that_stand_for_no_checkpoint(
    ids: list[Hashable], granularity: str
) -> None:
    assert_merged_as_in_memory(ids, granularity=granularity)


def in_memory_under(ids: Iterable[Hashable]) -> Models:
    """Tensors that no file holds, under the given ids."""
    return dict(zip(ids, relatives().values(), strict=False))


def assert_merged_as_in_memory(ids: Sequence[Hashable], **parameters: Any) -> None:
    """Check that tensors are merged as under plain names."""
    merged = merge(in_memory_under(ids), base=ids[0], **parameters)
    plain = merge(relatives(len(ids) - 1), **parameters)
    assert_same_states(merged, plain)


def references(family: Family, folder: Path | None = None) -> list[ModelReference]:
    return opened(*family.paths)


def replaced(family: Family, folder: Path) -> list[ModelReference]:
    """Open files, one of which is then replaced, and one removed."""
    folders = [
        shutil.copytree(path, folder / str(number))
        for number, path in enumerate(family.paths)
    ]
    ids = opened(*folders)
    merge_methods.get("metagpt").validate_inputs(ids, ids[0])
    write_model(folders[1], {"w": torch.ones(3)})
    shutil.rmtree(folders[2])
    return ids


def unfit(family: Family, folder: Path) -> list[ModelReference]:
    """Open files of another model, and of a quantised one."""
    stranger = write_model(folder / "stranger", {"w": torch.ones(3)})
    codes = {"model.norm.weight": torch.ones(3, dtype=torch.int8)}
    quantised = write_model(folder / "quantised", codes)
    return opened(family.base, stranger, quantised)


@every_granularity
@pytest.mark.parametrize("files", [references, replaced, unfit])
def test_memory_wins_over_open_files(
    files: Callable[[Family, Path], list[ModelReference]],
    granularity: str,
    family: Family,
    tmp_path: Path,
) -> None:
    assert_merged_as_in_memory(files(family, tmp_path), granularity=granularity)


def test_memory_wins_over_files_with_the_same_names(family: Family) -> None:
    ids = references(family)
    changed = [
        {n: (t.double() * (k + 1) + 0.01 * k).to(BF16) for n, t in state.items()}
        for k, state in enumerate(family.all_states)
    ]
    expected = merge_state_dicts(changed, "metagpt", base=0)
    merged = merge(dict(zip(ids, changed, strict=True)), base=ids[0])
    assert_same_states(merged, expected)


def test_one_tensor_under_references_of_open_files(family: Family) -> None:
    models = relatives(shapes={"w": (5, 3)})
    tensors = [state["w"] for state in models.values()]
    for name in (None, "model.norm.weight", "x.slices[0]"):
        ids = references(family)
        merged = merge_tensors(tensors, "metagpt", ids=ids, base_index=0, name=name)
        assert_merged({"w": merged}, models)


def afresh(work: Callable[[], Any]) -> Any:
    """Run in a new thread: what a method remembers of its thread's plans is empty."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("as_references", [False, True])
def test_all_weights_zero_on_one_tensor_keep_the_base_there(
    family: Family, as_references: bool
) -> None:
    models, kept = relatives(), "model.layers.0.norm.weight"
    values = {name: float(name != kept) for name in SHAPES}
    weight = per_group(models, values)
    given = in_memory_under(references(family)) if as_references else models
    merged = afresh(lambda: merge(given, base=next(iter(given)), weight=weight))
    scale = {name: 0.0 if name == kept else 1.0 for name in SHAPES}
    assert_same_bits(merged[kept], models["base"][kept])
    assert_merged(merged, models, lambda name: scale[name] * lambdas_of(models)(name))


def buffers_only(ids: Sequence[ModelReference]) -> None:
    """Merge, in memory and under references, a model without any weight."""
    buffers = {reference: {"steps": torch.tensor(3)} for reference in ids}
    merge_state_dicts(buffers, "metagpt", base=ids[0])


def test_merges_in_memory_leave_merges_from_files_alone(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config(family.base, family.models)

    def merges() -> tuple[State, State]:
        expected = run_mergekit(config, tmp_path / "before")
        ids = references(family)
        models = in_memory_under(ids)
        merge(models, base=ids[0], weight=[1.0, 0.0, 0.0])
        with pytest.raises(ValueError, match="weight is 0 for every model"):
            merge(models, base=ids[0], weight=0.0)
        buffers_only(ids)
        caplog.clear()
        return expected, run_mergekit(config, tmp_path / "after")

    assert_same_states(*afresh(merges))
    assert len(said(caplog, "of the whole model")) == 1


@pytest.mark.parametrize("what", ["only the base", "weight is 0 for every model"])
def test_a_merge_in_memory_does_not_hide_what_is_wrong_with_the_next(
    what: str, family: Family, tmp_path: Path
) -> None:
    config = merge_config(family.base, [family.base])
    if what != "only the base":
        config = merge_config(family.base, family.models, parameters={"weight": 0.0})

    def merges() -> None:
        ids = references(family)
        if what != "only the base":
            merge(in_memory_under(ids), base=ids[0], weight=3.0)
        buffers_only(ids)
        run_mergekit(config, tmp_path / "out")

    with pytest.raises(ValueError, match=what):
        afresh(merges)


def test_input_groups_are_not_kept_alive() -> None:
    models = relatives(2)
    merged = merge(models)
    tensors = (t for state in models.values() for t in state.values())
    watched = [weakref.ref(tensor) for tensor in tensors]
    del models
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]
    assert merged
