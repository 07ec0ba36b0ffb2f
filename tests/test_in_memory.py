"""Tensors in memory: pools of one call, ties, gradients, dtypes, ids of files."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import PerGroupValues, TensorEntry, TensorGroup
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors

from tests.conftest import Family
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
    ORDER,
    assert_same_bits,
    assert_unchanged,
    assert_within_bound,
    naive_coefficients,
    naive_sq_norm,
    naive_sq_norms,
    solved_coefficients,
)

F64, F32, F16, BF16 = ORDER

Models = dict[Hashable, State]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.weight": (4, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.weight": (4, 4),
    "model.layers.1.scale": (),
    "lm_head.weight": (9, 4),
}
LAYERS = {
    name: name if "layers" not in name else name[: len("model.layers.0")]
    for name in SHAPES
}


def random_state(
    seed: int,
    dtype: torch.dtype = F64,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        for name, shape in shapes.items()
    }


def relatives(
    count: int = 3,
    dtype: torch.dtype = F64,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> Models:
    """A base and `count` fine-tunes, each layer of each at its own distance."""
    base = random_state(0, shapes=shapes)
    models: Models = {"base": {name: t.to(dtype) for name, t in base.items()}}
    for k in range(count):
        noise = random_state(k + 1, shapes=shapes)
        models[f"tuned{k}"] = {
            name: (base[name] + (0.1 + 0.1 * ((k + at) % 3)) * noise[name]).to(dtype)
            for at, name in enumerate(shapes)
        }
    return models


def tuned_of(models: Models, base: Hashable = "base") -> list[State]:
    return [state for model, state in models.items() if model != base]


def merge(models: Models, **options: Any) -> State:
    """Merge, and check on the way that the inputs stay as they are."""
    parameters = {k: v for k, v in options.items() if k not in OPTIONS}
    rest = {k: v for k, v in options.items() if k in OPTIONS}
    with assert_unchanged([t for state in models.values() for t in state.values()]):
        return merge_state_dicts(
            models, "metagpt", parameters=parameters, **{"base": "base", **rest}
        )


OPTIONS = {"base", "dtype", "out_dtype", "strict", "batch_options"}


def pooled(
    models: Models, names: Sequence[str] | None = None, **formula: Any
) -> torch.Tensor:
    """The oracle's lambda over some of the tensors, or all."""
    chosen = list(models["base"]) if names is None else names
    base = {name: models["base"][name] for name in chosen}
    return naive_coefficients(naive_sq_norms(base, tuned_of(models)), **formula)


def assert_merged(
    merged: State,
    models: Models,
    lambdas: Callable[[str], torch.Tensor],
) -> None:
    """Check names, dtypes, the bound on every element, and in float64 lambda."""
    base, tuned = models["base"], tuned_of(models)
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype
        assert_within_bound(
            tensor, base[name], [model[name] for model in tuned], lambdas(name)
        )
        if tensor.dtype == F64 and tensor.numel() >= len(tuned):
            found = solved_coefficients(merged, base, tuned, [name])
            torch.testing.assert_close(found, lambdas(name), rtol=1e-9, atol=1e-12)


# --- pools ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("dtype", ORDER)
def test_squared_norms_are_pooled_over_the_tensors_of_the_call(
    dtype: torch.dtype, count: int
) -> None:
    models = relatives(count, dtype)
    lambdas = pooled(models)
    assert_merged(merge(models), models, lambda name: lambdas)


def test_a_sequence_of_models_is_numbered() -> None:
    models = relatives()
    merged = merge_state_dicts(list(models.values()), "metagpt", base=0)
    for name, tensor in merge(models).items():
        assert_same_bits(merged[name], tensor)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_the_base_may_stand_anywhere(at: int) -> None:
    models = relatives()
    order = list(models)[1:]
    order.insert(at, "base")
    moved = {model: models[model] for model in order}
    expected = merge(models)
    for name, tensor in merge(moved).items():
        assert_same_bits(tensor, expected[name])


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_smaller_pools(granularity: str, dtype: torch.dtype) -> None:
    models = relatives(dtype=dtype)

    def lambdas(name: str) -> torch.Tensor:
        if granularity == "tensor":
            return pooled(models, [name])
        return pooled(models, [n for n in SHAPES if LAYERS[n] == LAYERS[name]])

    assert_merged(merge(models, granularity=granularity), models, lambdas)


def test_one_call_with_some_tensors_is_a_model_of_these() -> None:
    models = relatives()
    part = {
        model: {name: state[name] for name in list(SHAPES)[:2]}
        for model, state in models.items()
    }
    lambdas = pooled(part)
    assert not torch.allclose(lambdas, pooled(models))
    assert_merged(merge(part), part, lambda name: lambdas)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("name", [None, "model.layers.3.mlp.weight", "odd name"])
@pytest.mark.parametrize("ids", [None, ["x", "y", "z"]])
def test_merge_tensors_is_a_pool_of_one(
    granularity: str, name: str | None, ids: list[str] | None
) -> None:
    models = relatives(2, shapes={"w": (5, 3)})
    tensors = [state["w"] for state in models.values()]
    tensors = [tensors[1], tensors[0], tensors[2]]
    merged = merge_tensors(
        tensors,
        "metagpt",
        base_index=1,
        ids=ids,
        name=name,
        parameters={"granularity": granularity},
    )
    assert_merged({"w": merged}, models, lambda name: pooled(models))


