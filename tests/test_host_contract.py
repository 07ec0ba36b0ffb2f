"""What we use of mergekit, thing by thing: its shape, and what it does for us.

Names are looked up within tests, so that what mergekit has lost fails these alone.
"""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import click
import mergekit._data.chat_templates
import mergekit.architecture.conversion
import mergekit.common
import mergekit.config
import mergekit.graph
import mergekit.io.tasks
import mergekit.merge
import mergekit.multigpu_executor
import mergekit.options
import mergekit.plan
import mergekit.scripts.merge_raw_pytorch
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.merge_methods import base as methods
from mergekit.merge_methods import registry
from pydantic import ValidationError

import mergekit_metagpt
from mergekit_metagpt.merge_config import plan, running
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
from tests.oracle import assert_same_states

PACKAGE = Path(mergekit_metagpt.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
F = TypeVar("F", bound=Callable[..., Any])

# Each thing of mergekit that a test below looks at.
CONTRACT: set[str] = set()


def uses(*names: str) -> Callable[[F], F]:
    """Note that a test checks what our modules use of mergekit."""

    def note(test: F) -> F:
        for name in names:
            assert name not in CONTRACT, f"{name} has two tests"
            CONTRACT.add(name)
        return test

    return note


def shape(function: Callable[..., Any]) -> str:
    """The parameters of a function without `self`, annotations and default values."""
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]
    return str(inspect.Signature(parameters)).replace("=Ellipsis", "=")


