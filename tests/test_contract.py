"""What mergekit asks of any merge method, for every method that we register.

What each computes is compared with the oracle in test_in_memory.py, test_composed.py
and the tests of files.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors
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
from tests import families
from tests.conftest import Family, make_family
from tests.families import (
    State,
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
    naive_lambdas,
    naive_sq_norms,
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
every_method = pytest.mark.parametrize("method", METHODS)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def counterpart(method: str) -> str:
    """mergekit's own method that does the same with given weights."""
    own = "task_arithmetic"
    return own if method == "metagpt" else method.removeprefix("metagpt_")


# --- models in memory and in files ---------------------------------------------------

SHAPES = {**families.SHAPES, "model.layers.1.none": (0, 3)}
NORM = "model.layers.0.norm.weight"

relatives = functools.partial(families.relatives, shapes=SHAPES)


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
    dtypes = {
        "low": (BF16, BF16, BF16),
        "half": (BF16, F16, BF16),
        "norm": (F32, F32, BF16),
        "double": (F64, F32, F16),
    }
    models = relatives(2, shapes=dict.fromkeys(dtypes, (7,)))
    return with_buffers(
        [{n: t.to(dtypes[n][k]) for n, t in m.items()} for k, m in enumerate(models)]
    )


def all_tensors(models: Sequence[State]) -> list[torch.Tensor]:
    return [tensor for state in models for tensor in state.values()]


def in_memory(
    method: str, models: Sequence[State], *, base: int = 0, **options: Any
) -> State:
    """Merge in memory, and check that inputs stay as they are and share no memory."""
    with assert_unchanged(all_tensors(models)):
        merged = merge_state_dicts(models, method, base=base, **options)
    places = {t.untyped_storage().data_ptr() for t in all_tensors(models) if t.numel()}
    assert not places & {t.untyped_storage().data_ptr() for t in merged.values()}
    return merged


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


def from_files(method: str, paths: Sequence[str], out: Path, **options: Any) -> State:
    """Merge through the graph of `mergekit-pytorch`; the first file is the base."""
    config = RawPyTorchMergeConfig(
        merge_method=method,
        models=[{"model": path} for path in paths[1:]],
        base_model=paths[0],
        **options,
    )
    tasks = plan_flat_merge(config, str(out), False, False, MergeOptions())
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
    spec, usual = (merge_methods.get(m).spec for m in (method, "task_arithmetic"))
    assert spec.contract.base == BasePolicy.REQUIRED
    assert spec.contract.min_non_base is None
    assert spec.optional_tensor_policy == usual.optional_tensor_policy
    assert spec.uses_accelerator
    assert "MetaGPT" in (spec.pretty_name or "")
    assert (spec.reference_url or "").startswith("https://")
    assert not [p.name for p in spec.parameters if p.required]
    scopes = {p.name: p.scope for p in spec.parameters}
    assert scopes["weight"] == ParameterScope.NON_BASE
    for name in ("granularity", "power", "lambda", "exclude"):
        assert scopes[name] == ParameterScope.SHARED
    for parameter in spec.parameters:
        assert parameter.validate(parameter.default) == parameter.default


def random_states() -> list[Any]:
    numpy_state = numpy.random.get_state()[1].tolist()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state]


@every_method
def test_without_sparsification_the_random_state_is_left_alone(
    method: str, family: Family, tmp_path: Path
) -> None:
    before = random_states()
    in_memory(method, relatives())
    mergekit_metagpt.scan(family.base, family.models, gram=True)
    config = merge_config(family.base, family.models, merge_method=method)
    run_mergekit(config, tmp_path / "out")
    assert random_states() == before


# --- dtypes and buffers --------------------------------------------------------------


FLOATS = ["low", "half", "norm", "double"]


@every_method
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), list(itertools.product([None, BF16, F64], [None, F16, F64]))
)
def test_dtypes_are_those_of_task_arithmetic(
    method: str, dtype: Any, out_dtype: Any, tmp_path: Path
) -> None:
    models = mixed()
    paths = raw_files(models, tmp_path)
    casts = {"dtype": dtype, "out_dtype": out_dtype}
    in_words = {k: str(v).removeprefix("torch.") for k, v in casts.items() if v}
    merged = in_memory(method, models, **casts)
    usual = in_memory("task_arithmetic", models, parameters={"weight": 0.5}, **casts)
    stored = from_files(method, paths, tmp_path / "out", **in_words)
    assert list(merged) == list(usual)
    assert merged.keys() == stored.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == stored[name].dtype == usual[name].dtype
        assert tensor.shape == usual[name].shape
        if tensor.is_floating_point():
            torch.testing.assert_close(stored[name], tensor)
        else:
            assert_same_bits(tensor, models[0][name])
            assert_same_bits(stored[name], models[0][name])
    floats = [{name: state[name] for name in FLOATS} for state in models]
    direct = merge_methods.get(method)(groups_of(floats), **casts)
    for name, tensor in zip(FLOATS, direct, strict=True):
        assert_same_bits(tensor, merged[name])