def test_power_weight_and_lambda_enter_as_in_the_formula() -> None:
    models = relatives()
    for power in (2.0, 1.0, 0.0, -1.0, 5.5):
        lambdas = pooled(models, weight=[1.0, 0.5, 3.0], power=power, scale=0.7)
        merged = merge(models, power=power, weight=[1.0, 0.5, 3.0], **{"lambda": 0.7})
        assert_merged(merged, models, lambda name, values=lambdas: values)


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
    lambdas = pooled(models, weight=[1.0, 2.0, 0.0])
    assert_merged(merge(models, weight=weight), models, lambda name: lambdas)


def test_a_weight_for_all_changes_nothing() -> None:
    models = relatives()
    expected = merge(models)
    for name, tensor in merge(models, weight=7.0).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-14, atol=0)


def test_excluded_tensors_are_merged_but_do_not_count() -> None:
    models = relatives()
    counted = [name for name in SHAPES if "embed" not in name and "norm" not in name]
    lambdas = pooled(models, counted)
    merged = merge(models, exclude="embed_tokens, norm,")
    assert_merged(merged, models, lambda name: lambdas)


def test_where_exclude_leaves_nothing_the_average_is_taken() -> None:
    models = relatives()
    average = naive_coefficients(torch.ones(3, dtype=F64))
    merged = merge(models, exclude=".,lm_head")
    assert_merged(merged, models, lambda name: average)

    def lambdas(name: str) -> torch.Tensor:
        return average if "scale" in name else pooled(models, [name])

    merged = merge(models, exclude="scale", granularity="tensor")
    assert_merged(merged, models, lambdas)


# --- parameters per group ------------------------------------------------------------


def with_counters(models: Models) -> Models:
    """Put an integer buffer before, between and after the weights."""
    counters = {"steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    return {
        model: {
            "first": torch.arange(3),
            **dict(list(state.items())[:2]),
            **{name: tensor.clone() for name, tensor in counters.items()},
            **dict(list(state.items())[2:]),
            "last": torch.tensor([1], dtype=torch.int8),
        }
        for model, state in models.items()
    }


def per_group(models: Models, values: Mapping[str, Any]) -> PerGroupValues[Any]:
    """Values by tensor name, as mergekit wants them: along all names, buffers too."""
    return PerGroupValues([values.get(name) for name in models["base"]])


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("parameter", ["weight", "power", "lambda", "granularity"])
def test_parameters_may_differ_between_groups(parameter: str, buffers: bool) -> None:
    models = relatives()
    options = {
        "weight": [[1.0, 1.0, 2.0], {"tuned0": 0, "tuned1": 1, "tuned2": 3}, 1.0],
        "power": [2.0, 0.0, -1.5],
        "lambda": [1.0, 0.25, -2.0],
        "granularity": ["model", "tensor", "layer"],
    }[parameter]
    values = {name: options[at % 3] for at, name in enumerate(SHAPES)}

    def lambdas(name: str) -> torch.Tensor:
        if parameter == "granularity":
            pool = {
                "model": list(SHAPES),
                "tensor": [name],
                "layer": [n for n in SHAPES if LAYERS[n] == LAYERS[name]],
            }[values[name]]
            return pooled(models, pool)
        chosen = values[name]
        if parameter == "weight":
            if isinstance(chosen, dict):
                chosen = list(chosen.values())
            elif not isinstance(chosen, list):
                chosen = [chosen] * 3
        keyword = "scale" if parameter == "lambda" else parameter
        return pooled(models, **{keyword: chosen})

    given = with_counters(models) if buffers else models
    merged = merge(given, **{parameter: per_group(given, values)})
    assert list(merged) == list(given["base"])
    assert_merged({name: merged[name] for name in SHAPES}, models, lambdas)


def test_exclude_may_differ_between_groups() -> None:
    models = relatives()
    values = {name: "layers.0" if "1" in name else "embed" for name in SHAPES}
    merged = merge(models, exclude=per_group(models, values))

    def lambdas(name: str) -> torch.Tensor:
        return pooled(models, [n for n in SHAPES if values[name] not in n])

    assert_merged(merged, models, lambdas)


def test_all_weights_zero_on_one_tensor_keep_the_base_there() -> None:
    models = relatives()
    values = {name: 0.0 if "norm" in name else 1.0 for name in SHAPES}
    merged = merge(models, weight=per_group(models, values))
    kept = "model.layers.0.norm.weight"
    assert_same_bits(merged.pop(kept), models["base"][kept])
    lambdas = pooled(models)
    rest = {
        model: {name: t for name, t in state.items() if name != kept}
        for model, state in models.items()
    }
    assert_merged(merged, rest, lambda name: lambdas)


def test_too_few_group_values_are_refused() -> None:
    with pytest.raises(ValueError, match="power expects 6 group values"):
        merge(relatives(), power=PerGroupValues([2.0]))


# --- modules, ties, shared storage ---------------------------------------------------


class Tied(torch.nn.Module):
    """A model whose head is its embedding, or has weights of its own."""

    def __init__(self, seed: int, *, tied: bool = True) -> None:
        super().__init__()
        state = random_state(seed, shapes={"embed": (9, 4), "body": (4, 4)})
        self.embed = torch.nn.Parameter(state["embed"])
        self.body = torch.nn.Parameter(state["body"])
        self.head = self.embed
        if not tied:
            self.head = torch.nn.Parameter(random_state(seed + 100)["lm_head.weight"])
        self.register_buffer("steps", torch.tensor(3))


def norm_of(base: torch.nn.Module, model: torch.nn.Module, *names: str) -> float:
    first, second = base.state_dict(), model.state_dict()
    return sum(naive_sq_norm(first[name], second[name]) for name in names)


