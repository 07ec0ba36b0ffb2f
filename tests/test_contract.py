"""What mergekit asks of any merge method, for every method that we register."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods import BatchOptions, TensorGroup, registered_methods
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import (
    RawPyTorchMergeConfig,
    SimpleLoaderCache,
    plan_flat_merge,
)
from safetensors.torch import load_file, save_file

import mergekit_metagpt
from tests.conftest import Family, make_family
from tests.families import State, merge_config, run_mergekit, said, write_model
from tests.oracle import (
    ORDER,
    assert_same_bits,
    assert_unchanged,
    assert_within_bound,
    naive_coefficients,
    naive_sq_norms,
    solved_coefficients,
)

F64, F32, F16, BF16 = ORDER


def our_methods() -> list[str]:
    """Names of the methods in mergekit's registry whose class is this package's."""
    mergekit_metagpt.register()
    return [
        method.spec.name
        for method in registered_methods()
        if type(method).__module__.split(".")[0] == "mergekit_metagpt"
    ]


METHODS = our_methods()
# Those that, without sparsification, sum scaled task vectors: lambda can be read off.
LINEAR = [
    method
    for method in METHODS
    if method == "metagpt" or method.endswith(("linear", "breadcrumbs"))
]
every_method = pytest.mark.parametrize("method", METHODS)


def counterpart(method: str) -> str:
    """mergekit's own method that does the same with given weights."""
    own = "task_arithmetic"
    return own if method == "metagpt" else method.removeprefix("metagpt_")


def sparsifiable(models: Sequence[State]) -> list[State]:
    """The models without their scalars, of which mergekit's DELLA makes an error."""
    return [{n: t for n, t in state.items() if t.ndim} for state in models]


def accepted(method: str, **parameters: Any) -> dict[str, Any]:
    """Those of the parameters that a method has."""
    names = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    return {name: value for name, value in parameters.items() if name in names}


# --- models in memory and in files ---------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "layers.0.mlp.weight": (6, 8),
    "layers.0.norm.weight": (6,),
    "layers.1.mlp.weight": (6, 8),
    "layers.1.scale": (),
    "layers.1.none": (0, 3),
    "head.weight": (11, 6),
}