@every_method
@pytest.mark.parametrize("option", ["dtype", "out_dtype"])
def test_an_integer_dtype_is_refused(method: str, option: str) -> None:
    with pytest.raises(ValueError, match=r"floating-point torch\.dtype"):
        in_memory(method, relatives(), **{option: torch.int64})


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
    with pytest.raises(ValueError, match="'steps' differs"):
        in_memory(method, models)
    with pytest.raises(ValueError, match="'steps' differs"):
        from_files(method, raw_files(models, tmp_path), tmp_path / "out")


# --- optional tensors ----------------------------------------------------------------


def references(family: Family) -> list[ModelReference]:
    return opened(*family.paths)


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
    defaults = {p.name: 1.0 if p.required else p.default for p in spec.parameters}
    values = {n: parameters.get(n, default) for n, default in defaults.items()}
    shared = {p.name: values[p.name] for p in spec.shared_parameters}
    own = {p.name: values[p.name] for p in spec.input_parameters}
    each = {
        model: ImmutableMap({**own, "weight": weights[model]} if weights else own)
        for model in models[1:]
    }
    weight = WeightInfo(name=name, optional=True)
    gathered = dict.fromkeys(models, weight)
    return ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=GatherTensors(weight_info=ImmutableMap(gathered)),
        model_order=tuple(models),
        base_model=models[0],
        output_weight=weight,
        parameters=ImmutableMap(shared),
        input_parameters=ImmutableMap(each),
        dtype=dtype,
        out_dtype=out_dtype,
    )


NAME = "model.layers.1.mlp.up_proj.weight"


@every_method
@every_granularity
@pytest.mark.parametrize("present", [(1,), (2,), (1, 3), (2, 3), (1, 2, 3)])
def test_a_tensor_that_some_models_have_is_merged_of_these(
    method: str, granularity: str, present: tuple[int, ...], exact_family: Family
) -> None:
    models = references(exact_family)
    states = exact_family.all_states
    tensors = {models[k]: states[k][NAME] for k in (0, *present)}
    with assert_unchanged(tensors.values()):
        task = task_for(method, NAME, models, granularity=granularity)
        merged = task.execute(tensors)
    chosen = [states[k] for k in present]
    lambdas = naive_lambdas(NAME, states[0], chosen, granularity=granularity)
    weights = dict.fromkeys(models, 0.0)
    weights |= {models[k]: x for k, x in zip(present, lambdas.tolist(), strict=True)}
    expected = task_for(counterpart(method), NAME, models, weights=weights).execute(
        tensors
    )
    assert merged is not None
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize(
    "casts", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "out_dtype": "float64"}]
)
@every_granularity
def test_a_tensor_that_the_base_alone_has_is_the_bases(
    method: str, granularity: str, casts: dict[str, str], family: Family
) -> None:
    models = references(family)
    tensor = torch.tensor([1.003, -0.0, 2.0], requires_grad=True)
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
    states = family.all_states
    tensors = {models[k]: states[k][NAME] for k in (1, 2)}
    for name, message in (
        (method, r"the base .* has no .*, which others have"),
        ("task_arithmetic", r"Base input is not present in merge inputs"),
    ):
        with pytest.raises(ValueError, match=message) as seen:
            task_for(name, NAME, models).execute(tensors)
        assert NAME in str(seen.value)


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
        lambda t: t[:1].expand(4, -1),
    ],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_strides_do_not_matter(
    method: str, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    models = relatives(shapes={"a": (5, 4), "b": (3, 7)})
    laid = [{name: layout(t) for name, t in state.items()} for state in models]
    copied = [{n: t.clone().contiguous() for n, t in s.items()} for s in laid]
    merged = in_memory(method, laid)
    for name, tensor in in_memory(method, copied).items():
        assert merged[name].shape == tensor.shape
        torch.testing.assert_close(merged[name], tensor, rtol=1e-13, atol=1e-13)
        merged[name].fill_(1.0)  # every element has its own place


@every_method
@pytest.mark.parametrize("dtype", [None, F64])
def test_gradients_reach_every_input(method: str, dtype: torch.dtype | None) -> None:
    shapes = dict.fromkeys(SHAPES, (6,))
    models = relatives(2, F32, shapes=shapes)
    models[2] = {name: tensor.to(BF16) for name, tensor in models[2].items()}
    leaves = [tensor.requires_grad_() for tensor in all_tensors(models)]
    # Else the coefficients sum to 1, and the base cancels.
    options = {"dtype": dtype, "out_dtype": F32, "parameters": {"lambda": 0.5}}
    merged = in_memory(method, models, **options)
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
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            merged = in_memory(method, models)
        assert not any(tensor.requires_grad for tensor in merged.values())
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, plain[name])


