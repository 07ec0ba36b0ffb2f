"""What we use of mergekit, thing by thing: its shape, and what it does for us."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from mergekit.graph import TaskHandle

import mergekit_metagpt
from mergekit_metagpt.method.metagpt import MetaGPTMerge
from tests.conftest import Family
from tests.families import (
    llama_config,
    merge_config,
    read_model,
    run_mergekit,
    write_model,
)
from tests.merges import pretend_devices
from tests.oracle import assert_same_bits, assert_same_states

PACKAGE = Path(mergekit_metagpt.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
F = TypeVar("F", bound=Callable[..., Any])

# Each thing of mergekit that a test below looks at, and our modules that use it.
CONTRACT: set[str] = set()


def uses(name: str) -> Callable[[F], F]:
    """Note that a test checks something of mergekit that our modules use."""

    def note(test: F) -> F:
        assert name not in CONTRACT, f"{name} has two tests"
        CONTRACT.add(name)
        return test

    return note


def shape(function: Callable[..., Any]) -> str:
    """Parameters of a function without `self`: names, `=` for defaults, `*` and `/`."""
    parts: list[str] = []
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    for number, p in enumerate(inspect.signature(function).parameters.values()):
        if p.kind is p.KEYWORD_ONLY and p.KEYWORD_ONLY not in kinds[:number]:
            parts.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(stars + p.name + ("=" if p.default is not p.empty else ""))
        following = kinds[number + 1] if number + 1 < len(kinds) else None
        if p.kind is p.POSITIONAL_ONLY and following is not p.POSITIONAL_ONLY:
            parts.append("/")
    return ", ".join(part for part in parts if part != "self")


def assert_shape(function: Callable[..., Any], wanted: str, modules: str) -> None:
    """Check the parameters of a function that we override or that calls us."""
    found, name = shape(function), function.__qualname__
    assert found == wanted, (
        f"mergekit's {name} now takes ({found}), no longer ({wanted}); "
        f"{modules} overrides or is called by it: look at each parameter there"
    )


def assert_takes(
    function: Callable[..., Any], modules: str, *args: Any, **kwargs: Any
) -> None:
    """Check that a function can be called as we call it."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise AssertionError(
            f"mergekit's {function.__qualname__} can no longer be called as {modules} "
            f"does: {error}"
        ) from error