def assert_shape(function: Callable[..., Any], expected: str, modules: str) -> None:
    """Check the parameters of a function that we override or that calls us."""
    found, name = shape(function), function.__qualname__
    assert found == expected, (
        f"mergekit's {name} now takes {found}, no longer {expected}; "
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


def configured(family: Family, count: int = 3, **settings: Any) -> Any:
    """The configuration that merges some models of a family."""
    data = {**merge_config(family.base, family.models[:count]), **settings}
    return mergekit.config.MergeConfiguration.model_validate(data)


def options(**settings: Any) -> Any:
    return mergekit.options.MergeOptions(copy_tokenizer=False, quiet=True, **settings)


# For each class the fields that our modules read or set.
FIELDS = {
    "merge_methods.base.MergeMethodSpec": "name pretty_name reference_url parameters"
    " contract optional_tensor_policy uses_accelerator",
    "merge_methods.base.ParameterSpec": "name value_type scope default description",
    "merge_methods.task_adapter.ExecuteMergeMethodTask": "method_name gather_tensors"
    " model_order base_model output_weight parameters input_parameters",
    "io.tasks.LoaderCache": "loaders lora_cache_dir hf_cache_dir lazy_unpickle"
    " trust_remote_code lora_merge_dtype",
    "architecture.WeightInfo": "name aliases tied_names optional vocabulary_axis",
    "config.InputSliceDefinition": "model layer_range parameters",
    "config.OutputSliceDefinition": "sources base_model parameters",
    "config.OutputModuleDefinition": "slices models parameters",
    "config.ConditionalParameter": "filter value",
    "config.MergeConfiguration": "merge_method base_model models slices modules"
    " parameters dtype out_dtype",
    "config.ConfigReader": "slice_out module",
    "options.MergeOptions": "lora_merge_cache transformers_cache trust_remote_code"
    " lazy_unpickle quiet write_model_card",
    "tokenizer.config.TokenizerConfig": "source tokens",
    "tokenizer.PermutedVocabulary": "gather_tensors tokenizer_task tokens"
    " vocabulary_axis",
}


@uses("mergekit.merge_methods.base.MergeMethodSpec")
@uses("mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask")
@uses("mergekit.config.InputSliceDefinition", "mergekit.config.OutputSliceDefinition")
@uses("mergekit.config.OutputModuleDefinition", "mergekit.config.ConfigReader")
@uses("mergekit.tokenizer.PermutedVocabulary")
@uses("mergekit.tokenizer.config.TokenizerConfig")
@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_we_read_or_set(name: str) -> None:
    module, _, attribute = f"mergekit.{name}".rpartition(".")
    model = getattr(importlib.import_module(module), attribute)
    assert_has(inspect.get_annotations(model), FIELDS[name].split(), name)


# ---- mergekit.merge_methods


@uses("mergekit.merge_methods")
def test_merge_methods_gives_a_method_by_name() -> None:
    assert merge_methods.get("metagpt").spec.name == "metagpt"
    assert "mergekit.merge_methods.registry" in sys.modules, (
        "mergekit.merge_methods no longer imports .registry: autoload waits for that "
        "import, and register() of __init__ for the whole"
    )


@uses("mergekit.merge_methods.registry")
def test_the_registry_takes_a_method_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
@uses("mergekit.merge_methods.base.BatchOptions")  # which we only hand on
def test_a_method_is_called_with_groups_and_bound_parameters() -> None:
    for name, expected in {
        "_execute": "(groups, parameters, options, *, input_dtypes, out_dtype=)",
        "__call__": "(groups, /, *, parameters=, dtype=, out_dtype=, batch_options=)",
        "validate_inputs": "(input_ids, base_id=, *, group_name=)",
        "merge_group": "(group, /, **parameters)",
    }.items():
        function = getattr(methods.GroupMergeMethod, name)
        assert_shape(function, expected, f"MetaGPTMerge.{name}")
    seen: list[Any] = []

    class Noting(methods.GroupMergeMethod):
        spec = methods.MergeMethodSpec("noting", contract=methods.InputContract())

        def _execute(
            self,
            groups: Sequence[Any],
            parameters: list[dict[str, Any]],
            options: methods.BatchOptions,
            **others: Any,
        ) -> tuple[torch.Tensor, ...]:
            changed = [{**bound, "more": 2} for bound in parameters]
            return super()._execute(groups, changed, options, **others)

        def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
            seen.append((group.metadata.name, parameters))
            return group.tensors[0] * parameters["more"]

    groups = [methods.TensorGroup.from_tensors([torch.ones(2)], name=n) for n in "ab"]
    merged = Noting()(groups)
    assert [m.tolist() for m in merged] == [[2.0, 2.0], [2.0, 2.0]]
    assert seen == [("a", {"more": 2}), ("b", {"more": 2})], (
        "what _execute hands on no longer reaches merge_group; method puts the "
        "coefficients there"
    )


@uses("mergekit.merge_methods.base.InputContract")
@uses("mergekit.merge_methods.base.BasePolicy")
def test_a_method_may_require_a_base() -> None:
    contract = methods.InputContract(base=methods.BasePolicy.REQUIRED)
    contract.validate_ids(["base"], "base")
    with pytest.raises(ValueError):
        contract.validate_ids(["model"])


@pytest.mark.parametrize("name", ["ties", "dare_linear", "della"])
def test_methods_that_are_composed_have_weight_and_lambda(name: str) -> None:
    parameters = registry.get(name).spec.parameters
    assert_has({p.name for p in parameters}, {"weight", "lambda"}, f"method {name}")


@uses("mergekit.merge_methods.base.TensorGroup")
@uses("mergekit.merge_methods.base.TensorEntry")
@uses("mergekit.merge_methods.base.TensorMetadata")
def test_a_group_knows_its_base_its_names_and_its_vocabulary() -> None:
    weight = mergekit.architecture.WeightInfo(name="w", vocabulary_axis=0)
    metadata = methods.TensorMetadata.from_weight_info(weight)
    assert (metadata.name, metadata.vocabulary_axis) == ("w", 0)
    entries = [methods.TensorEntry("b", torch.zeros(1), is_base=True)]
    entries.append(methods.TensorEntry("m", torch.ones(1), is_base=False))
    group = methods.TensorGroup(tuple(entries), metadata)
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
    scope = methods.ParameterScope
    spec = methods.ParameterSpec("weight", float, scope.NON_BASE, default=1.0)
    assert spec.validate("2") == 2.0
    assert {one.name for one in scope} >= {"SHARED", "NON_BASE"}
    group = methods.TensorGroup.from_tensors([torch.ones(1)] * 3, base_index=1)
    values = methods.PerInputValues([(0, 0.5), (2, 0.25)])
    assert values.values_for(group.non_base) == [0.5, 0.25]


def test_the_planner_validates_slices_by_name_before_any_tensor(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`metagpt` and `plan_watch` tell a slice from a tensor by this name and order."""
    loaders = mergekit.io.tasks.LoaderCache.loaders
    seen: list[tuple[str | None, int]] = []
    validate = MetaGPTMerge.validate_inputs

    def noted(
        self: MetaGPTMerge,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        seen.append((group_name, len(loaders)))
        validate(self, input_ids, base_id, group_name=group_name)

    monkeypatch.setattr(MetaGPTMerge, "validate_inputs", noted)
    everyone = [str(model) for model in (*family.models, family.base)]
    slices = [
        {"sources": [{"model": model, "layer_range": layers} for model in everyone]}
        for layers in ([0, 2], [2, 3])
    ]
    run_mergekit(merge_config(family.base, [], slices=slices), tmp_path / "out")
    names = [name for name, _ in seen if name and "slices" in name]
    assert names == ["default.slices[0]", "default.slices[1]"], (
        f"the planner now validates slices under the names {names}; method._SLICE "
        "looks for MODULE.slices[NUMBER]"
    )
    assert [name for name, _ in seen[:2]] == names
    assert {open_ for _, open_ in seen} == {4}, (
        "loaders are no longer open when slices are validated; inputs.check_headers "
        "looks at those"
    )
    assert {name for name, _ in seen[2:]} == family.base_state.keys()


@uses("mergekit.io.tasks.GatherTensors")
@pytest.mark.parametrize(("source", "axes"), [("base", [0, 0]), (None, [])])
def test_only_vocabularies_are_matched_before_they_are_merged(
    source: str | None, axes: list[int], family: Family
) -> None:
    """`checks` lets their sizes differ, and no others."""
    config = configured(family, tokenizer_source=source)
    tasks = [tensor.task for tensor in plan.plan_merge(config, options())]
    assert [
        task.output_weight.vocabulary_axis
        for task in tasks
        if not isinstance(task.gather_tensors, mergekit.io.tasks.GatherTensors)
    ] == axes


# ---- plan and graph


@uses("mergekit.plan.MergePlanner")
def test_the_planner_can_be_listened_to(family: Family) -> None:
    planner = mergekit.plan.MergePlanner
    assert_shape(planner.plan_module, "(module_name, definition)", "plan._Planner")
    assert_shape(
        planner.plan_tensor,
        "(weight, weights_in, models, cfg_reader)",
        "plan._Planner",
    )
    assert_takes(planner, "plan", None, None, options=None, out_model_config=None)
    assert_takes(planner.plan_to_disk, "plan", None, out_path="")
    model = {"model": str(family.models[0]), "parameters": {"weight": [0.0, 1.0]}}
    planned = plan.plan_merge(configured(family, models=[model]), options())
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
    class Half(mergekit.graph.Task[float]):
        whole: float

        def arguments(self) -> dict[str, Any]:
            return {}

        def execute(self) -> float:
            return self.whole / 2

    class Sum(mergekit.graph.Task[float]):
        one: Half
        other: Half

        def arguments(self) -> dict[str, Any]:
            return {"one": self.one, "other": self.other}

        def execute(self, one: float, other: float) -> float:
            return one + other

    target = Sum(one=Half(whole=1.0), other=Half(whole=3.0))
    executor = mergekit.graph.Executor(
        [target], math_device="cpu", storage_device="cpu"
    )
    found = dict(executor.run(quiet=True))
    assert found == {target: 2.0}, "results are no longer given by task"


@uses("mergekit.graph.TaskUniverse")
@uses("mergekit.io.tasks.SaveTensor")
def test_another_writer_can_take_what_is_saved(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`replaying` hands in one that compares; mergekit's own is not even made."""
    monkeypatch.delattr(mergekit.io.tasks.TensorWriterTask, "execute")
    saved: dict[str, torch.Tensor] = {}

    class Writer:
        def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool) -> None:
            saved[name] = tensor

        def finalize(self) -> None:
            saved["finalized"] = torch.empty(0)

    tasks = plan.tasks(configured(family, 1, out_dtype="float64"), options())
    kind = mergekit.io.tasks.SaveTensor
    saving = [task for task in tasks if isinstance(task, kind)]
    assert {task.tensor_name for task in saving} == family.base_state.keys()
    universe = mergekit.graph.TaskUniverse(tasks)
    executor = mergekit.graph.Executor(
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
    writer = mergekit.io.TensorWriter(
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
    cache = mergekit.io.tasks.LoaderCache
    cache().setup(mergekit.options.MergeOptions())
    model = mergekit.common.ModelReference.parse(str(family.base))
    loader = cache().get(model)
    assert cache.loaders == {model: loader}, (
        "loaders no longer lie by ModelReference in the class's own dictionary; "
        "checkpoints.already_open looks there"
    )
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(cache().get(model)))
    thread.start()
    thread.join()
    assert seen == [loader], "another thread has other loaders"


@uses("mergekit.io.ShardedTensorIndex")
@uses("mergekit.io.LazyTensorLoader")
def test_an_index_says_which_file_holds_a_tensor(
    family: Family, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", family.base_state, shards=2)
    index = mergekit.io.ShardedTensorIndex.from_disk(str(folder))
    assert index.base_path == str(folder)
    assert index.tensor_paths.keys() == family.base_state.keys()
    assert all((folder / shard).is_file() for shard in index.tensor_paths.values())
    loader = mergekit.io.LazyTensorLoader(index)
    assert loader.index is index
    hash(loader)  # checkpoints keeps headers by loader, weakly
    weakref.ref(loader)


@uses("mergekit.scripts.merge_raw_pytorch")
def test_loaders_of_bare_files_lie_by_path(family: Family) -> None:
    cache = mergekit.scripts.merge_raw_pytorch.SimpleLoaderCache
    file = str(family.base / "model.safetensors")
    loader = cache().get(file)
    try:
        assert cache().loaders.get(file) is loader, (
            "checkpoints.already_open looks for mergekit-pytorch's loaders by path"
        )
    finally:
        cache().loaders.clear()


# ---- architecture


@uses("mergekit.architecture.WeightInfo", "mergekit.architecture.ModelArchitecture")
@uses("mergekit.architecture.arch_info_for_config")
@uses("mergekit.architecture.get_architecture_info")
def test_an_architecture_lists_its_weights(family: Family) -> None:
    config = llama_config()
    architecture = mergekit.architecture.arch_info_for_config(config)
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
    assert mergekit.architecture.arch_info_for_config(config) is None
    found = mergekit.architecture.get_architecture_info(configured(family), options())
    assert found == architecture


@uses("mergekit.architecture.conversion.convert_checkpoint_tensors")
@uses("mergekit.architecture.conversion.can_convert_checkpoint_keys")
def test_single_experts_are_fused() -> None:
    conversion = mergekit.architecture.conversion
    prefix = "model.layers.0.block_sparse_moe.experts"
    stored = {f"{prefix}.{n}.w2.weight": torch.full((2, 3), float(n)) for n in (0, 1)}
    fused_name = "model.layers.0.mlp.experts.down_proj"
    can_convert = conversion.can_convert_checkpoint_keys
    assert can_convert("mixtral", set(stored), fused_name)
    assert not can_convert("llama", set(stored), fused_name)
    called = {name: (lambda tensor=tensor: tensor) for name, tensor in stored.items()}
    fused = conversion.convert_checkpoint_tensors("mixtral", called, fused_name)
    assert fused is not None
    assert fused.tolist() == torch.stack(list(stored.values())).tolist()
    assert conversion.convert_checkpoint_tensors("llama", called, fused_name) is None


# ---- common, config, options


@uses("mergekit.common.ModelReference")
def test_a_reference_names_a_model_and_its_adapter() -> None:
    reference_class = mergekit.common.ModelReference
    reference = reference_class.parse("a/b+c/d")
    assert reference.lora is not None
    assert (reference.model.path, reference.lora.path) == ("a/b", "c/d")
    assert str(reference) == "a/b+c/d"
    assert reference == reference_class.parse("a/b+c/d")
    assert hash(reference) == hash(reference_class.parse("a/b+c/d"))
    settings = {"cache_dir": "", "trust_remote_code": False, "lora_merge_dtype": None}
    merged = reference_class.merged
    assert_takes(merged, "checkpoints.open_checkpoint", reference, **settings)
    assert_takes(reference_class.local_path, "checkpoints", reference, None)
    plain = reference_class.parse("a/b")
    assert plain.merged(**settings) is plain


@uses("mergekit.common")
def test_references_are_told_by_the_loaded_module() -> None:
    """`sources` does not import mergekit.common; no reference exists before it is."""
    assert sys.modules["mergekit.common"].ModelReference


@uses("mergekit.common.dtype_from_name")
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_precisions_have_torch_names(name: str) -> None:
    assert mergekit.common.dtype_from_name(name) == getattr(torch, name)


def test_keys_that_a_configuration_does_not_have_can_be_forbidden() -> None:
    """mergekit ignores them; merge_yaml says where they belong."""
    model = {"model": "a", "wieght": 2}
    data = {"merge_method": "metagpt", "models": [model]}
    mergekit.config.MergeConfiguration.model_validate(data)
    with pytest.raises(ValidationError) as raised:
        mergekit.config.MergeConfiguration.model_validate(data, extra="forbid")
    (error,) = raised.value.errors()
    assert (error["type"], error["loc"]) == ("extra_forbidden", ("models", 0, "wieght"))


@uses("mergekit.config.MergeConfiguration", "mergekit.config.ConfigYamlDumper")
def test_a_configuration_is_read_and_written(family: Family) -> None:
    config = configured(family, dtype="float32")
    assert {str(model) for model in config.referenced_models()} == {
        str(model) for model in (family.base, *family.models)
    }
    dumped = config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.dump(dumped, Dumper=mergekit.config.ConfigYamlDumper)
    again = mergekit.config.MergeConfiguration.model_validate(yaml.safe_load(text))
    assert again == config, "a dumped configuration reads as another one"
    with pytest.raises((ValueError, RuntimeError)):
        mergekit.config.MergeConfiguration.model_validate({"merge_method": "metagpt"})


@uses("mergekit.config.evaluate_setting", "mergekit.config.ConditionalParameter")
def test_the_first_filter_in_a_name_gives_the_value() -> None:
    parameter = mergekit.config.ConditionalParameter
    setting = [parameter(filter="layers.1.", value=0.25), parameter(value=0.5)]
    values = [
        mergekit.config.evaluate_setting(f"model.layers.{n}.w", setting, validate=float)
        for n in (1, 11)
    ]
    assert values == [0.25, 0.5], "export writes filters that mean something else now"


@uses("mergekit.options.MergeOptions", "mergekit.options.PrettyPrintHelp")
@uses("mergekit.options.add_merge_options")
def test_mergekit_adds_its_options_to_a_command_of_ours() -> None:
    global_options = mergekit.options.MergeOptions.apply_global_options
    assert_takes(global_options, "merging", None)
    seen: list[Any] = []

    @click.command("ours", cls=mergekit.options.PrettyPrintHelp)
    @click.argument("config")
    @mergekit.options.add_merge_options
    def command(config: str, merge_options: Any) -> None:
        seen.append(merge_options)

    done = CliRunner().invoke(command, ["c", "--lora-merge-cache", "x", "--quiet"])
    assert done.exit_code == 0, done.output
    assert (seen[0].lora_merge_cache, seen[0].quiet) == ("x", True)
    assert "--lora-merge-cache" in CliRunner().invoke(command, ["--help"]).output


# ---- merge


@uses("mergekit.merge.run_merge")
def test_run_merge_writes_a_model_and_its_card(family: Family, tmp_path: Path) -> None:
    run_merge = mergekit.merge.run_merge
    assert_takes(run_merge, "merging", None, "", None, config_source="")
    out = tmp_path / "made" / "title"
    run_merge(configured(family, 1), str(out), options(), config_source="# as given")
    assert_same_states(read_model(out), family.states[0])
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
    go_on, busy, taken = threading.Event(), [1, 2], list[int]()

    class LateHandle(mergekit.graph.TaskHandle):
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
    executor = mergekit.multigpu_executor.MultiGPUExecutor
    work = executor._device_worker
    monkeypatch.setattr(executor, "_device_worker", worker)
    monkeypatch.setattr(mergekit.multigpu_executor, "TaskHandle", LateHandle)
    out, several = tmp_path / "out", options(multi_gpu=True)
    running.run(configured(family), str(out), several, source="", warned=False)
    assert go_on.is_set(), "mergekit's thread for results has another name"
    data = merge_config(family.base, family.models)
    assert_same_states(read_model(out), run_mergekit(data, tmp_path / "expected"))


@uses("mergekit.merge.MergePlanner")
def test_a_planner_without_tensors_leaves_the_rest_to_be_written(
    family: Family, tmp_path: Path
) -> None:
    """Ranks write the tensors; `run_merge` takes its planner from its own module."""
    out = tmp_path / "title"
    running.run_without_tensors(configured(family, 1), str(out), options(), source="#")
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "config.json", "mergekit_config.yml"}, (
        "run_merge no longer plans by mergekit.merge.MergePlanner"
    )


@uses("mergekit.merge._model_out_config")
def test_the_configuration_of_the_result_can_be_had_beforehand() -> None:
    function = mergekit.merge._model_out_config
    assert_takes(function, "outputs", None, None, trust_remote_code=False)


@uses("mergekit.merge")
def test_a_tokenizer_that_cannot_be_copied_is_logged_with_its_error() -> None:
    source = inspect.getsource(mergekit.merge.run_merge)
    assert "Failed to copy tokenizer" in source and "exc_info=e" in source
    assert mergekit.merge.LOG.name == "mergekit.merge"


@uses("mergekit._data.chat_templates")
@uses("mergekit.merge._set_chat_template", "mergekit.merge._get_donor_model")
def test_the_tokenizer_of_the_result_can_be_tried_beforehand(family: Family) -> None:
    config = configured(family, chat_template="chatml")
    tokenizer = SimpleNamespace(chat_template=None)
    mergekit.merge._set_chat_template(tokenizer, config)
    assert "{" in tokenizer.chat_template
    templates = importlib.resources.files(mergekit._data.chat_templates).iterdir()
    assert "chatml.jinja" in {file.name for file in templates}
    donor, folder = mergekit.merge._get_donor_model(config, options())
    assert (str(donor), folder) == (str(family.base), str(family.base))


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
    users: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for name in imported(file.read_text(encoding="utf-8")):
            users.setdefault(name, set()).add(file.stem)
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
        assert_shape(changed, "(groups)", "method")
    with pytest.raises(AssertionError, match="can no longer be called as method does"):
        assert_takes(changed, "method", None, groups=1)
    with pytest.raises(AssertionError, match="lost name"):
        assert_has({"other"}, {"name", "other"}, "WeightInfo")