def relatives(
    count: int = 3,
    dtype: torch.dtype = F64,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> list[State]:
    """A base and its fine-tunes."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    base = {name: draw(shape) for name, shape in shapes.items()}
    states = [base]
    for k in range(count):
        states.append({n: t + 0.1 * (k + 1) * draw(t.shape) for n, t in base.items()})
    return [{n: t.to(dtype) for n, t in state.items()} for state in states]


def with_buffers(models: Sequence[State]) -> list[State]:
    """Put buffers before and after the weights; their values survive no cast."""
    return [
        {
            "steps": torch.tensor(2**24 + 1),
            **state,
            "enabled": torch.tensor([True, False]),
            "codes": torch.tensor([257, -3], dtype=torch.int16),
        }
        for state in models
    ]


def mixed() -> list[State]:
    """Weights that are stored in different precisions, by tensor and by model."""
    models = relatives(2, shapes=dict.fromkeys(("low", "half", "norm", "double"), (7,)))
    dtypes = {
        "low": (BF16, BF16, BF16),
        "half": (BF16, F16, BF16),
        "norm": (F32, F32, BF16),
        "double": (F64, F32, F16),
    }
    cast = [
        {name: state[name].to(dtypes[name][k]) for name in state}
        for k, state in enumerate(models)
    ]
    return with_buffers(cast)


def shares(models: Sequence[State], **formula: Any) -> torch.Tensor:
    """The oracle's lambda over all floating-point tensors of a base and fine-tunes."""
    base, *tuned = models
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    return naive_coefficients(
        naive_sq_norms({name: base[name] for name in names}, tuned), **formula
    )


def all_tensors(models: Sequence[State]) -> list[torch.Tensor]:
    return [tensor for state in models for tensor in state.values()]


def in_memory(
    method: str, models: Sequence[State], *, base: int = 0, **options: Any
) -> State:
    """Merge in memory, and check on the way that the inputs stay as they are."""
    with assert_unchanged(all_tensors(models)):
        return merge_state_dicts(models, method, base=base, **options)


def groups_of(models: Sequence[State], *, base: int = 0) -> list[TensorGroup]:
    return [
        TensorGroup.from_tensors(
            [state[name] for state in models], base_index=base, name=name
        )
        for name in models[0]
    ]


def raw_files(models: Sequence[State], folder: Path) -> list[str]:
    paths = []
    for number, state in enumerate(models):
        paths.append(str(folder / f"model{number}.safetensors"))
        save_file({n: t.contiguous() for n, t in state.items()}, paths[-1])
    return paths


def from_files(
    method: str, paths: Sequence[str], out: Path, *, union: bool = False, **options: Any
) -> State:
    """Merge through the graph of `mergekit-pytorch`; the first file is the base."""
    config = RawPyTorchMergeConfig(
        merge_method=method,
        models=[{"model": path} for path in paths[1:]],
        base_model=paths[0],
        **options,
    )
    tasks = plan_flat_merge(config, str(out), union, False, MergeOptions())
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    return load_file(out / "model.safetensors")


@pytest.fixture(autouse=True)
def _closed_files() -> Iterator[None]:
    yield
    SimpleLoaderCache().loaders.clear()


@pytest.fixture(scope="module")
def exact_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family in float64, of whose merges lambda can be read off."""
    return make_family(tmp_path_factory.mktemp("exact"), dtype=F64, shards=2)


def assert_all_same_bits(first: State, second: State) -> None:
    """Check that two models agree in names (not their order) and every bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert_same_bits(tensor, second[name])


def assert_merged(
    method: str, merged: State, models: Sequence[State], lambdas: torch.Tensor
) -> None:
    """Compare with the bound, or with mergekit's own method given lambda."""
    names = [n for n, tensor in models[0].items() if tensor.is_floating_point()]
    floats = [{name: state[name] for name in names} for state in models]
    expected = merge_state_dicts(
        floats,
        counterpart(method),
        base=0,
        parameters={"weight": lambdas.tolist()},
    )
    for name in names:
        base, *tuned = (state[name] for state in models)
        if method == "metagpt":
            assert_within_bound(merged[name], base, tuned, lambdas)
        else:
            torch.testing.assert_close(merged[name], expected[name])


# --- the registry --------------------------------------------------------------------


def test_this_suite_covers_what_is_registered() -> None:
    assert METHODS
    assert METHODS[0] == "metagpt"
    assert len(set(METHODS)) == len(METHODS)
    mergekit_metagpt.register()
    assert our_methods() == METHODS
    theirs = {method.spec.name for method in registered_methods()} - {*METHODS}
    assert {counterpart(method) for method in METHODS} <= theirs


@every_method
def test_a_spec_asks_for_a_base_and_nothing_else(method: str) -> None:
    spec = merge_methods.get(method).spec
    assert spec.contract.base == BasePolicy.REQUIRED
    assert spec.contract.min_non_base is None
    assert spec.optional_tensor_policy == (
        merge_methods.get("task_arithmetic").spec.optional_tensor_policy
    )
    assert spec.uses_accelerator
    assert spec.pretty_name is not None
    assert "MetaGPT" in spec.pretty_name
    assert spec.reference_url is not None
    assert spec.reference_url.startswith("https://")
    assert not [p.name for p in spec.parameters if p.required]
    scopes = {p.name: p.scope for p in spec.parameters}
    assert scopes["weight"] == ParameterScope.NON_BASE
    for name in ("granularity", "power", "lambda", "exclude"):
        assert scopes[name] == ParameterScope.SHARED
    for parameter in spec.parameters:
        assert parameter.validate(parameter.default) == parameter.default


@every_method
def test_parameters_of_mergekits_method_keep_names_scopes_and_defaults(
    method: str,
) -> None:
    ours = {p.name: p for p in merge_methods.get(method).spec.parameters}
    for theirs in merge_methods.get(counterpart(method)).spec.parameters:
        if method == "metagpt" and theirs.name not in ours:
            continue
        assert ours[theirs.name].scope == theirs.scope
        if theirs.name != "weight":
            assert ours[theirs.name].default == theirs.default


# --- what is computed ----------------------------------------------------------------


@every_method
@pytest.mark.parametrize("dtype", ORDER)
@pytest.mark.parametrize("count", [1, 3])
def test_the_closed_form_gives_the_weights(
    method: str, dtype: torch.dtype, count: int
) -> None:
    models = relatives(count, dtype)
    assert_merged(method, in_memory(method, models), models, shares(models))


@every_method
def test_weight_and_power_shape_the_weights_and_lambda_scales(method: str) -> None:
    models = relatives()
    parameters = {"weight": [2.0, 0.0, 1.0], "power": 1.0}
    lambdas = shares(models, weight=[2.0, 0.0, 1.0], power=1.0)
    merged = in_memory(method, models, parameters=parameters)
    assert_merged(method, merged, models, lambdas)
    scaled = in_memory(method, models, parameters={**parameters, "lambda": 0.25})
    for name, base in models[0].items():
        expected = base + 0.25 * (merged[name] - base)
        torch.testing.assert_close(scaled[name], expected)


@every_method
@pytest.mark.parametrize("where", ["memory", "files"])
def test_random_numbers_are_those_of_mergekits_method(
    method: str, where: str, tmp_path: Path
) -> None:
    # The order in which a graph draws is its own: there, one tensor is enough.
    names = [*SHAPES] if where == "memory" else ["embed.weight"]
    models = sparsifiable(relatives(dtype=F32))
    models = [{n: state[n] for n in names if n in state} for state in models]
    sparse = accepted(method, density=0.5, gamma=0.05)
    weight = shares(models).tolist()
    paths = raw_files(models, tmp_path)

    def run(name: str, parameters: dict[str, Any]) -> State:
        torch.manual_seed(5)
        if where == "memory":
            return in_memory(name, models, parameters=parameters)
        return from_files(name, paths, tmp_path / name, parameters=parameters)

    merged = run(method, sparse)
    after = torch.get_rng_state()
    if where == "memory":
        expected = run(counterpart(method), {**sparse, "weight": weight})
    else:
        config = RawPyTorchMergeConfig(
            merge_method=counterpart(method),
            models=[
                {"model": path, "parameters": {"weight": share}}
                for path, share in zip(paths[1:], weight, strict=True)
            ],
            base_model=paths[0],
            parameters=sparse,
        )
        torch.manual_seed(5)
        out = tmp_path / "expected"
        tasks = plan_flat_merge(config, str(out), False, False, MergeOptions())
        Executor(tasks, math_device="cpu", storage_device="cpu").execute()
        expected = load_file(out / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), after)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