def assert_has(found: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Check that the names that we read or set are among those that there are."""
    missing = sorted(set(wanted) - set(found))
    assert not missing, f"mergekit's {what} lost {', '.join(missing)}"


def fields_of(model: type) -> set[str]:
    """Names of the fields of a dataclass or a pydantic model."""
    found = getattr(model, "model_fields", None)
    return set(found or model.__dataclass_fields__)  # type: ignore[attr-defined]


# ---- mergekit.merge_methods


@uses("mergekit.merge_methods")
def test_merge_methods_gives_a_method_by_name() -> None:
    from mergekit import merge_methods

    assert merge_methods.get("metagpt").spec.name == "metagpt"
    assert "mergekit.merge_methods.registry" in sys.modules, (
        "mergekit.merge_methods no longer imports .registry: autoload waits for that "
        "import, and register() of __init__ for the whole"
    )


@uses("mergekit.merge_methods.registry")
def test_the_registry_takes_a_method_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.merge_methods import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    method = MetaGPTMerge()
    with pytest.raises(ValueError, match="already registered"):
        registry.register(method)
    del registry._METHODS["metagpt"]
    registry.register(method)
    assert registry.get("metagpt") is method
    assert method in registry.registered_methods()
    # Our documentation quotes this line.
    with pytest.raises(RuntimeError, match=r"^Unimplemented merge method none$"):
        registry.get("none")


@uses("mergekit.merge_methods.base.GroupMergeMethod")
def test_a_method_is_called_with_groups_and_bound_parameters() -> None:
    from mergekit.merge_methods.base import (
        BatchOptions,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        TensorGroup,
    )

    assert_shape(
        GroupMergeMethod._execute,
        "groups, parameters, options, *, input_dtypes, out_dtype=",
        "method.MetaGPTMerge._execute",
    )
    assert_shape(
        GroupMergeMethod.__call__,
        "groups, /, *, parameters=, dtype=, out_dtype=, batch_options=",
        "method.MetaGPTMerge.__call__",
    )
    assert_shape(
        GroupMergeMethod.validate_inputs,
        "input_ids, base_id=, *, group_name=",
        "method.MetaGPTMerge.validate_inputs",
    )
    assert_shape(
        GroupMergeMethod.merge_group, "group, /, **parameters", "method, composed"
    )
    seen: list[Any] = []

    class Noting(GroupMergeMethod):
        spec = MergeMethodSpec("noting", contract=InputContract())

        def _execute(
            self,
            groups: Sequence[TensorGroup],
            parameters: list[dict[str, Any]],
            options: BatchOptions,
            **others: Any,
        ) -> tuple[torch.Tensor, ...]:
            changed = [{**bound, "more": 2} for bound in parameters]
            return super()._execute(groups, changed, options, **others)

        def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
            seen.append((group.metadata.name, parameters))
            return group.tensors[0] * parameters["more"]

    groups = [TensorGroup.from_tensors([torch.ones(2)], name=n) for n in "ab"]
    merged = Noting()(groups)
    assert [m.tolist() for m in merged] == [[2.0, 2.0], [2.0, 2.0]]
    assert seen == [("a", {"more": 2}), ("b", {"more": 2})], (
        "what _execute hands on no longer reaches merge_group; method puts the "
        "coefficients there"
    )


@uses("mergekit.merge_methods.base.MergeMethodSpec")
@uses("mergekit.merge_methods.base.InputContract")
@uses("mergekit.merge_methods.base.BasePolicy")
def test_a_method_describes_itself() -> None:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import BasePolicy, InputContract, MergeMethodSpec

    assert_has(
        fields_of(MergeMethodSpec),
        {
            *("name", "pretty_name", "reference_url", "parameters", "contract"),
            *("optional_tensor_policy", "uses_accelerator"),
        },
        "MergeMethodSpec, which method and composed fill",
    )
    contract = InputContract(base=BasePolicy.REQUIRED)
    contract.validate_ids(["base"], "base")
    with pytest.raises(ValueError):
        contract.validate_ids(["model"])
    for name in ("ties", "dare_linear", "della"):
        spec = registry.get(name).spec
        names = {parameter.name for parameter in spec.parameters}
        assert_has(names, {"weight", "lambda"}, f"method {name}, which composed wraps")


@uses("mergekit.merge_methods.base.TensorGroup")
@uses("mergekit.merge_methods.base.TensorEntry")
@uses("mergekit.merge_methods.base.TensorMetadata")
def test_a_group_knows_its_base_its_names_and_its_vocabulary() -> None:
    from mergekit.architecture import WeightInfo
    from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata

    metadata = TensorMetadata.from_weight_info(WeightInfo(name="w", vocabulary_axis=0))
    assert (metadata.name, metadata.vocabulary_axis) == ("w", 0)
    entries = [TensorEntry("b", torch.zeros(1), is_base=True)]
    entries.append(TensorEntry("m", torch.ones(1), is_base=False))
    group = TensorGroup(tuple(entries), metadata)
    assert group.base is not None and group.base.id == "b"
    assert [entry.id for entry in group.non_base] == ["m"]
    assert [entry.id for entry in group.entries] == ["b", "m"]
    assert group.entries[0].tensor is entries[0].tensor, (
        "a group no longer borrows its tensors; sources compares where they lie"
    )


@uses("mergekit.merge_methods.base.PerInputValues")
@uses("mergekit.merge_methods.base.ParameterSpec")
@uses("mergekit.merge_methods.base.ParameterScope")
def test_parameters_are_bound_per_model() -> None:
    from mergekit.merge_methods.base import (
        ParameterScope,
        ParameterSpec,
        PerInputValues,
        TensorGroup,
    )

    assert_has(
        fields_of(ParameterSpec),
        {"name", "value_type", "scope", "default", "description"},
        "ParameterSpec, which parameters.CheckedParameter extends",
    )
    spec = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)
    assert spec.validate("2") == 2.0
    assert {scope.name for scope in ParameterScope} >= {"SHARED", "NON_BASE"}
    group = TensorGroup.from_tensors([torch.ones(1)] * 3, base_index=1)
    values = PerInputValues([(0, 0.5), (2, 0.25)])
    assert values.values_for(group.non_base) == [0.5, 0.25]


@uses("mergekit.merge_methods.base.BatchOptions")
def test_batch_options_can_be_left_alone() -> None:
    from mergekit.merge_methods.base import BatchOptions

    BatchOptions()  # method only hands it on


Names = list[tuple[str | None, int, int]]


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> Names:
    """For every call of `validate_inputs`: the name, inputs, and loaders open then."""
    from mergekit.io.tasks import LoaderCache

    seen: Names = []
    validate = MetaGPTMerge.validate_inputs

    def noted(
        self: MetaGPTMerge,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        seen.append((group_name, len(input_ids), len(LoaderCache.loaders)))
        validate(self, input_ids, base_id, group_name=group_name)

    monkeypatch.setattr(MetaGPTMerge, "validate_inputs", noted)
    return seen


def test_the_planner_validates_slices_by_name_before_any_tensor(
    family: Family, tmp_path: Path, validations: Names
) -> None:
    """`metagpt` and `plan_watch` tell a slice from a tensor by this name and order."""
    layers = [{"model": str(m), "layer_range": [0, 3]} for m in family.models]
    layers.append({"model": str(family.base), "layer_range": [0, 3]})
    sources = [[{**s, "layer_range": r} for s in layers] for r in ([0, 2], [2, 3])]
    config = merge_config(family.base, [], slices=[{"sources": s} for s in sources])
    run_mergekit(config, tmp_path / "out")
    slices = [name for name, _, _ in validations if name and "slices" in name]
    assert slices == ["default.slices[0]", "default.slices[1]"], (
        f"the planner now validates slices under the names {slices}; method._SLICE "
        "looks for MODULE.slices[NUMBER]"
    )
    assert [name for name, _, _ in validations[:2]] == slices
    assert {open_ for _, _, open_ in validations} == {4}, (
        "loaders are no longer open when slices are validated; inputs.check_headers "
        "looks at those"
    )
    tensors = {name for name, _, _ in validations[2:]}
    assert tensors == family.base_state.keys()


@uses("mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask")
def test_the_task_of_a_tensor_holds_what_the_planner_resolved() -> None:
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    assert_has(
        fields_of(ExecuteMergeMethodTask),
        {
            *("method_name", "gather_tensors", "model_order", "base_model"),
            *("output_weight", "parameters", "input_parameters"),
        },
        "ExecuteMergeMethodTask, which plan and checks read",
    )


@uses("mergekit.io.tasks.GatherTensors")
def test_only_vocabularies_are_matched_before_they_are_merged(family: Family) -> None:
    """`checks` lets their sizes differ, and no others."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import GatherTensors
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merge_config.plan import plan_merge

    for source, expected in (("base", [0, 0]), (None, [])):
        data = merge_config(family.base, family.models, tokenizer_source=source)
        config = MergeConfiguration.model_validate(data)
        tasks = [tensor.task for tensor in plan_merge(config, MergeOptions())]
        assert [
            task.output_weight.vocabulary_axis
            for task in tasks
            if not isinstance(task.gather_tensors, GatherTensors)
        ] == expected


# ---- plan and graph


@uses("mergekit.plan.MergePlanner")
def test_the_planner_can_be_listened_to(family: Family) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    from mergekit_metagpt.merge_config.plan import plan_merge

    assert_shape(MergePlanner.plan_module, "module_name, definition", "plan._Planner")
    assert_shape(
        MergePlanner.plan_tensor,
        "weight, weights_in, models, cfg_reader",
        "plan._Planner",
    )
    assert_takes(
        MergePlanner, "plan.plan_merge", None, None, options=None, out_model_config=None
    )
    assert_takes(MergePlanner.plan_to_disk, "plan.plan_merge", None, out_path="")
    settings = {"models": [{"model": str(family.models[0])}]}
    settings["models"][0]["parameters"] = {"weight": [0.0, 1.0]}
    data = {**merge_config(family.base, []), **settings}
    planned = plan_merge(MergeConfiguration.model_validate(data), MergeOptions())
    assert {p.name for p in planned} == family.base_state.keys()
    weights = {
        p.name: p.task.input_parameters[p.task.model_order[0]]["weight"]
        for p in planned
    }
    middle = "model.layers.1.mlp.up_proj.weight"
    assert weights[middle] == 0.5, "gradients are no longer resolved in the plan"


@uses("mergekit.graph.Executor")
@uses("mergekit.graph.Task")
def test_tasks_of_our_own_can_be_executed() -> None:
    from mergekit.graph import Executor, Task

    class Half(Task[float]):
        whole: float

        def arguments(self) -> dict[str, Task[Any]]:
            return {}

        def execute(self) -> float:
            return self.whole / 2

    class Sum(Task[float]):
        one: Half
        other: Half

        def arguments(self) -> dict[str, Task[Any]]:
            return {"one": self.one, "other": self.other}

        def execute(self, one: float, other: float) -> float:
            return one + other

    target = Sum(one=Half(whole=1.0), other=Half(whole=3.0))
    executor = Executor([target], math_device="cpu", storage_device="cpu")
    found = dict(executor.run(quiet=True))
    assert found == {target: 2.0}, "results are no longer given by task"


@uses("mergekit.graph.TaskUniverse")
@uses("mergekit.io.tasks.SaveTensor")
def test_another_writer_can_take_what_is_saved(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`replaying` hands in one that compares; mergekit's own is not even made."""
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor, TaskUniverse
    from mergekit.io.tasks import SaveTensor, TensorWriterTask
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merge_config import plan

    monkeypatch.delattr(TensorWriterTask, "execute")
    saved: dict[str, torch.Tensor] = {}

    class Writer:
        def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool) -> None:
            saved[name] = tensor

        def finalize(self) -> None:
            saved["finalized"] = torch.empty(0)

    data = merge_config(family.base, family.models[:1], out_dtype="float64")
    config = MergeConfiguration.model_validate(data)
    tasks = plan.tasks(config, MergeOptions())
    saving = [task for task in tasks if isinstance(task, SaveTensor)]
    assert {task.tensor_name for task in saving} == family.base_state.keys()
    universe = TaskUniverse(tasks)
    executor = Executor(
        [universe.add_task(task) for task in tasks],
        math_device="cpu",
        storage_device="cpu",
        cached_values={universe.add_task(saving[0].writer_task): Writer()},
    )
    assert_takes(executor.run, "replaying", quiet=True, desc="Replaying")
    list(executor.run(quiet=True))
    assert list(saved)[-1] == "finalized", "FinalizeModel is no longer the last"
    del saved["finalized"]
    assert saved.keys() == family.base_state.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float64}