@every_method
def test_inputs_are_borrowed_at_every_entrance(
    method: str, exact_family: Family
) -> None:
    models = [
        # mergekit's DELLA makes an error of scalars.
        {name: tensor for name, tensor in state.items() if tensor.ndim}
        for state in relatives(dtype=BF16)
    ]
    known = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    sparse = {"density": 0.5, "normalize": True, "int8_mask": True}
    sparse = {name: value for name, value in sparse.items() if name in known}
    with assert_unchanged(all_tensors(models)):
        merge_methods.get(method)(
            groups_of(models), parameters=sparse, dtype=F32, out_dtype=F64
        )
    ids = references(exact_family)
    states = exact_family.all_states
    tensors = {model: state[NAME] for model, state in zip(ids, states, strict=True)}
    with assert_unchanged(tensors.values()):
        task_for(method, NAME, ids, **sparse).execute(tensors)


@every_method
@pytest.mark.parametrize(
    "ambient",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=BF16),
        torch.inference_mode,
        lambda: default_dtype(F64),
    ],
    ids=["device", "autocast", "inference", "dtype"],
)
def test_ambient_settings_do_not_matter(
    method: str, ambient: Callable[[], AbstractContextManager[Any]]
) -> None:
    models = relatives(dtype=F32)
    expected = in_memory(method, models)
    with ambient():
        merged = in_memory(method, models)
    assert_same_states(merged, expected)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(F32)


@every_method
def test_an_untouched_tensor_keeps_its_bits(method: str) -> None:
    for dtype in ORDER:
        models = relatives(dtype=dtype)
        base = models[0][NORM]
        base[:2] = -0.0
        for state in models[1:]:
            state[NORM] = base.clone()
        merged = in_memory(method, models)[NORM]
        assert (merged == base).all()
        if method == "metagpt":
            assert_same_bits(merged, base)


@every_method
@every_granularity
def test_models_that_equal_the_base_give_the_base(
    method: str, granularity: str
) -> None:
    base = relatives(0)[0]
    copies = [{name: tensor.clone() for name, tensor in base.items()} for _ in range(3)]
    parameters = {"granularity": granularity}
    merged = in_memory(method, [base, *copies], parameters=parameters)
    assert all((tensor == base[name]).all() for name, tensor in merged.items())


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
    others = [torch.ones(3), torch.ones(2, device="meta"), torch.full((2,), torch.nan)]
    bad = [
        TensorGroup.from_tensors([torch.ones(2), other], base_index=0)
        for other in others
    ]
    bad.append(TensorGroup.from_tensors([torch.ones(2), torch.ones(2)]))
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
    models = relatives(shapes=shapes)
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
@every_granularity
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
        assert_same_states(in_memory(method, moved, parameters=parameters), expected)


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
    [None, BatchOptions(1, 256), BatchOptions(1 << 26, 1), BatchOptions(1 << 40)],
)
def test_batch_options_are_accepted_and_change_nothing(
    method: str, options: BatchOptions | None
) -> None:
    models = relatives(dtype=F32)
    expected = in_memory(method, models)
    assert_same_states(in_memory(method, models, batch_options=options), expected)
    direct = merge_methods.get(method)(groups_of(models), batch_options=options)
    for name, tensor in zip(models[0], direct, strict=True):
        assert_same_bits(tensor, expected[name])


@every_method
def test_eight_threads_in_memory_give_the_same_bits(method: str) -> None:
    kinds = [
        ({}, relatives(dtype=F32)),
        ({"granularity": "layer", "power": 1.0}, relatives(2)),
    ]
    ready = threading.Barrier(8)

    def run(number: int) -> list[State]:
        parameters, models = kinds[number % 2]
        ready.wait()
        return [in_memory(method, models, parameters=parameters) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(8)))
    for number, results in enumerate(found):
        parameters, models = kinds[number % 2]
        expected = in_memory(method, models, parameters=parameters)
        for merged in results:
            assert_same_states(merged, expected)


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
        assert len(said(caplog, "of the whole model")) == 1
        with pytest.raises(ValueError, match="stranger"):
            run_mergekit(bad, tmp_path / "bad")
        with pytest.raises(ValueError, match="only the base"):
            run_mergekit(alone, tmp_path / "alone")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(merges).result()