@every_method
def test_without_sparsification_the_random_state_is_left_alone(
    method: str, family: Family, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    in_memory(method, relatives())
    run_mergekit(
        merge_config(family.base, family.models, merge_method=method), tmp_path / "out"
    )
    assert torch.equal(torch.get_rng_state(), before)


# --- dtypes and buffers --------------------------------------------------------------


@every_method
@pytest.mark.parametrize("dtype", [None, BF16, F64])
@pytest.mark.parametrize("out_dtype", [None, F16, F64])
def test_dtypes_in_memory_are_those_of_task_arithmetic(
    method: str, dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> None:
    models = mixed()
    casts = {"dtype": dtype, "out_dtype": out_dtype}
    merged = in_memory(method, models, **casts)
    usual = in_memory("task_arithmetic", models, parameters={"weight": 0.5}, **casts)
    assert list(merged) == list(usual)
    for name, tensor in merged.items():
        assert tensor.dtype == usual[name].dtype
        assert tensor.shape == usual[name].shape
        if not tensor.is_floating_point():
            assert_same_bits(tensor, models[0][name])
    direct = merge_methods.get(method)(
        groups_of([{n: t for n, t in m.items() if n in FLOATS} for m in models]),
        **casts,
    )
    for name, tensor in zip(FLOATS, direct, strict=True):
        assert_same_bits(tensor, merged[name])


FLOATS = ["low", "half", "norm", "double"]


@every_method
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("out_dtype", [None, "float64"])
def test_dtypes_from_files_are_those_of_task_arithmetic(
    method: str, dtype: str | None, out_dtype: str | None, tmp_path: Path
) -> None:
    models = mixed()
    paths = raw_files(models, tmp_path)
    casts = {"dtype": dtype, "out_dtype": out_dtype}
    merged = from_files(method, paths, tmp_path / "out", **casts)
    usual = from_files(
        "task_arithmetic",
        paths,
        tmp_path / "usual",
        parameters={"weight": 0.5},
        **casts,
    )
    here = in_memory(
        method,
        models,
        dtype=getattr(torch, dtype) if dtype else None,
        out_dtype=getattr(torch, out_dtype) if out_dtype else None,
    )
    assert merged.keys() == usual.keys() == here.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == usual[name].dtype == here[name].dtype
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, here[name])
        else:
            assert_same_bits(tensor, models[0][name])


@every_method
@pytest.mark.parametrize("option", ["dtype", "out_dtype"])
def test_an_integer_dtype_is_refused(method: str, option: str) -> None:
    with pytest.raises(ValueError, match=r"floating-point torch\.dtype"):
        in_memory(method, relatives(), **{option: torch.int64})


@every_method
def test_buffers_are_copied(method: str, tmp_path: Path) -> None:
    models = with_buffers(relatives(dtype=F32))
    merged = in_memory(method, models, dtype=BF16, out_dtype=F16)
    stored = from_files(
        method,
        raw_files(models, tmp_path),
        tmp_path / "out",
        dtype="bfloat16",
        out_dtype="float16",
    )
    for name in ("steps", "enabled", "codes"):
        assert_same_bits(merged[name], models[0][name])
        assert_same_bits(stored[name], models[0][name])
        assert merged[name].data_ptr() != models[0][name].data_ptr()
    assert list(merged) == list(models[0])


@every_method
@pytest.mark.parametrize(
    "other",
    [
        torch.tensor(2**24),
        torch.tensor(2**24 + 1, dtype=torch.int32),
        torch.tensor([2**24 + 1]),
        torch.tensor(2**24 + 1, dtype=F64),
    ],
    ids=["value", "dtype", "shape", "float"],
)
def test_buffers_that_differ_are_refused(
    method: str, other: torch.Tensor, tmp_path: Path
) -> None:
    models = with_buffers(relatives(2, F32))
    models[1]["steps"] = other
    with pytest.raises(ValueError, match="Non-floating buffer 'steps' differs"):
        in_memory(method, models)
    with pytest.raises(ValueError, match="Non-floating buffer 'steps' differs"):
        from_files(method, raw_files(models, tmp_path), tmp_path / "out")


# --- optional tensors ----------------------------------------------------------------


def references(family: Family) -> list[ModelReference]:
    """Open a family as a merge does; the base comes first."""
    found = [ModelReference.parse(str(path)) for path in (family.base, *family.models)]
    for reference in found:
        LoaderCache().get(reference)
    return found


def task_for(
    method: str,
    name: str,
    models: Sequence[ModelReference],
    *,
    weights: Mapping[ModelReference, float] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    **parameters: Any,
) -> ExecuteMergeMethodTask:
    """mergekit's task for one output tensor that not all models need to have."""
    spec = merge_methods.get(method).spec
    values = {
        p.name: parameters.get(p.name, 1.0 if p.required else p.default)
        for p in spec.parameters
    }
    own = {
        model: {
            p.name: weights[model] if weights and p.name == "weight" else values[p.name]
            for p in spec.input_parameters
        }
        for model in models[1:]
    }
    weight = WeightInfo(name=name, optional=True)
    return ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=GatherTensors(
            weight_info=ImmutableMap(dict.fromkeys(models, weight))
        ),
        model_order=tuple(models),
        base_model=models[0],
        output_weight=weight,
        parameters=ImmutableMap(
            {p.name: values[p.name] for p in spec.shared_parameters}
        ),
        input_parameters=ImmutableMap({m: ImmutableMap(v) for m, v in own.items()}),
        dtype=dtype,
        out_dtype=out_dtype,
    )