# ---- io


@uses("mergekit.io.TensorWriter")
def test_a_writer_makes_one_file_of_a_given_name(tmp_path: Path) -> None:
    """`shards` takes files that have their last name for complete ones."""
    from mergekit.io import TensorWriter

    writer = TensorWriter(
        str(tmp_path),
        max_shard_size=0,
        safe_serialization=True,
        override_basename="shard",
        use_async=False,
    )
    writer.save_tensor("a", torch.ones(2))
    writer.save_tensor("b", torch.ones(3))
    assert not list(tmp_path.iterdir()), "a shard of size 0 is no longer unlimited"
    writer.finalize()
    assert [path.name for path in tmp_path.iterdir()] == ["shard.safetensors"]
    assert sorted(writer.weight_map) == ["a", "b"] and writer.total_size == 20


@uses("mergekit.io.tasks.LoaderCache")
def test_all_threads_share_one_dictionary_of_loaders(family: Family) -> None:
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    assert_has(
        LoaderCache.__annotations__,
        {
            *("loaders", "lora_cache_dir", "hf_cache_dir", "lazy_unpickle"),
            *("trust_remote_code", "lora_merge_dtype"),
        },
        "LoaderCache",
    )
    LoaderCache().setup(MergeOptions())
    model = ModelReference.parse(str(family.base))
    loader = LoaderCache().get(model)
    assert LoaderCache.loaders == {model: loader}, (
        "loaders no longer lie by ModelReference in the class's own dictionary; "
        "checkpoints.already_open looks there"
    )
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(LoaderCache().get(model)))
    thread.start()
    thread.join()
    assert seen == [loader], "another thread has other loaders"