def assert_lambdas(
    models: Sequence[torch.nn.Module | State],
    expected: Sequence[float],
    **parameters: Any,
) -> None:
    """Compare what a merge of these used with the shares of the given norms."""
    with torch.no_grad():
        merged = merge_state_dicts(models, "metagpt", base=0, parameters=parameters)
    states = [m.state_dict() if isinstance(m, torch.nn.Module) else m for m in models]
    names = [name for name, tensor in merged.items() if tensor.is_floating_point()]
    found = solved_coefficients(
        {name: merged[name] for name in names}, states[0], states[1:], names
    )
    wanted = torch.tensor(expected, dtype=F64)
    torch.testing.assert_close(found, wanted / wanted.sum(), rtol=1e-9, atol=0)


def test_modules_are_merged_and_a_shared_parameter_counts_once() -> None:
    models = [Tied(seed) for seed in range(3)]
    norms = [norm_of(models[0], model, "embed", "body") for model in models[1:]]
    assert_lambdas(models, norms)
    merged = merge_state_dicts(models, "metagpt", base=0)
    assert list(merged) == ["embed", "body", "head", "steps"]
    assert_same_bits(merged["embed"], merged["head"])
    assert_same_bits(merged["steps"], torch.tensor(3))


def test_shared_tensors_of_state_dicts_count_once_and_copies_twice() -> None:
    models = [dict(Tied(seed).state_dict()) for seed in range(3)]

    def norms(*names: str) -> list[float]:
        return [
            sum(naive_sq_norm(models[0][name], model[name]) for name in names)
            for model in models[1:]
        ]

    assert_lambdas(models, norms("embed", "body"))
    for model in models:
        model["head"] = model["embed"].clone()
    assert_lambdas(models, norms("embed", "body", "head"))


def test_a_head_of_its_own_in_the_model_only_is_measured_against_the_embedding() -> (
    None
):
    models = [Tied(0), Tied(1), Tied(2, tied=False)]
    assert_lambdas(
        models,
        [
            norm_of(models[0], models[1], "embed", "body"),
            norm_of(models[0], models[2], "embed", "body", "head"),
        ],
    )


def test_a_head_of_its_own_in_the_base_only_counts_beside_the_embedding() -> None:
    models = [Tied(0, tied=False), Tied(1), Tied(2)]
    assert_lambdas(
        models,
        [norm_of(models[0], model, "embed", "body", "head") for model in models[1:]],
    )


def test_the_same_model_twice_is_two_models() -> None:
    base, model, other = (random_state(seed) for seed in range(3))
    merged = merge_state_dicts([base, model, model, other], "metagpt", base=0)
    models: Models = {"base": base, "a": model, "b": dict(model), "c": other}
    lambdas = pooled(models)
    for name in SHAPES:
        states = [state[name] for state in tuned_of(models)]
        assert_within_bound(merged[name], base[name], states, lambdas)


def test_a_tied_head_looks_up_the_embeddings_pool() -> None:
    shapes = {"embed": (9, 4), "layers.0.head": (9, 4), "layers.0.body": (4, 4)}
    models = relatives(shapes=shapes)
    for state in models.values():
        state["layers.0.head"] = state["embed"]
    merged = merge(models, granularity="layer")

    def lambdas(name: str) -> torch.Tensor:
        return pooled(models, ["layers.0.body" if "body" in name else "embed"])

    assert_merged(merged, models, lambdas)