NAME = "model.layers.1.mlp.up_proj.weight"


@every_method
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("present", [(1,), (2,), (1, 3), (2, 3), (1, 2, 3)])
def test_a_tensor_that_some_models_have_is_merged_of_these(
    method: str, granularity: str, present: tuple[int, ...], exact_family: Family
) -> None:
    models = references(exact_family)
    states = [exact_family.base_state, *exact_family.states]
    tensors = {models[k]: states[k][NAME] for k in (0, *present)}
    with assert_unchanged(tensors.values()):
        merged = task_for(method, NAME, models, granularity=granularity).execute(
            tensors
        )
    names = {
        "model": list(states[0]),
        "layer": [name for name in states[0] if ".layers.1." in name],
        "tensor": [NAME],
    }[granularity]
    lambdas = shares([{n: states[k][n] for n in names} for k in (0, *present)])
    expected = task_for(
        counterpart(method),
        NAME,
        models,
        weights=dict(zip(tensors, [0.0, *lambdas.tolist()], strict=True))
        | {model: 0.0 for model in models if model not in tensors},
    ).execute(tensors)
    assert merged is not None
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("out_dtype", [None, "float64"])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_a_tensor_that_the_base_alone_has_is_the_bases(
    method: str,
    granularity: str,
    dtype: str | None,
    out_dtype: str | None,
    family: Family,
) -> None:
    models = references(family)
    tensor = torch.tensor([1.003, -0.0, 2.0], requires_grad=True)
    casts = {"dtype": dtype, "out_dtype": out_dtype}
    task = task_for(method, NAME, models, granularity=granularity, **casts)
    usual = task_for("task_arithmetic", NAME, models, **casts)
    merged = task.execute({models[0]: tensor})
    expected = usual.execute({models[0]: tensor})
    assert merged is not None
    assert_same_bits(merged, expected)
    assert merged.requires_grad
    merged.sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [1.0, 1.0, 1.0]
    buffer = torch.tensor(257)
    assert_same_bits(task.execute({models[0]: buffer}), buffer)


@every_method
def test_a_tensor_that_the_base_lacks_is_an_error(method: str, family: Family) -> None:
    models = references(family)
    states = [family.base_state, *family.states]
    tensors = {models[k]: states[k][NAME] for k in (1, 2)}
    for name, message in (
        (method, r"the base .* has no .*, which others have"),
        ("task_arithmetic", r"Base input is not present in merge inputs"),
    ):
        with pytest.raises(ValueError, match=message) as seen:
            task_for(name, NAME, models).execute(tensors)
        assert NAME in str(seen.value)