@uses("mergekit.io.ShardedTensorIndex")
@uses("mergekit.io.LazyTensorLoader")
def test_an_index_says_which_file_holds_a_tensor(
    family: Family, tmp_path: Path
) -> None:
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex

    folder = write_model(tmp_path / "model", family.base_state, shards=2)
    index = ShardedTensorIndex.from_disk(str(folder))
    assert index.base_path == str(folder)
    assert index.tensor_paths.keys() == family.base_state.keys()
    assert all((folder / shard).is_file() for shard in index.tensor_paths.values())
    loader = LazyTensorLoader(index)
    assert loader.index is index
    hash(loader)  # checkpoints keeps headers by loader, weakly
    importlib.import_module("weakref").ref(loader)


@uses("mergekit.scripts.merge_raw_pytorch")
def test_loaders_of_bare_files_lie_by_path(family: Family) -> None:
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    file = str(family.base / "model.safetensors")
    loader = SimpleLoaderCache().get(file)
    try:
        assert SimpleLoaderCache().loaders.get(file) is loader, (
            "checkpoints.already_open looks for mergekit-pytorch's loaders by path"
        )
    finally:
        SimpleLoaderCache().loaders.clear()


# ---- architecture


@uses("mergekit.architecture.WeightInfo")
@uses("mergekit.architecture.ModelArchitecture")
@uses("mergekit.architecture.arch_info_for_config")
@uses("mergekit.architecture.get_architecture_info")
def test_an_architecture_lists_its_weights(family: Family) -> None:
    from mergekit.architecture import (
        WeightInfo,
        arch_info_for_config,
        get_architecture_info,
    )
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    assert_has(
        WeightInfo.model_fields,
        {"name", "aliases", "tied_names", "optional", "vocabulary_axis"},
        "WeightInfo, which checkpoint reads and architecture makes",
    )
    config = llama_config()
    architecture = arch_info_for_config(config)
    assert architecture is not None
    weights = {weight.name: weight for weight in architecture.all_weights(config)}
    assert weights.keys() == family.base_state.keys()
    assert weights["lm_head.weight"].tied_names == ("model.embed_tokens.weight",), (
        "tied_names no longer say what stands in for a missing head; checkpoints "
        "counts a tied weight once by them"
    )
    (part,) = architecture.modules.values()
    module, key = part.architecture, part.architecture.num_layers_config_key()
    assert part.weight_prefix is None
    assert (key, module.num_layers(config)) == ("num_hidden_layers", 3), (
        "layers are no longer counted so; architecture compares them with the files"
    )
    last = {weight.name for weight in module.layer_weights(2, config) or ()}
    assert last == {name for name in weights if name.startswith("model.layers.2.")}
    config.architectures = ["Unheard"]
    assert arch_info_for_config(config) is None
    data = merge_config(family.base, family.models)
    found = get_architecture_info(
        MergeConfiguration.model_validate(data), MergeOptions()
    )
    assert found == architecture