@pytest.mark.parametrize("exclude", ["", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_is_its_embedding_in_any_order_as_it_is_in_files(
    exclude: str, head_first: bool, tmp_path: Path
) -> None:
    config = llama_config(tie_word_embeddings=True)
    stored = cast(llama_state(tie_word_embeddings=True), F64)
    states = [stored, tuned(stored, 1, 0.1), tuned(stored, 2, 0.2)]
    base, *others = (
        write_model(tmp_path / str(k), state, config) for k, state in enumerate(states)
    )
    parameters = {"exclude": exclude}
    files = run_mergekit(
        merge_config(base, others, parameters=parameters), tmp_path / "out"
    )
    tied = []
    for state in states:
        head = {"lm_head.weight": state["model.embed_tokens.weight"]}
        tied.append({**head, **state} if head_first else {**state, **head})
    merged = merge_state_dicts(tied, "metagpt", base=0, parameters=parameters)
    found = [
        solved_coefficients(m, stored, states[1:], stored) for m in (files, merged)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_views_of_one_flat_buffer_are_weights_of_their_own() -> None:
    models = relatives()
    flat: Models = {}
    for model, state in models.items():
        buffer = torch.cat([tensor.flatten() for tensor in state.values()])
        flat[model], at = {}, 0
        for name, tensor in state.items():
            flat[model][name] = buffer[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
    expected = merge(models)
    for name, tensor in merge(flat).items():
        assert_same_bits(tensor, expected[name])


def test_temporary_tensors_do_not_pass_for_one_another() -> None:
    # Equal addresses at different times are no shared storage.
    class Fleeting(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return super().__getitem__(name).clone()

    models = relatives()
    merged = merge_state_dicts(
        {model: Fleeting(state) for model, state in models.items()},
        "metagpt",
        base="base",
    )
    for name, tensor in merge(models).items():
        assert_same_bits(merged[name], tensor)


# --- groups called directly ----------------------------------------------------------


def unnamed(models: Models) -> tuple[TensorGroup, ...]:
    return tuple(
        TensorGroup.from_tensors(
            [state[name] for state in models.values()], ids=list(models), base_index=0
        )
        for name in models["base"]
    )


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_unnamed_groups(granularity: str) -> None:
    models = relatives()
    merged = merge_methods.get("metagpt")(
        unnamed(models), parameters={"granularity": granularity, "exclude": "None"}
    )

    def lambdas(name: str) -> torch.Tensor:
        return pooled(models, None if granularity == "model" else [name])

    assert_merged(dict(zip(SHAPES, merged, strict=True)), models, lambdas)


def test_groups_may_have_different_models_and_bases() -> None:
    a, b, c, d = (random_state(k, shapes={"x": (4,), "y": (5,)}) for k in range(4))

    def group(name: str, base: int, **states: State) -> TensorGroup:
        return TensorGroup.from_tensors(
            [state[name] for state in states.values()],
            ids=list(states),
            base_index=base,
            name=name,
        )

    groups = [group("x", 0, a=a, b=b, c=c), group("y", 2, b=b, d=d, a=a)]
    first, second = merge_methods.get("metagpt")(groups)
    # b counts in both tensors, c and d in one each; the ratio is the group's own.
    n_b = naive_sq_norm(a["x"], b["x"]) + naive_sq_norm(a["y"], b["y"])
    n_c, n_d = naive_sq_norm(a["x"], c["x"]), naive_sq_norm(a["y"], d["y"])
    lambdas = torch.tensor([n_b, n_c], dtype=F64) / (n_b + n_c)
    assert_within_bound(first, a["x"], [b["x"], c["x"]], lambdas)
    lambdas = torch.tensor([n_b, n_d], dtype=F64) / (n_b + n_d)
    assert_within_bound(second, a["y"], [b["y"], d["y"]], lambdas)


def test_squared_norms_of_another_base_are_another_pool() -> None:
    a, b, c = (random_state(k, shapes={"x": (4,), "y": (5,)}) for k in range(3))

    def group(name: str, base: State, **others: State) -> TensorGroup:
        states = {"base" + str(id(base)): base, **others}
        return TensorGroup.from_tensors(
            [s[name] for s in states.values()],
            ids=list(states),
            base_index=0,
            name=name,
        )

    d = random_state(3, shapes={"x": (4,), "y": (5,)})
    (alone,) = merge_methods.get("metagpt")([group("x", a, b=b, c=c)])
    beside, _ = merge_methods.get("metagpt")(
        [group("x", a, b=b, c=c), group("y", d, b=b, c=c)]
    )
    # n_t is a property of a pair (base, model): the second base is another pair.
    assert_same_bits(beside, alone)


def test_no_groups_give_no_tensors() -> None:
    assert merge_methods.get("metagpt")([]) == ()


# --- layouts, shapes -----------------------------------------------------------------


def test_strided_scalar_and_empty_tensors() -> None:
    shapes = {
        "transposed": (6, 5),
        "expanded": (3, 5),
        "strided": (4, 3),
        "scalar": (),
        "empty": (0, 7),
        "one": (1, 1),
    }
    models = relatives(shapes=shapes)
    laid: Models = {
        model: {
            "transposed": state["transposed"].T.contiguous().T,
            "expanded": state["expanded"][:1].expand(3, 5),
            "strided": torch.cat([state["strided"]] * 2, 1)[:, ::2],
            "scalar": state["scalar"],
            "empty": state["empty"],
            "one": state["one"],
        }
        for model, state in models.items()
    }
    assert not laid["base"]["transposed"].is_contiguous()
    lambdas = pooled(laid)
    merged = merge(laid)
    assert_merged(merged, laid, lambda name: lambdas)
    for name, tensor in merged.items():
        assert tensor.shape == laid["base"][name].shape
    for granularity in ("layer", "tensor"):
        alone = merge(laid, granularity=granularity)
        assert_merged(alone, laid, lambda name: pooled(laid, [name]))


def test_a_tensor_of_no_elements_keeps_its_shape_under_every_granularity(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = relatives(shapes={"a": (0,), "b": (2, 0), "c": (3,)})
    for granularity in ("model", "layer", "tensor"):
        merged = merge(models, granularity=granularity)
        assert merged["a"].shape == (0,)
        assert merged["b"].shape == (2, 0)
    empty = relatives(shapes={"a": (0,), "b": (2, 0)})
    for tensor in merge(empty).values():
        assert not tensor.numel()


def test_results_do_not_share_memory_with_inputs() -> None:
    models = relatives()
    merged = merge(models)
    inputs = [tensor for state in models.values() for tensor in state.values()]
    with assert_unchanged(inputs):
        for tensor in merged.values():
            tensor.fill_(3.0)


# --- buffers -------------------------------------------------------------------------


def test_integer_buffers_are_copied_not_merged() -> None:
    models = with_counters(relatives())
    merged = merge(models, dtype=BF16, out_dtype=F32)
    for name, tensor in models["base"].items():
        if tensor.is_floating_point():
            assert merged[name].dtype == F32
        else:
            assert_same_bits(merged[name], tensor)
            assert merged[name].data_ptr() != tensor.data_ptr()


def test_a_model_of_buffers_only() -> None:
    models: Models = {model: {"steps": torch.tensor(5)} for model in ("base", "a")}
    assert merge(models) == {"steps": torch.tensor(5)}


def test_buffers_that_differ_are_refused_as_everywhere_in_mergekit() -> None:
    models = with_counters(relatives())
    models["tuned1"]["steps"] += 1
    with pytest.raises(ValueError, match="Non-floating buffer 'steps' differs"):
        merge(models)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_an_integer_tensor_is_no_weight(granularity: str) -> None:
    tensors = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    with pytest.raises(TypeError, match=r"counter of 0 is torch\.int64"):
        merge_tensors(
            tensors,
            "metagpt",
            base_index=0,
            name="counter",
            parameters={"granularity": granularity},
        )


# --- dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ORDER)
@pytest.mark.parametrize("elsewhere", ORDER)
def test_mixed_precisions_are_measured_at_the_coarser_and_merged_at_the_finer(
    stored: torch.dtype, elsewhere: torch.dtype
) -> None:
    models = relatives(2)
    models["base"] = {n: t.to(stored) for n, t in models["base"].items()}
    models["tuned1"] = {n: t.to(elsewhere) for n, t in models["tuned1"].items()}
    lambdas = pooled(models)
    merged = merge(models)
    for name, tensor in merged.items():
        assert tensor.dtype == F64
        states = [state[name] for state in tuned_of(models)]
        assert_within_bound(tensor, models["base"][name].double(), states, lambdas)
    found = solved_coefficients(merged, models["base"], tuned_of(models))
    torch.testing.assert_close(found, lambdas, rtol=1e-9, atol=0)


def test_two_half_precisions_merge_in_float32() -> None:
    models = relatives(2, F16)
    models["tuned1"] = {n: t.to(BF16) for n, t in models["tuned1"].items()}
    lambdas = pooled(models)
    for name, tensor in merge(models).items():
        assert tensor.dtype == F32
        states = [state[name] for state in tuned_of(models)]
        assert_within_bound(tensor, models["base"][name].float(), states, lambdas)


@pytest.mark.parametrize("stored", [F32, F16, BF16])
def test_an_untouched_model_in_another_precision_has_no_norm(
    stored: torch.dtype,
) -> None:
    models = relatives(2)
    models["tuned1"] = {n: t.to(stored) for n, t in models["base"].items()}
    merged = merge(models)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, models["tuned0"][name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [None, *ORDER])
@pytest.mark.parametrize("out_dtype", [None, *ORDER])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_dtype_casts_the_inputs_of_the_sum_and_out_dtype_its_result(
    dtype: torch.dtype | None, out_dtype: torch.dtype | None, granularity: str
) -> None:
    models = relatives(dtype=F32)
    merged = merge(models, dtype=dtype, out_dtype=out_dtype, granularity=granularity)
    uncast = merge(models, dtype=dtype, granularity=granularity)
    work = dtype or F32
    for name, tensor in merged.items():
        # n_t is a property of the tensors given, whatever the merge is done in.
        lambdas = pooled(models, None if granularity == "model" else [name])
        states = [state[name].to(work) for state in tuned_of(models)]
        assert uncast[name].dtype == work
        assert_within_bound(
            uncast[name], models["base"][name].to(work), states, lambdas
        )
        assert_same_bits(tensor, uncast[name].to(out_dtype or work))


@pytest.mark.parametrize("option", ["dtype", "out_dtype"])
def test_only_floating_point_dtypes_are_merged_in(option: str) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        merge(relatives(), **{option: torch.int32})


def test_lambda_does_not_depend_on_the_dtype_of_the_merge() -> None:
    models = relatives(dtype=F32)
    coarse = merge(models, dtype=F64)
    found = solved_coefficients(coarse, models["base"], tuned_of(models))
    torch.testing.assert_close(found, pooled(models), rtol=1e-9, atol=0)


# --- NaN and infinity ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("owner", ["base", "tuned1"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"granularity": "layer"},
        {"granularity": "tensor"},
        {"power": 0.0},
        {"power": -1.0},
        {"exclude": "layers.0"},
        {"weight": [1.0, 0.0, 1.0]},
    ],
)
def test_a_weight_that_is_not_finite_names_tensor_and_model(
    bad: float, owner: str, parameters: dict[str, Any]
) -> None:
    for dtype in (F64, BF16):
        models = relatives(dtype=dtype)
        models[owner]["model.layers.0.mlp.weight"][1, 2] = bad
        with pytest.raises(
            ValueError, match=rf"model\.layers\.0\.mlp\.weight of {owner} .*NaN or inf"
        ):
            merge(models, **parameters)


def test_a_weight_that_is_not_finite_in_an_unnamed_tensor() -> None:
    with pytest.raises(ValueError, match=r"a tensor of 1 holds NaN or infinity"):
        merge_tensors(
            [torch.ones(2), torch.tensor([1.0, float("nan")])], "metagpt", base_index=0
        )


def test_differences_whose_square_exceeds_float64_are_named() -> None:
    models = relatives()
    models["tuned1"]["lm_head.weight"] *= 1e200
    with pytest.raises(ValueError, match=r"lm_head\.weight .*float64"):
        merge(models)


# --- degenerate inputs ---------------------------------------------------------------


@pytest.mark.parametrize("power", [2.0, 1.0, -1.0])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_models_that_equal_the_base_keep_it_and_say_so_once(
    power: float, granularity: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = random_state(0, BF16)
    copies = {n: t.clone() for n, t in base.items()}
    models: Models = {"base": base, "a": copies, "b": base}
    merged = merge(models, power=power, granularity=granularity)
    for name, tensor in merged.items():
        assert_same_bits(tensor, base[name])
    assert len(said(caplog, "no model differs from the base")) == 1


def test_an_untouched_model_counts_by_the_sign_of_power(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = relatives(2)
    models["same"] = {n: t.clone() for n, t in models["base"].items()}
    norms = naive_sq_norms(models["base"], tuned_of(models)[:2])
    for power, share in ((2.0, 0.0), (0.0, 1 / 3), (-2.0, 0.0)):
        rest = naive_coefficients(norms, power=power) * (1 - share)
        lambdas = torch.cat([rest, torch.tensor([share], dtype=F64)])
        caplog.clear()
        merged = merge(models, power=power)
        for name, tensor in merged.items():
            states = [state[name] for state in tuned_of(models)]
            assert_within_bound(tensor, models["base"][name], states, lambdas)
        found = solved_coefficients(merged, models["base"], tuned_of(models)[:2])
        torch.testing.assert_close(found, rest, rtol=1e-9, atol=0)
        assert len(said(caplog, "left out")) == (power < 0)


def test_a_model_that_takes_nearly_all_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = relatives(2)
    base = models["base"]
    models["tuned1"] = {n: base[n] + 100 * t for n, t in random_state(9).items()}
    for _ in range(2):
        caplog.clear()
        merge(models, granularity="tensor")
        assert len(said(caplog, "tuned1 takes")) == 1
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
    table = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(table) == 1
    assert "tuned2" in table[0]


def test_the_base_alone_is_returned() -> None:
    models: Models = {"base": random_state(0)}
    for name, tensor in merge(models).items():
        assert_same_bits(tensor, models["base"][name])
    assert merge(models, out_dtype=BF16)["lm_head.weight"].dtype == BF16
    tensor = torch.ones(3)
    assert_same_bits(merge_tensors([tensor], "metagpt", base_index=0), tensor)


def test_tensors_that_not_all_models_have_are_dropped_if_not_strict() -> None:
    models = relatives()
    models["base"]["extra"] = torch.ones(2, dtype=F64)
    models["tuned0"]["other"] = torch.ones(2, dtype=F64)
    with pytest.raises(ValueError, match="different tensor keys"):
        merge(models)
    expected = merge(relatives())
    merged = merge(models, strict=False)
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert_same_bits(tensor, expected[name])


# --- errors --------------------------------------------------------------------------


def test_a_merge_without_a_base_says_what_to_add() -> None:
    with pytest.raises(ValueError, match="base_model"):
        merge(relatives(), base=None)
    with pytest.raises(ValueError, match="base_model"):
        merge_tensors([torch.ones(2), torch.ones(2)], "metagpt")


@pytest.mark.parametrize(
    ("parameter", "value", "legal"),
    [
        ("granularity", "block", "'model', 'layer' or 'tensor'"),
        ("granularity", 3, "'model', 'layer' or 'tensor'"),
        ("granularity", None, "'model', 'layer' or 'tensor'"),
        ("weight", -0.5, ">= 0"),
        ("weight", [1.0, 1.0, -1.0], ">= 0"),
        ("weight", float("nan"), ">= 0"),
        ("weight", float("inf"), ">= 0"),
        ("weight", "heavy", ">= 0"),
        ("power", float("nan"), "finite"),
        ("power", float("-inf"), "finite"),
        ("power", "two", "finite"),
        ("lambda", float("inf"), "finite"),
        ("lambda", None, "finite"),
        ("exclude", 3, "comma-separated"),
        ("exclude", PerGroupValues([""] * 5 + [["lm_head"]]), "comma-separated"),
    ],
)
def test_bad_parameters_are_named_with_their_legal_values(
    parameter: str, value: Any, legal: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter} is .*expected .*{legal}"):
        merge(relatives(), **{parameter: value})


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Unknown parameter.*granulrity"):
        merge(relatives(), granulrity="tensor")


@pytest.mark.parametrize("weight", [0.0, [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_no_weight_at_all_is_an_error(weight: Any, granularity: str) -> None:
    with pytest.raises(ValueError, match="weight is 0 for every model"):
        merge(relatives(), weight=weight, granularity=granularity)
    with pytest.raises(ValueError, match="weight is 0 for every model"):
        merge(relatives(), weight=PerGroupValues([weight] * 6), granularity=granularity)


def test_shapes_must_match() -> None:
    models = relatives()
    models["tuned0"]["lm_head.weight"] = torch.ones(8, 4, dtype=F64)
    with pytest.raises(ValueError, match=r"size mismatch for lm_head\.weight"):
        merge(models)


# --- gradients -----------------------------------------------------------------------


def leaves(models: Models, owners: Sequence[str]) -> list[torch.Tensor]:
    """Let the tensors of some models require gradients, and return these."""
    found = []
    for owner in owners:
        for name, tensor in models[owner].items():
            models[owner][name] = tensor.requires_grad_()
            found.append(tensor)
    return found


SMALL = {"layers.0.w": (2, 2), "layers.0.b": (), "layers.1.w": (3,)}


@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("owners", [["base", "tuned0", "tuned1"], ["base"], ["tuned1"]])
def test_gradients_reach_every_input_also_through_lambda(
    power: float, granularity: str, owners: list[str]
) -> None:
    models = relatives(2, shapes=SMALL)
    inputs = leaves(models, owners)
    places = [(owner, name) for owner in owners for name in SMALL]

    def merged(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = {model: dict(state) for model, state in models.items()}
        for (owner, name), value in zip(places, values, strict=True):
            states[owner][name] = value
        result = merge_state_dicts(
            states,
            "metagpt",
            base="base",
            parameters={
                "power": power,
                "granularity": granularity,
                "weight": [1.0, 0.5],
                "lambda": 0.8,
            },
        )
        return tuple(result.values())

    assert torch.autograd.gradcheck(merged, tuple(inputs))


def test_gradients_of_one_tensor_alone() -> None:
    tensors = [
        random_state(k, shapes={"w": (2, 3)})["w"].requires_grad_() for k in range(4)
    ]
    assert torch.autograd.gradcheck(
        lambda *values: merge_tensors(values, "metagpt", base_index=1), tensors
    )


def test_gradients_with_an_untouched_model_and_shared_storage() -> None:
    shapes = {"w": (2, 2), "head": (2, 2)}
    base, model = (random_state(k, shapes=shapes)["w"] for k in range(2))
    inputs = [base.requires_grad_(), model.requires_grad_()]

    def merged(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        states = [
            {"w": first, "head": first},
            {"w": second, "head": second},
            {"w": base.detach(), "head": base.detach()},
        ]
        return merge_state_dicts(states, "metagpt", base=0)["head"]

    assert torch.autograd.gradcheck(merged, inputs)


def test_gradients_through_lambda_are_not_those_of_constants() -> None:
    base = torch.zeros(2, dtype=F64)
    tuned = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    other = torch.tensor([5.0, 0.0], dtype=F64)
    merged = merge_tensors([base, tuned, other], "metagpt", base_index=0)
    (found,) = torch.autograd.grad(merged[0], tuned)
    # theta = (n x + m y) / (n + m), n = m = 25: d theta_0 / d x_j = n / (n + m) d_0j
    # + (x_0 - y_0) m / (n + m)^2 2 x_j
    expected = torch.tensor([0.5 - 2 / 100 * 2 * 3, -2 / 100 * 2 * 4], dtype=F64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", ORDER)
def test_modules_of_every_precision_get_gradients(dtype: torch.dtype) -> None:
    models = [torch.nn.Sequential(Tied(k), Tied(k + 5)).to(dtype) for k in range(3)]
    merged = merge_state_dicts(models, "metagpt", base=0, out_dtype=F32)
    sum(t.sum() for t in merged.values() if t.requires_grad).backward()
    for model in models:
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0


def test_gradients_pass_casts_and_mixed_precisions() -> None:
    models = relatives(2)
    models["tuned0"] = {n: t.to(BF16) for n, t in models["tuned0"].items()}
    inputs = leaves(models, ["base", "tuned0", "tuned1"])
    merged = merge_state_dicts(models, "metagpt", base="base", dtype=F32, out_dtype=F64)
    sum(t.sum() for t in merged.values()).backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.abs().sum() > 0


def test_no_graph_is_recorded_without_need() -> None:
    modules = [Tied(k) for k in range(3)]
    merged = merge_state_dicts(modules, "metagpt", base=0)
    assert merged["body"].requires_grad
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            again = merge_state_dicts(modules, "metagpt", base=0)
        for name, tensor in again.items():
            assert not tensor.requires_grad
            torch.testing.assert_close(tensor, merged[name].detach())
    assert not any(t.requires_grad for t in merge(relatives()).values())


def test_with_gradients_or_without_the_same_within_the_bound() -> None:
    for dtype in ORDER:
        models = relatives(dtype=dtype)
        lambdas = pooled(models)
        plain = {model: dict(state) for model, state in models.items()}
        leaves(models, ["base", "tuned2"])
        merged = {n: t.detach() for n, t in merge(models).items()}
        detached: Models = {
            model: {n: t.detach() for n, t in state.items()}
            for model, state in plain.items()
        }
        assert_merged(merged, detached, lambda name, values=lambdas: values)


# --- surroundings --------------------------------------------------------------------


def test_ambient_device_autocast_and_dtype_do_not_matter() -> None:
    models = relatives(dtype=F32)
    expected = merge(models)
    with torch.device("meta"):
        found = [merge(models)]
    with torch.autocast("cpu", dtype=BF16):
        found.append(merge(models))
    with torch.inference_mode():
        found.append(merge(models))
    torch.set_default_dtype(F64)
    try:
        found.append(merge(models))
    finally:
        torch.set_default_dtype(F32)
    for merged in found:
        for name, tensor in merged.items():
            assert_same_bits(tensor, expected[name])


def test_tensors_on_a_device_are_merged_there(device: torch.device) -> None:
    models = relatives(dtype=F32)
    placed = {
        model: {name: tensor.to(device) for name, tensor in state.items()}
        for model, state in models.items()
    }
    lambdas = pooled(models)
    merged = merge(placed)
    assert {tensor.device for tensor in merged.values()} == {
        placed["base"]["lm_head.weight"].device
    }
    assert_merged({n: t.cpu() for n, t in merged.items()}, models, lambda name: lambdas)


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
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_ids_that_stand_for_no_checkpoint(
    ids: list[Hashable], granularity: str
) -> None:
    models = relatives()
    renamed = dict(zip(ids, models.values(), strict=True))
    expected = merge(models, granularity=granularity)
    merged = merge(renamed, base=ids[0], granularity=granularity)
    for name, tensor in merged.items():
        assert_same_bits(tensor, expected[name])


def references(family: Family) -> list[ModelReference]:
    """Open a family as a merge would, and return the references that stand for it."""
    found = [ModelReference.parse(str(path)) for path in (family.base, *family.models)]
    for reference in found:
        LoaderCache().get(reference)
    return found


def in_memory_under(ids: Sequence[Hashable]) -> tuple[Models, Models]:
    """Tensors that no file holds, under the given ids and under plain names."""
    models = relatives(len(ids) - 1)
    return dict(zip(ids, models.values(), strict=True)), models


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_memory_wins_over_open_files(family: Family, granularity: str) -> None:
    ids = references(family)
    models, plain = in_memory_under(ids)
    expected = merge(plain, granularity=granularity)
    merged = merge(models, base=ids[0], granularity=granularity)
    for name, tensor in merged.items():
        assert_same_bits(tensor, expected[name])


def test_memory_wins_over_files_with_the_same_names(family: Family) -> None:
    ids = references(family)
    changed = [
        {n: (t.double() * (k + 1) + 0.01 * k).to(BF16) for n, t in state.items()}
        for k, state in enumerate([family.base_state, *family.states])
    ]
    expected = merge_state_dicts(changed, "metagpt", base=0)
    merged = merge(dict(zip(ids, changed, strict=True)), base=ids[0])
    for name, tensor in merged.items():
        assert_same_bits(tensor, expected[name])


def test_what_happens_to_the_files_does_not_matter_in_memory(
    family: Family, tmp_path: Path
) -> None:
    folders = []
    for number, folder in enumerate((family.base, *family.models)):
        folders.append(tmp_path / str(number))
        shutil.copytree(folder, folders[-1])
    gone = Family(folders[0], tuple(folders[1:]), family.base_state, family.states)
    ids = references(gone)
    merge_methods.get("metagpt").validate_inputs(ids, ids[0])
    models, plain = in_memory_under(ids)
    expected = merge(plain)
    write_model(folders[1], {"w": torch.ones(3)})
    shutil.rmtree(folders[2])
    for name, tensor in merge(models, base=ids[0]).items():
        assert_same_bits(tensor, expected[name])


def test_files_that_do_not_fit_do_not_matter_in_memory(
    family: Family, tmp_path: Path
) -> None:
    stranger = write_model(tmp_path / "stranger", {"w": torch.ones(3)})
    codes = {"model.norm.weight": torch.ones(3, dtype=torch.int8)}
    quantised = write_model(tmp_path / "quantised", codes)
    ids = references(
        Family(family.base, (stranger, quantised), family.base_state, family.states)
    )
    models, plain = in_memory_under(ids)
    expected = merge(plain)
    for name, tensor in merge(models, base=ids[0]).items():
        assert_same_bits(tensor, expected[name])


def test_one_tensor_under_references_of_open_files(family: Family) -> None:
    ids = references(family)
    models = relatives(shapes={"w": (5, 3)})
    tensors = [state["w"] for state in models.values()]
    for name in (None, "model.norm.weight", "x.slices[0]"):
        merged = merge_tensors(tensors, "metagpt", ids=ids, base_index=0, name=name)
        assert_within_bound(merged, tensors[0], tensors[1:], pooled(models))


def afresh(work: Callable[[], Any]) -> Any:
    """Run in a new thread: what a method remembers of its thread's plans is empty."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_one_tensor_with_no_weight_under_references(family: Family) -> None:
    for ids in (references(family), list(relatives())):
        models, plain = in_memory_under(ids)
        values = {name: 0.0 if "norm" in name else 1.0 for name in SHAPES}
        weight = per_group(plain, values)
        merged = afresh(
            lambda models=models, weight=weight: merge(
                models, base=next(iter(models)), weight=weight
            )
        )
        kept = "model.layers.0.norm.weight"
        assert_same_bits(merged[kept], plain["base"][kept])


def test_the_base_alone_is_returned_under_a_reference_too(family: Family) -> None:
    ids = references(family)[:1]
    models, plain = in_memory_under(ids)
    for name, tensor in afresh(lambda: merge(models, base=ids[0])).items():
        assert_same_bits(tensor, plain["base"][name])


def test_merges_in_memory_leave_merges_from_files_alone(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config(family.base, family.models)

    def merges() -> tuple[State, State]:
        expected = run_mergekit(config, tmp_path / "before")
        caplog.clear()
        ids = references(family)
        models, _ = in_memory_under(ids)
        merge(models, base=ids[0], weight=[1.0, 0.0, 0.0])
        with pytest.raises(ValueError, match="weight is 0"):
            merge(models, base=ids[0], weight=0.0)
        buffers = {reference: {"steps": torch.tensor(3)} for reference in ids}
        merge_state_dicts(buffers, "metagpt", base=ids[0])
        caplog.clear()
        return expected, run_mergekit(config, tmp_path / "after")

    expected, after = afresh(merges)
    for name, tensor in after.items():
        assert_same_bits(tensor, expected[name])
    assert len(said(caplog, "lambda of")) == 1


def buffers_only(family: Family) -> None:
    """Merge, in memory and under references, a model without any weight."""
    ids = references(family)
    buffers = {reference: {"steps": torch.tensor(3)} for reference in ids}
    merge_state_dicts(buffers, "metagpt", base=ids[0])


def test_a_merge_in_memory_does_not_hide_that_the_next_has_only_its_base(
    family: Family, tmp_path: Path
) -> None:
    def merges() -> None:
        buffers_only(family)
        run_mergekit(merge_config(family.base, [family.base]), tmp_path / "out")

    with pytest.raises(ValueError, match="only the base"):
        afresh(merges)


def test_a_merge_in_memory_does_not_hide_that_the_next_has_no_weight(
    family: Family, tmp_path: Path
) -> None:
    ids = references(family)
    models, _ = in_memory_under(ids)
    idle = merge_config(family.base, family.models, parameters={"weight": 0.0})

    def merges() -> None:
        merge(models, base=ids[0], weight=3.0)
        buffers_only(family)
        run_mergekit(idle, tmp_path / "out")

    with pytest.raises(ValueError, match="weight is 0 for every model"):
        afresh(merges)


def test_input_groups_are_not_kept_alive() -> None:
    models = relatives(2)
    merged = merge(models)
    watched = [
        weakref.ref(tensor) for state in models.values() for tensor in state.values()
    ]
    del models
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]
    assert merged


def test_entries_may_be_built_by_hand() -> None:
    models = relatives(2, shapes={"w": (4,)})
    group = TensorGroup(
        tuple(
            TensorEntry(model, state["w"], is_base=model == "base")
            for model, state in models.items()
        )
    )
    (merged,) = merge_methods.get("metagpt")([group])
    states = [state["w"] for state in tuned_of(models)]
    assert_within_bound(merged, models["base"]["w"], states, pooled(models))