@every_method
def test_flat_merges_of_models_with_different_tensors(
    method: str, tmp_path: Path
) -> None:
    models = relatives(3, F64)
    for state in models[1:]:
        del state["layers.0.mlp.weight"]
    del models[2]["layers.1.mlp.weight"]
    models[0]["steps"] = torch.tensor(3)
    merged = from_files(
        method, raw_files(models, tmp_path), tmp_path / "out", union=True
    )
    assert merged.keys() == models[0].keys() - {"steps", "layers.0.mlp.weight"}

    # n_t is of the pair: all that base and model share, whoever else lacks it.
    def norm(k: int) -> torch.Tensor:
        return naive_sq_norms(
            {n: t for n, t in models[0].items() if n in models[k]}, [models[k]]
        )

    norms = torch.cat([norm(k) for k in (1, 2, 3)])
    for name, tensor in merged.items():
        owners = [k for k in (1, 2, 3) if name in models[k]]
        chosen = [{name: models[k][name]} for k in (0, *owners)]
        lambdas = naive_coefficients(norms[[k - 1 for k in owners]])
        assert_merged(method, {name: tensor}, chosen, lambdas)


@every_method
def test_flat_merges_refuse_tensors_that_the_base_lacks(
    method: str, tmp_path: Path
) -> None:
    models = relatives(2, F32)
    del models[0]["layers.1.mlp.weight"]
    paths = raw_files(models, tmp_path)
    for name in (method, "task_arithmetic"):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.weight"):
            from_files(
                name,
                paths,
                tmp_path / name,
                union=True,
                parameters={"weight": 0.5},
            )


@every_method
def test_no_base_and_only_a_base_are_refused(
    method: str, family: Family, tmp_path: Path
) -> None:
    for base, models, what in (
        (None, family.models, "base_model"),
        (family.base, [family.base], "only the base"),
    ):
        config = merge_config(base, models, merge_method=method)
        with pytest.raises(ValueError, match=what):
            run_mergekit(config, tmp_path / "out")


# --- layouts, autograd, mutation -----------------------------------------------------