@uses("mergekit.architecture.conversion.convert_checkpoint_tensors")
@uses("mergekit.architecture.conversion.can_convert_checkpoint_keys")
def test_single_experts_are_fused() -> None:
    from mergekit.architecture.conversion import (
        can_convert_checkpoint_keys,
        convert_checkpoint_tensors,
    )

    prefix = "model.layers.0.block_sparse_moe.experts"
    stored = {f"{prefix}.{n}.w2.weight": torch.full((2, 3), float(n)) for n in (0, 1)}
    wanted = "model.layers.0.mlp.experts.down_proj"
    assert can_convert_checkpoint_keys("mixtral", set(stored), wanted)
    assert not can_convert_checkpoint_keys("llama", set(stored), wanted)
    called = {name: (lambda tensor=tensor: tensor) for name, tensor in stored.items()}
    fused = convert_checkpoint_tensors("mixtral", called, wanted)
    assert fused is not None
    assert fused.tolist() == torch.stack(list(stored.values())).tolist()
    assert convert_checkpoint_tensors("llama", called, wanted) is None


# ---- common, config, options


@uses("mergekit.common.ModelReference")
def test_a_reference_names_a_model_and_its_adapter() -> None:
    from mergekit.common import ModelReference

    reference = ModelReference.parse("a/b+c/d")
    assert reference.lora is not None
    assert (reference.model.path, reference.lora.path) == ("a/b", "c/d")
    assert str(reference) == "a/b+c/d"
    assert reference == ModelReference.parse("a/b+c/d")
    assert hash(reference) == hash(ModelReference.parse("a/b+c/d"))
    merged = ModelReference.merged
    options = {"cache_dir": "", "trust_remote_code": False, "lora_merge_dtype": None}
    assert_takes(merged, "checkpoints.open_checkpoint", reference, **options)
    assert_takes(ModelReference.local_path, "checkpoints", reference, None)
    plain = ModelReference.parse("a/b")
    assert plain.merged(**options) is plain


@uses("mergekit.common")
def test_references_are_told_by_the_loaded_module() -> None:
    """`sources` does not import mergekit.common; no reference exists before it is."""
    assert "mergekit.common" in sys.modules
    assert sys.modules["mergekit.common"].ModelReference


@uses("mergekit.common.dtype_from_name")
def test_precisions_have_torch_names() -> None:
    from mergekit.common import dtype_from_name

    for name in ("float64", "float32", "float16", "bfloat16"):
        assert dtype_from_name(name) == getattr(torch, name)


@uses("mergekit.config.ConditionalParameter")
@uses("mergekit.config.InputSliceDefinition")
@uses("mergekit.config.OutputSliceDefinition")
def test_keys_that_a_configuration_does_not_have_can_be_forbidden() -> None:
    """mergekit ignores them; merge_yaml says where they belong."""
    from mergekit.config import (
        ConditionalParameter,
        InputSliceDefinition,
        MergeConfiguration,
        OutputSliceDefinition,
    )
    from pydantic import ValidationError

    for part, keys in (
        (InputSliceDefinition, {"model", "layer_range", "parameters"}),
        (OutputSliceDefinition, {"sources", "base_model", "parameters"}),
        (ConditionalParameter, {"filter", "value"}),
    ):
        assert_has(part.model_fields, keys, f"{part.__name__}, which merge_yaml reads")
    model = {"model": "a", "wieght": 2}
    data = {"merge_method": "metagpt", "models": [model]}
    MergeConfiguration.model_validate(data)
    with pytest.raises(ValidationError) as raised:
        MergeConfiguration.model_validate(data, extra="forbid")
    (error,) = raised.value.errors()
    assert (error["type"], error["loc"]) == ("extra_forbidden", ("models", 0, "wieght"))


@uses("mergekit.config.MergeConfiguration")
@uses("mergekit.config.ConfigYamlDumper")
def test_a_configuration_is_read_and_written(family: Family) -> None:
    from mergekit.config import ConfigYamlDumper, MergeConfiguration

    assert_has(
        MergeConfiguration.model_fields,
        {
            *("merge_method", "base_model", "models", "slices", "modules"),
            *("parameters", "dtype", "out_dtype"),
        },
        "MergeConfiguration, which recipe reads",
    )
    data = merge_config(family.base, family.models, dtype="float32")
    config = MergeConfiguration.model_validate(data)
    assert {str(m) for m in config.referenced_models()} == {
        str(m) for m in (family.base, *family.models)
    }
    dumped = config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.dump(dumped, Dumper=ConfigYamlDumper)
    again = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert again == config, "a dumped configuration reads as another one"
    with pytest.raises((ValueError, RuntimeError)):
        MergeConfiguration.model_validate({"merge_method": "metagpt"})


@uses("mergekit.config.evaluate_setting")
def test_the_first_filter_in_a_name_gives_the_value() -> None:
    from mergekit.config import ConditionalParameter, evaluate_setting

    setting = [
        ConditionalParameter(filter="layers.1.", value=0.25),
        ConditionalParameter(value=0.5),
    ]
    values = [
        evaluate_setting(f"model.layers.{n}.w", setting, validate=float)
        for n in (1, 11)
    ]
    assert values == [0.25, 0.5], "export writes filters that mean something else now"


@uses("mergekit.config.ConfigReader")
@uses("mergekit.config.OutputModuleDefinition")
def test_the_reader_knows_its_module_and_slice() -> None:
    from mergekit.config import ConfigReader, OutputModuleDefinition

    assert_has(
        ConfigReader.model_fields,
        {"slice_out", "module"},
        "ConfigReader, by which outputs finds a tensor's slice",
    )
    assert_has(
        OutputModuleDefinition.model_fields,
        {"slices", "models", "parameters"},
        "OutputModuleDefinition",
    )