@every_method
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, -t], -1)[..., 0],
        lambda t: torch.cat([t, t])[len(t) :],
        lambda t: t.flip(0).contiguous().flip(0),
    ],
    ids=["transposed", "strided", "offset", "copied"],
)
def test_strides_do_not_matter(
    method: str, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    models = relatives(shapes={"a": (5, 4), "b": (3, 7)})
    laid = [{name: layout(t) for name, t in state.items()} for state in models]
    for state, given in zip(models, laid, strict=True):
        assert_all_same_bits(state, given)
    merged = in_memory(method, laid)
    for name, tensor in in_memory(method, models).items():
        assert merged[name].shape == tensor.shape
        torch.testing.assert_close(merged[name], tensor, rtol=1e-13, atol=1e-13)


@every_method
def test_expanded_inputs(method: str) -> None:
    shared = [
        {"row": state["row"].expand(4, 5)}
        for state in relatives(shapes={"row": (1, 5)})
    ]
    merged = in_memory(method, shared)["row"]
    copied = [{"row": state["row"].contiguous()} for state in shared]
    expected = in_memory(method, copied)["row"]
    torch.testing.assert_close(merged, expected, rtol=1e-13, atol=1e-13)
    merged.fill_(1.0)  # every element has its own place


@every_method
@pytest.mark.parametrize("dtype", [None, F64])
def test_gradients_reach_every_input(method: str, dtype: torch.dtype | None) -> None:
    shapes = dict.fromkeys(SHAPES, (6,))
    models = relatives(2, F32, shapes)
    models[2] = {name: tensor.to(BF16) for name, tensor in models[2].items()}
    leaves = [tensor.requires_grad_() for tensor in all_tensors(models)]
    merged = in_memory(method, models, dtype=dtype, out_dtype=F32)
    assert all(tensor.requires_grad for tensor in merged.values())
    sum(tensor.square().sum() for tensor in merged.values()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert torch.isfinite(leaf.grad).all()
    for state in models:
        assert sum(float(tensor.grad.abs().sum()) for tensor in state.values()) > 0


@every_method
def test_no_graph_without_need(method: str) -> None:
    models = relatives()
    plain = in_memory(method, models)
    assert not any(tensor.requires_grad for tensor in plain.values())
    for tensor in all_tensors(models):
        tensor.requires_grad_()
    with torch.no_grad():
        merged = in_memory(method, models)
    assert not any(tensor.requires_grad for tensor in merged.values())
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, plain[name])


@every_method
def test_inputs_are_borrowed_at_every_entrance(
    method: str, exact_family: Family
) -> None:
    models = sparsifiable(relatives(dtype=BF16))
    sparse = accepted(method, density=0.5, normalize=True, int8_mask=True)
    with assert_unchanged(all_tensors(models)):
        merge_methods.get(method)(
            groups_of(models), parameters=sparse, dtype=F32, out_dtype=F64
        )
    ids = references(exact_family)
    states = [exact_family.base_state, *exact_family.states]
    tensors = {model: state[NAME] for model, state in zip(ids, states, strict=True)}
    with assert_unchanged(tensors.values()):
        task_for(method, NAME, ids, **sparse).execute(tensors)


@every_method
def test_results_have_memory_of_their_own(method: str) -> None:
    models = relatives(dtype=F32)
    merged = in_memory(method, models)
    with assert_unchanged(all_tensors(models)):
        for tensor in merged.values():
            tensor.fill_(7.0)


@every_method
def test_ambient_device_and_autocast_do_not_matter(method: str) -> None:
    models = relatives(dtype=F32)
    expected = in_memory(method, models)
    with torch.device("meta"):
        assert_all_same_bits(in_memory(method, models), expected)
    with torch.autocast("cpu", dtype=BF16):
        assert_all_same_bits(in_memory(method, models), expected)


@every_method
def test_an_untouched_tensor_keeps_its_bits(method: str) -> None:
    for dtype in ORDER:
        models = relatives(dtype=dtype)
        models[0]["layers.0.norm.weight"][:2] = -0.0
        for state in models[1:]:
            state["layers.0.norm.weight"] = models[0]["layers.0.norm.weight"].clone()
        merged = in_memory(method, models)["layers.0.norm.weight"]
        assert (merged == models[0]["layers.0.norm.weight"]).all()
        if method == "metagpt":
            assert_same_bits(merged, models[0]["layers.0.norm.weight"])


@every_method
def test_models_that_equal_the_base_give_the_base(method: str) -> None:
    base = relatives(0)[0]
    copies = [{name: tensor.clone() for name, tensor in base.items()} for _ in range(3)]
    for granularity in ("model", "tensor"):
        merged = in_memory(
            method, [base, *copies], parameters={"granularity": granularity}
        )
        for name, tensor in merged.items():
            assert (tensor == base[name]).all()


@every_method
def test_embeddings_of_different_lengths_point_to_the_tokenizer(method: str) -> None:
    for shape in ((3, 2), (2, 3)):
        group = TensorGroup.from_tensors(
            [torch.ones(2, 2), torch.ones(shape)],
            base_index=0,
            name="embed_tokens.weight",
            vocabulary_axis=0,
        )
        with pytest.raises(ValueError, match=r"Tensor size mismatch.*tokenizer"):
            merge_methods.get(method)((group,))


@every_method
def test_a_bad_group_fails_before_any_is_merged(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = merge_methods.get(method)
    groups = groups_of(relatives())
    good = list(registered(groups))
    bad = [
        TensorGroup.from_tensors([torch.ones(2), torch.ones(3)], base_index=0),
        TensorGroup.from_tensors(
            [torch.ones(2), torch.ones(2, device="meta")], base_index=0
        ),
        TensorGroup.from_tensors([torch.ones(2), torch.ones(2)]),
        TensorGroup.from_tensors(
            [torch.ones(2), torch.full((2,), float("nan"))], base_index=0
        ),
    ]
    merged: list[str | None] = []
    kind = type(registered)
    unspied = kind.merge_group

    def spied(self: Any, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        merged.append(group.metadata.name)
        return unspied(self, group, **parameters)

    monkeypatch.setattr(kind, "merge_group", spied)
    for group in bad:
        with pytest.raises(ValueError, match=r"mismatch|same device|base|NaN"):
            registered([*groups, group])
    assert not merged
    again = registered(groups)
    assert merged == list(SHAPES)
    for tensor, wanted in zip(again, good, strict=True):
        assert_same_bits(tensor, wanted)


# --- order, batches, threads ---------------------------------------------------------


def many() -> list[State]:
    """So many tensors, so uneven, that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(3)
    shapes = {f"layers.{k % 5}.w{k}": (1 + k % 7,) for k in range(40)}
    models = relatives(3, F64, shapes)
    for name in shapes:
        size = 10 ** float(torch.rand((), generator=generator))
        for state in models[1:]:
            state[name] = models[0][name] + size * (state[name] - models[0][name])
    # Squared norms near 1: there the logarithms have the most bits.
    norms = naive_sq_norms(models[0], models[1:])
    for state, norm in zip(models[1:], norms.tolist(), strict=True):
        for name, base in models[0].items():
            state[name] = base + (state[name] - base) / norm**0.5
    return models


@every_method
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("named", [True, False])
def test_permuting_groups_permutes_results(
    method: str, granularity: str, named: bool
) -> None:
    groups = groups_of(many())
    if not named:
        groups = [
            TensorGroup.from_tensors(group.tensors, base_index=0) for group in groups
        ]
    parameters = {"granularity": granularity}
    expected = merge_methods.get(method)(groups, parameters=parameters)
    for seed in range(5):
        order = list(range(len(groups)))
        random.Random(seed).shuffle(order)
        moved = merge_methods.get(method)(
            [groups[at] for at in order], parameters=parameters
        )
        for at, tensor in zip(order, moved, strict=True):
            assert_same_bits(tensor, expected[at])


@every_method
@pytest.mark.parametrize("parameters", [{"granularity": "layer"}, {"exclude": "head"}])
def test_permuting_groups_of_shared_storage_permutes_results(
    method: str, parameters: dict[str, str]
) -> None:
    models = relatives(shapes={"embed": (5, 3), "layers.0.w": (4,), "other": (2, 3)})
    for state in models:
        state["layers.0.head"] = state["embed"]
    expected = in_memory(method, models, parameters=parameters)
    for order in itertools.permutations(models[0]):
        moved = [{name: state[name] for name in order} for state in models]
        assert_all_same_bits(in_memory(method, moved, parameters=parameters), expected)


@every_method
def test_permuting_models_permutes_their_weights(method: str) -> None:
    models = relatives()
    expected = in_memory(method, models)
    for order in itertools.permutations(range(4)):
        moved = [models[at] for at in order]
        merged = in_memory(method, moved, base=order.index(0))
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@every_method
@pytest.mark.parametrize(
    "options",
    [
        None,
        BatchOptions(),
        BatchOptions(max_bytes=1),
        BatchOptions(max_groups=1),
        BatchOptions(max_bytes=1 << 40, max_groups=1 << 20),
    ],
)
def test_batch_options_are_accepted_and_change_nothing(
    method: str, options: BatchOptions | None
) -> None:
    models = relatives(dtype=F32)
    expected = in_memory(method, models)
    assert_all_same_bits(in_memory(method, models, batch_options=options), expected)
    direct = merge_methods.get(method)(groups_of(models), batch_options=options)
    for name, tensor in zip(models[0], direct, strict=True):
        assert_same_bits(tensor, expected[name])


def all_at_once(
    work: Sequence[Callable[[], list[torch.Tensor]]],
) -> list[list[torch.Tensor]]:
    """Call them in as many threads, none before all are ready."""
    ready = threading.Barrier(len(work))

    def run(one: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        ready.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [result.result() for result in [pool.submit(run, one) for one in work]]


@every_method
def test_eight_threads_in_memory_give_the_same_bits(method: str) -> None:
    kinds = [
        ({}, relatives(dtype=F32)),
        ({"granularity": "layer", "power": 1.0}, relatives(2)),
    ]

    def run(kind: int) -> list[torch.Tensor]:
        parameters, models = kinds[kind]
        results = [in_memory(method, models, parameters=parameters) for _ in range(3)]
        return [tensor for result in results for tensor in result.values()]

    expected = [run(kind) for kind in (0, 1)]
    found = all_at_once([functools.partial(run, k % 2) for k in range(8)])
    for k, tensors in enumerate(found):
        for tensor, wanted in zip(tensors, expected[k % 2], strict=True):
            assert_same_bits(tensor, wanted)


@every_method
def test_eight_threads_from_files_give_the_same_bits(
    method: str, exact_family: Family
) -> None:
    models = references(exact_family)
    states = [exact_family.base_state, *exact_family.states]
    names = [name for name in states[0] if "layers" in name]
    tasks = {name: task_for(method, name, models) for name in names}

    def run(seed: int) -> list[torch.Tensor]:
        results = {}
        for name in random.Random(seed).sample(names, len(names)):
            tensors = {
                model: state[name] for model, state in zip(models, states, strict=True)
            }
            results[name] = tasks[name].execute(tensors)
        return [results[name] for name in names]

    found = all_at_once([functools.partial(run, seed) for seed in range(8)])
    for tensors in [*found, run(9)]:
        for tensor, wanted in zip(tensors, found[0], strict=True):
            assert_same_bits(tensor, wanted)


@every_method
def test_a_second_call_gives_the_same_bits(method: str) -> None:
    models = relatives(dtype=F32)
    expected = in_memory(method, models)
    in_memory(method, relatives(1), parameters={"power": -1.0, "lambda": 3.0})
    assert_all_same_bits(in_memory(method, models), expected)


# --- state dicts against files -------------------------------------------------------


@every_method
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_files_and_memory_use_the_same_lambda(
    method: str, granularity: str, exact_family: Family, tmp_path: Path
) -> None:
    states = [exact_family.base_state, *exact_family.states]
    parameters = accepted(method, granularity=granularity, normalize=False)
    config = merge_config(
        exact_family.base,
        exact_family.models,
        merge_method=method,
        parameters=parameters,
    )
    stored = run_mergekit(config, tmp_path / "out")
    here = in_memory(method, states, parameters=parameters)
    assert stored.keys() == here.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == F64
        torch.testing.assert_close(tensor, here[name], rtol=1e-11, atol=1e-13)
    if method in LINEAR:
        pools = {
            "model": list(states[0]),
            "layer": [n for n in states[0] if ".layers.2." in n],
            "tensor": ["model.layers.2.mlp.up_proj.weight"],
        }
        pool = pools[granularity]
        lambdas = shares([{n: state[n] for n in pool} for state in states])
        for merged in (stored, here):
            found = solved_coefficients(merged, states[0], states[1:], pool)
            torch.testing.assert_close(found, lambdas, rtol=1e-8, atol=0)


@every_method
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_files_and_memory_agree_within_rounding(
    method: str, dtype: str | None, family: Family, tmp_path: Path
) -> None:
    states = [family.base_state, *family.states]
    config = merge_config(family.base, family.models, merge_method=method, dtype=dtype)
    stored = run_mergekit({k: v for k, v in config.items() if v}, tmp_path / "out")
    work = getattr(torch, dtype or "bfloat16")
    here = in_memory(method, states, dtype=work)
    lambdas = shares(states)
    wide = [{n: t.to(work) for n, t in state.items()} for state in states]
    for merged in (stored, here):
        assert {tensor.dtype for tensor in merged.values()} == {work}
        assert_merged(method, merged, wide, lambdas)
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, here[name])


@every_method
def test_mixed_precisions_from_files_and_in_memory_use_the_same_lambda(
    method: str, tmp_path: Path
) -> None:
    models = relatives(dtype=F64)
    for state, dtype in zip(models, (F32, BF16, F16, F64), strict=True):
        state.update({name: tensor.to(dtype) for name, tensor in state.items()})
    parameters = accepted(method, normalize=False)
    paths = raw_files(models, tmp_path)
    stored = from_files(method, paths, tmp_path / "out", parameters=parameters)
    here = in_memory(method, models, parameters=parameters)
    wide = [{n: t.double() for n, t in state.items()} for state in models]
    assert {tensor.dtype for tensor in (*stored.values(), *here.values())} == {F64}
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, here[name], rtol=1e-11, atol=1e-13)
    if method in LINEAR:
        found = solved_coefficients(stored, wide[0], wide[1:])
        torch.testing.assert_close(found, shares(models), rtol=1e-8, atol=0)


@every_method
def test_a_weight_of_zero_by_filter_keeps_the_bases_tensors(
    method: str, exact_family: Family, tmp_path: Path
) -> None:
    config = merge_config(
        exact_family.base,
        exact_family.models,
        merge_method=method,
        parameters={"weight": [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]},
    )
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in merged.items():
        same = torch.equal(tensor, exact_family.base_state[name])
        assert same == ("mlp" in name), name


# --- one merge after another ---------------------------------------------------------


@every_method
def test_a_plan_that_failed_leaves_nothing_behind(
    method: str, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = merge_config(family.base, family.models, merge_method=method)
    stranger = write_model(tmp_path / "stranger", {"w": torch.ones(3)})
    bad = merge_config(family.base, [*family.models, stranger], merge_method=method)
    alone = merge_config(family.base, [family.base], merge_method=method)

    def merges() -> None:
        # In a thread of its own: plans are remembered by thread.
        run_mergekit(good, tmp_path / "good")
        caplog.clear()
        with pytest.raises(ValueError, match="stranger"):
            run_mergekit(bad, tmp_path / "bad")
        run_mergekit(good, tmp_path / "again")
        assert len(said(caplog, "lambda of")) == 1
        with pytest.raises(ValueError, match="stranger"):
            run_mergekit(bad, tmp_path / "bad")
        with pytest.raises(ValueError, match="only the base"):
            run_mergekit(alone, tmp_path / "alone")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(merges).result()


@every_method
def test_merges_one_after_another_say_lambda_once_each(
    method: str, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config(family.base, family.models, merge_method=method)
    results = []
    for fresh in (True, False):
        caplog.clear()
        results.append(run_mergekit(config, tmp_path / str(fresh), fresh=fresh))
        assert len(said(caplog, "lambda of")) == 1
    assert_all_same_bits(*results)