@uses("mergekit.options.MergeOptions")
@uses("mergekit.options.add_merge_options")
@uses("mergekit.options.PrettyPrintHelp")
def test_mergekit_adds_its_options_to_a_command_of_ours() -> None:
    import click
    from click.testing import CliRunner
    from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

    assert_has(
        MergeOptions.model_fields,
        {
            *("lora_merge_cache", "transformers_cache", "trust_remote_code"),
            *("lazy_unpickle", "quiet", "write_model_card"),
        },
        "MergeOptions",
    )
    assert_takes(MergeOptions.apply_global_options, "merging", None)
    seen: list[MergeOptions] = []

    @click.command("ours", cls=PrettyPrintHelp)
    @click.argument("config")
    @add_merge_options
    def command(config: str, merge_options: MergeOptions) -> None:
        seen.append(merge_options)

    done = CliRunner().invoke(command, ["c", "--lora-merge-cache", "x", "--quiet"])
    assert done.exit_code == 0, done.output
    assert (seen[0].lora_merge_cache, seen[0].quiet) == ("x", True)
    assert "--lora-merge-cache" in CliRunner().invoke(command, ["--help"]).output


# ---- merge


@uses("mergekit.merge.run_merge")
def test_run_merge_writes_a_model_and_its_card(family: Family, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    assert_takes(run_merge, "merging", None, "", None, config_source="")
    data = merge_config(family.base, family.models[:1])
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    config = MergeConfiguration.model_validate(data)
    out = tmp_path / "made" / "title"
    run_merge(config, str(out), options, config_source="# as given")
    for name, tensor in read_model(out).items():
        assert_same_bits(tensor, family.states[0][name])
    assert "# title\n" in (out / "README.md").read_text(), (
        "the card is no longer titled by the folder; merging names its folder so"
    )
    assert (out / "mergekit_config.yml").read_text() == "# as given"
    assert (out / "config.json").is_file()


@uses("mergekit.multigpu_executor.MultiGPUExecutor")
@uses("mergekit.merge.MultiGPUExecutor")
def test_the_engine_of_several_devices_waits_for_all_results(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit's own drops what its thread for results, held up here, has not taken.

    It then merges without the inputs that were taken, which count as missing.
    """
    from mergekit import multigpu_executor
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merge_config import plan

    go_on, busy, taken = threading.Event(), [1, 2], list[int]()

    class LateHandle(TaskHandle):
        def __init__(self, *args: Any) -> None:
            if threading.current_thread().name.endswith("(update_progress)"):
                taken.append(1)
                if len(taken) > 2:
                    go_on.wait(30)
            super().__init__(*args)

    def worker(self: Any, **options: Any) -> None:
        work(self, **options)
        busy.pop()
        if not busy:
            threading.Timer(0.2, go_on.set).start()

    pretend_devices(monkeypatch, len(busy), patient=False)
    work = multigpu_executor.MultiGPUExecutor._device_worker
    monkeypatch.setattr(multigpu_executor.MultiGPUExecutor, "_device_worker", worker)
    monkeypatch.setattr(multigpu_executor, "TaskHandle", LateHandle)
    data = merge_config(family.base, family.models)
    plan.run(
        MergeConfiguration.model_validate(data),
        str(tmp_path / "out"),
        MergeOptions(multi_gpu=True, copy_tokenizer=False, quiet=True),
        source="",
        warned=False,
    )
    assert go_on.is_set(), "mergekit's thread for results has another name"
    expected = run_mergekit(data, tmp_path / "expected")
    assert_same_states(read_model(tmp_path / "out"), expected)


@uses("mergekit.merge.MergePlanner")
def test_a_planner_without_tensors_leaves_the_rest_to_be_written(
    family: Family, tmp_path: Path
) -> None:
    """Ranks write the tensors; `run_merge` takes its planner from its own module."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merge_config import plan

    data = merge_config(family.base, family.models[:1])
    plan.run_without_tensors(
        MergeConfiguration.model_validate(data),
        str(tmp_path / "title"),
        MergeOptions(copy_tokenizer=False, quiet=True),
        source="# as given",
    )
    names = {path.name for path in (tmp_path / "title").iterdir()}
    assert names == {"README.md", "config.json", "mergekit_config.yml"}, (
        "run_merge no longer plans by mergekit.merge.MergePlanner"
    )


@uses("mergekit.merge._model_out_config")
def test_the_configuration_of_the_result_can_be_had_beforehand() -> None:
    from mergekit.merge import _model_out_config

    assert_takes(_model_out_config, "outputs", None, None, trust_remote_code=False)


@uses("mergekit._data.chat_templates")
@uses("mergekit.merge._set_chat_template")
@uses("mergekit.merge._get_donor_model")
@uses("mergekit.tokenizer.PermutedVocabulary")
def test_the_tokenizer_of_the_result_can_be_tried_beforehand(family: Family) -> None:
    from importlib.resources import files
    from types import SimpleNamespace

    from mergekit._data import chat_templates
    from mergekit.config import MergeConfiguration
    from mergekit.merge import _get_donor_model, _set_chat_template
    from mergekit.options import MergeOptions
    from mergekit.tokenizer import PermutedVocabulary

    data = merge_config(family.base, family.models, chat_template="chatml")
    config = MergeConfiguration.model_validate(data)
    tokenizer = SimpleNamespace(chat_template=None)
    _set_chat_template(tokenizer, config)
    assert "{" in tokenizer.chat_template
    assert "chatml.jinja" in {file.name for file in files(chat_templates).iterdir()}
    donor, folder = _get_donor_model(config, MergeOptions())
    assert (str(donor), folder) == (str(family.base), str(family.base))
    assert_has(
        fields_of(PermutedVocabulary),
        {"gather_tensors", "tokenizer_task", "tokens", "vocabulary_axis"},
        "PermutedVocabulary, which checks executes",
    )


# ---- that nothing is forgotten


def imported(source: str) -> set[str]:
    """What a module of ours uses of mergekit: imports, and modules named in strings.

    A name that is imported from a package and is itself a module counts as such.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"mergekit(\.\w+)+", node.value):
                found.add(node.value)
    return {name for name in found if name.startswith("mergekit.")}


def used_by_us() -> dict[str, set[str]]:
    """For each thing of mergekit the modules of ours that use it."""
    users: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in imported(file.read_text(encoding="utf-8")):
            users.setdefault(name, set()).add(file.stem)
    return users


def test_reading_imports() -> None:
    source = """
import mergekit.merge_methods
from mergekit.io import tasks as t
from mergekit_metagpt.arithmetic import compiled
def f():
    from mergekit.common import ModelReference
    sys.modules.get("mergekit.plan")
    "mergekit is good. mergekit.plan too"
"""
    assert imported(source) == {
        "mergekit.merge_methods",
        "mergekit.io.tasks",
        "mergekit.common.ModelReference",
        "mergekit.plan",
    }


def test_all_that_is_used_has_a_test_and_nothing_else() -> None:
    users = used_by_us()
    untested = {name: sorted(users[name]) for name in users.keys() - CONTRACT}
    assert not untested, f"no test here says what these are used for: {untested}"
    unused = sorted(CONTRACT - users.keys())
    assert not unused, f"tested, but no module of ours uses them any more: {unused}"


def test_an_untested_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.CONTRACT", CONTRACT - {"mergekit.merge.run_merge"})
    with pytest.raises(AssertionError, match=r"mergekit\.merge\.run_merge"):
        test_all_that_is_used_has_a_test_and_nothing_else()


def test_the_page_lists_all_that_is_used() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("## When a new mergekit appears")[1]
    listed = set(re.findall(r"[\w.]+", section))
    missing = [
        name
        for name in sorted(CONTRACT)
        if name.removeprefix("mergekit.") not in listed
        and name.rpartition(".")[2] not in listed
    ]
    assert not missing, f"{PAGE.name} does not name {missing}"


def test_a_changed_signature_is_said_in_plain_words() -> None:
    def changed(self: Any, groups: Any, surprise: Any) -> None:
        """As a later mergekit might have it."""

    with pytest.raises(AssertionError, match=r"now takes \(groups, surprise\)"):
        assert_shape(changed, "groups", "method")
    with pytest.raises(AssertionError, match="can no longer be called as method does"):
        assert_takes(changed, "method", None, groups=1)
    with pytest.raises(AssertionError, match="lost name"):
        assert_has({"other"}, {"name", "other"}, "WeightInfo")
