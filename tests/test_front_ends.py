"""Every way into mergekit and its options, each with the merge that it must give."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import save_file

import mergekit_metagpt
from tests import matrix
from tests.conftest import Cli, make_family
from tests.families import (
    State,
    cast,
    console_script,
    llama_config,
    merge_config,
    read_model,
    run_mergekit,
    said,
    tuned,
    write_model,
    write_yaml,
)
from tests.layouts import LOADED, save_trio
from tests.matrix import Row, covers, covers_at_once
from tests.merges import (
    assert_merges,
    assert_merges_exactly,
    merge_files,
    pretend_devices,
    task_arithmetic,
    with_granularity,
)
from tests.oracle import (
    GRANULARITIES,
    Oracle,
    assert_lambdas,
    assert_merged,
    assert_same_bits,
    assert_same_states,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Trio:
    """A base and three fine-tunes in float32, so that the bound tells every lambda.

    Attributes:
        config: how to merge them.
        plain: their merge with no option at all, checked.
    """

    base: Path
    models: tuple[Path, ...]
    base_state: State
    states: tuple[State, ...]
    config: dict[str, Any]
    oracle: Oracle
    plain: State


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    family = make_family(tmp_path_factory.mktemp("trio"), dtype=torch.float32)
    config = merge_config(family.base, family.models)
    oracle = Oracle(family.base_state, family.states)
    mergekit_metagpt.register()
    plain = assert_merges(config, tmp_path_factory.mktemp("plain"), oracle)
    return Trio(**vars(family), config=config, oracle=oracle, plain=plain)


@covers_at_once(
    "`mergekit-yaml`", "models overwritten between two processes", "`--num-threads`"
)
def test_two_processes(rows: dict[str, Row], tmp_path: Path) -> None:
    """The same YAML twice, a model overwritten in between."""
    family = make_family(tmp_path, dtype=torch.float32, count=2)
    config = merge_config(family.base, family.models)

    def assert_merges_in_a_process(states: Sequence[State], *options: str) -> float:
        out = tmp_path / f"out{len(options)}"
        done = console_script(config, out, *options)
        assert done.returncode == 0, done.stderr
        oracle = Oracle(family.base_state, states)
        assert_merged(read_model(out), oracle)
        first, second = oracle.lambdas("model.norm.weight").tolist()
        assert len(re.findall("of the whole model", done.stderr)) == 1
        assert f"{first:.4g} {family.models[0]}, " in done.stderr
        assert f"{second:.4g} {family.models[1]} " in done.stderr
        return first

    with rows["`mergekit-yaml`"].expect():
        before = assert_merges_in_a_process(family.states)
    changed = tuned(family.base_state, 7, 0.05)
    shutil.rmtree(family.models[0])
    write_model(family.models[0], changed)
    overwritten = rows["models overwritten between two processes"]
    with overwritten.expect(), rows["`--num-threads`"].expect():
        states = (changed, *family.states[1:])
        after = assert_merges_in_a_process(states, "--num-threads", "1")
    assert abs(after - before) > 0.1


@covers("models overwritten within one process")
def test_files_that_change_within_a_process(
    row: Row, tmp_path: Path, trio: Trio
) -> None:
    for granularity in GRANULARITIES:
        for replaced in (False, True):
            folder = tmp_path / f"{granularity}{replaced}"
            model = write_model(folder / "model", trio.states[2])
            config = merge_config(trio.base, [*trio.models[:2], model])
            config = with_granularity(config, granularity)
            run_mergekit(config, folder / "first")
            if replaced:
                shutil.rmtree(model)
            write_model(model, tuned(trio.base_state, 8, 0.05))
            with row.expect():
                run_mergekit(config, folder / "second", fresh=False)
    # mergekit's own method goes on with the tensors of its open loader.
    config = merge_config(None, [model], merge_method="linear")
    config["parameters"] = {"weight": 1.0}
    theirs = run_mergekit(config, tmp_path / "theirs", fresh=False)
    assert_same_states(theirs, trio.states[2])


@covers("`mergekit-metagpt merge`")
def test_our_own_command(row: Row, trio: Trio, tmp_path: Path, cli: Cli) -> None:
    file, out = write_yaml(tmp_path / "merge.yml", trio.config), tmp_path / "out"
    with row.expect():
        cli("merge", file, out, "--no-copy-tokenizer")
        assert_same_states(read_model(out), trio.plain)


@covers("`mergekit-multi`, a later merge with an earlier one's output as its base")
def test_chain(row: Row, tmp_path: Path, trio: Trio) -> None:
    from mergekit.scripts.multimerge import main

    documents = [
        {"name": "first", **merge_config(trio.base, trio.models[:2])},
        {"name": "second", **merge_config("first", [trio.models[0], "third"])},
        {"name": "third", **merge_config(trio.base, trio.models[1:])},
        merge_config("second", [trio.models[2], "first"]),
    ]
    file = write_yaml(tmp_path / "chain.yml", *documents)
    folder = tmp_path / "between"
    arguments = [str(file), "--intermediate-dir", str(folder)]
    arguments += ["--out-path", str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet"]
    states = trio.states
    with row.expect():
        main.main(arguments, standalone_mode=False)
        first, second, third = (
            read_model(folder / name) for name in ("first", "second", "third")
        )
        for merged, base, models in (
            (first, trio.base_state, states[:2]),
            (third, trio.base_state, states[1:]),
            (second, first, (states[0], third)),
            (read_model(tmp_path / "out"), second, (states[2], first)),
        ):
            assert_merged(merged, Oracle(base, models))


@covers(
    "`mergekit-pytorch` on `.safetensors` files",
    "`mergekit-pytorch` on `.pt` files, with and without `--lazy-unpickle`",
)
def test_bare_files(row: Row, tmp_path: Path) -> None:
    """Modules of any kind, with a buffer of integers that all files agree on."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4)
    )
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    buffer = "1.num_batches_tracked"
    count = base.pop(buffer)
    states = [base, *(tuned(base, k + 1, 0.1 * (k + 1)) for k in range(2))]
    pickles = ".pt" in row.name
    files = []
    for number, state in enumerate(states):
        files.append(tmp_path / f"model{number}.{'pt' if pickles else 'safetensors'}")
        (torch.save if pickles else save_file)({**state, buffer: count}, files[-1])
    oracle = Oracle(states[0], states[1:])
    variants = ((), ("--lazy-unpickle",)) if pickles else ((),)
    casts = ({}, {"dtype": "float64"}, {"out_dtype": "bfloat16"})
    with row.expect():
        for options, granularity in itertools.product(variants, GRANULARITIES):
            results = []
            for number, settings in enumerate(casts):
                out = tmp_path / f"{granularity}{len(options)}{number}"
                given = {"granularity": granularity, **settings}
                results.append(merge_files(files, out, *options, **given))
                assert_same_bits(results[-1].pop(buffer), count)
            stored, exact, rounded = results
            assert_merged(stored, oracle, granularity)
            assert_lambdas(exact, oracle, granularity)
            assert_same_states(rounded, cast(stored, torch.bfloat16))


@covers("`mergekit-pytorch` on the files of models that have a `config.json`")
def test_bare_files_beside_a_config(row: Row, tmp_path: Path) -> None:
    """Stored names stay as they are, though mergekit's definition has others."""
    from transformers import AutoConfig

    saved = save_trio(tmp_path / "saved", "GPT-2")
    config = AutoConfig.from_pretrained(saved.folders[LOADED][0])
    states = [
        {name.removeprefix("transformer."): t for name, t in state.items()}
        for state in saved.states
    ]
    files = write_files(tmp_path, states, config)
    oracle = Oracle(states[0], states[1:])
    with row.expect():
        for granularity in GRANULARITIES:
            out = tmp_path / granularity
            merged = merge_files(files, out, granularity=granularity)
            assert_merged(merged, oracle, granularity)


def write_files(
    folder: Path, states: Sequence[State], config: Any | None = None
) -> list[Path]:
    """Write checkpoints; return the files of their weights."""
    return [
        write_model(folder / f"m{k}", state, config) / "model.safetensors"
        for k, state in enumerate(states)
    ]


@covers(
    "`mergekit-pytorch` with `--tensor-intersection`",
    "`mergekit-pytorch` with `--tensor-union`, every tensor in the base",
)
def test_bare_files_of_different_tensors(row: Row, tmp_path: Path, trio: Trio) -> None:
    states = [dict(trio.base_state), *map(dict, trio.states)]
    del states[1]["model.norm.weight"], states[2]["lm_head.weight"]
    files = write_files(tmp_path, states)
    option = row.name.split("`")[3]
    oracle = given = Oracle(states[0], states[1:])
    if option == "--tensor-intersection":
        common = set.intersection(*(set(state) for state in states))
        kept = [{name: state[name] for name in common} for state in states]
        given = Oracle(kept[0], kept[1:])
    with row.expect():
        for granularity in GRANULARITIES:
            out = tmp_path / granularity
            merged = merge_files(files, out, option, granularity=granularity)
            assert_merged(merged, oracle, granularity, handed_over=given)


@covers("`run_merge` in Python")
def test_run_merge(row: Row, trio: Trio, tmp_path: Path) -> None:
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(copy_tokenizer=False, quiet=True)
    with row.expect():
        given = MergeConfiguration.model_validate(trio.config)
        run_merge(given, str(tmp_path / "out"), options=options)
        assert_same_states(read_model(tmp_path / "out"), trio.plain)


@covers("`merge_state_dicts` on state dicts and on modules")
def test_state_dicts(row: Row, trio: Trio) -> None:
    from transformers import LlamaForCausalLM

    states = {"base": trio.base_state, **dict(zip("abc", trio.states, strict=True))}
    modules = {}
    for name, state in states.items():
        modules[name] = LlamaForCausalLM(llama_config()).requires_grad_(False)
        modules[name].load_state_dict(state)
    with row.expect():
        for granularity in GRANULARITIES:
            merged, of_modules = (
                merge_state_dicts(
                    given,
                    "metagpt",
                    base="base",
                    parameters={"granularity": granularity},
                )
                for given in (states, modules)
            )
            assert_merged(merged, trio.oracle, granularity)
            assert_same_states(of_modules, merged)
        assert_same_states(
            merge_state_dicts(states, "metagpt", base="base"), trio.plain
        )


@covers("`merge_tensors`")
def test_tensors(row: Row, trio: Trio) -> None:
    with row.expect():
        for name, base in trio.base_state.items():
            tensors = [base, *(state[name] for state in trio.states)]
            merged = merge_tensors(tensors, "metagpt", base_index=0)
            only = Oracle({name: base}, [{name: tensor} for tensor in tensors[1:]])
            assert_merged({name: merged}, only)


@covers("several merges in threads of one process")
def test_threads(
    row: Row, tmp_path: Path, trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """Four at a time, some of the same models, each as if it were alone."""
    other = make_family(tmp_path / "other", count=2)
    configs = [
        merge_config(trio.base, trio.models),
        merge_config(trio.base, trio.models[:2]),
        merge_config(other.base, other.models),
        merge_config(trio.base, trio.models, parameters={"power": 1.0}),
        with_granularity(merge_config(trio.base, trio.models[1:]), "tensor"),
        with_granularity(merge_config(other.base, other.models), "layer"),
        merge_config(trio.base, trio.models, merge_method="metagpt_ties"),
        merge_config(trio.models[0], [trio.base, trio.models[1]]),
    ]
    alone = [run_mergekit(c, tmp_path / f"alone{k}") for k, c in enumerate(configs)]

    def merge(number: int) -> State:
        out = tmp_path / f"together{number}"
        return run_mergekit(configs[number % len(configs)], out, fresh=False)

    with row.expect():
        with ThreadPoolExecutor(4) as executor:
            together = list(executor.map(merge, range(2 * len(configs))))
        for number, merged in enumerate(together):
            assert_same_states(merged, alone[number % len(configs)])
        assert not said(caplog, "would not write")


def page_code(heading: str) -> str:
    """The first block of Python under a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.fixture
def evolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], ModuleType]:
    """Import the page's snippet as a module, as its user and ray's workers do."""
    from mergekit.evo import genome

    monkeypatch.setattr(genome, "METHOD_PARAM_MAPS", dict(genome.METHOD_PARAM_MAPS))
    (tmp_path / "evolve_metagpt.py").write_text(page_code("mergekit-evolve"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evolve_metagpt", raising=False)
    return functools.partial(importlib.import_module, "evolve_metagpt")


@covers("`mergekit-evolve`")
def test_evolution(
    row: Row, tmp_path: Path, trio: Trio, evolution: Callable[[], Any]
) -> None:
    """From the genome to the merge; evaluation needs ray, lm-eval and a GPU."""
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    given = {
        "models": [str(model) for model in trio.models],
        "base_model": str(trio.base),
        "merge_method": "metagpt",
    }
    with pytest.raises(ValueError, match="Invalid merge method"):
        ModelGenomeDefinition.model_validate(given)
    evolution()
    with row.expect():
        for method, genes in (("metagpt", 1), ("metagpt_ties", 2)):
            genome = ModelGenome(
                ModelGenomeDefinition.model_validate({**given, "merge_method": method})
            )
            start = genome.initial_genotype()
            assert start.shape == (1, len(trio.models), 1, genes)
            # The genotype that mergekit starts from has equal weights: MetaGPT itself.
            config = genome.genotype_merge_config(start)
            assert config.merge_method == method
            merged = run_mergekit(yaml.safe_load(config.to_yaml()), tmp_path / method)
            if method == "metagpt":
                rounded = trio.oracle.as_dtype(torch.bfloat16)
                assert_merged(merged, trio.oracle, handed_over=rounded)
            else:
                assert merged.keys() == trio.base_state.keys()


def test_every_method_is_in_the_snippet(evolution: Callable[[], Any]) -> None:
    from mergekit.evo import genome

    ours = {
        method.spec.name: {parameter.name for parameter in method.spec.parameters}
        for method in merge_methods.registered_methods()
        if method.spec.name.startswith("metagpt")
    }
    theirs = set(genome.METHOD_PARAM_MAPS)
    evolution()
    assert genome.METHOD_PARAM_MAPS.keys() - theirs == ours.keys()
    for method, known in ours.items():
        first, *others = genome.METHOD_PARAM_MAPS[method]
        assert first == "weight"
        assert {first, *others} <= known


SAME_BITS: dict[str, tuple[str, ...]] = {
    "`--low-cpu-memory`": ("--low-cpu-memory",),
    "`--clone-tensors`": ("--clone-tensors",),
    "`--async-write` and `--write-threads`": (
        *("--async-write", "--write-threads", "3"),
        *("--out-shard-size", "20K"),
    ),
    "`--out-shard-size`": ("--out-shard-size", "20K"),
    "`--random-seed`": ("--random-seed", "4"),
    "`--no-write-model-card`": ("--no-write-model-card",),
    "`--copy-tokenizer`": ("--copy-tokenizer",),
}


@covers(*SAME_BITS)
def test_options_that_change_no_weight(row: Row, tmp_path: Path, trio: Trio) -> None:
    options, config = SAME_BITS[row.name], trio.config
    if "--copy-tokenizer" in options:
        base = shutil.copytree(trio.base, tmp_path / "base")
        (base / "tokenizer.json").write_text("{}")
        (base / "tokenizer_config.json").write_text('{"from": "the base"}')
        config = {**config, "base_model": str(base)}
    out = tmp_path / "out"
    with row.expect():
        assert_same_states(run_mergekit(config, out, *options), trio.plain)
    written = {file.name for file in out.iterdir()}
    shards = [name for name in written if name.endswith(".safetensors")]
    assert (len(shards) > 1) == ("--out-shard-size" in options)
    assert ("README.md" in written) == ("--no-write-model-card" not in options)
    if "--copy-tokenizer" in options:
        copied = (out / "tokenizer_config.json").read_text()
        assert copied == '{"from": "the base"}'


@covers("`--quiet` and its absence")
def test_quiet(
    row: Row, trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with row.expect():
        for option in ("--quiet", "--no-quiet"):
            caplog.clear()
            merged = run_mergekit(trio.config, tmp_path / option, option)
            assert_same_states(merged, trio.plain)
            assert len(said(caplog, "coefficients of the whole model")) == 1


@covers("`--no-safe-serialization`")
def test_pickled_output(row: Row, trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with row.expect():
        run_mergekit(trio.config, out, "--no-safe-serialization")
        assert_same_states(torch.load(out / "pytorch_model.bin"), trio.plain)


REMOTE_CODE = """
from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"
"""


@covers("`--trust-remote-code`")
def test_remote_code(
    row: Row, tmp_path: Path, trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration that only the model's own code can read, and a tied head."""
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    states = [{**s, head: s[embedding]} for s in (trio.base_state, *trio.states)]
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    for folder in folders:
        settings = json.loads((folder / "config.json").read_text())
        settings["model_type"] = "remote_llama"
        settings["auto_map"] = {"AutoConfig": "configuration_remote.RemoteConfig"}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "configuration_remote.py").write_text(REMOTE_CODE)
    oracle = Oracle(states[0], states[1:], {head: embedding})
    config = merge_config(folders[0], folders[1:])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        run_mergekit(config, tmp_path / "refused")
    with row.expect():
        assert_merges_exactly(config, tmp_path, oracle, "--trust-remote-code")


@covers("`--allow-crimes`, architectures that differ in name only")
def test_architectures_that_differ_in_name(
    row: Row, tmp_path: Path, trio: Trio
) -> None:
    from transformers import MistralConfig

    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    mistral = MistralConfig.from_dict({**llama_config().to_dict(), **named})
    other = write_model(tmp_path / "mistral", trio.states[1], mistral)
    config = merge_config(trio.base, [trio.models[0], other, trio.models[2]])
    with pytest.raises(RuntimeError, match="Must specify --allow-crimes"):
        run_mergekit(config, tmp_path / "refused")
    with row.expect():
        merged = run_mergekit(config, tmp_path / "out", "--allow-crimes")
        assert_same_states(merged, trio.plain)


@covers(
    "`--transformers-cache`, a folder laid out as the hub's cache",
    "`--transformers-cache` without a network",
)
def test_hub_cache(
    row: Row, tmp_path: Path, trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models by their names on the hub, which a stand-in answers for."""
    import huggingface_hub

    cache = tmp_path / "hub"
    names = []
    for number, folder in enumerate((trio.base, *trio.models)):
        home = cache / f"models--someone--m{number}"
        snapshot = home / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (home / "blobs").mkdir()
        for file in folder.iterdir():
            blob = shutil.copy(file, home / "blobs" / f"{number}-{file.name}")
            (snapshot / file.name).symlink_to(blob)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("a" * 40)
        names.append(f"someone/m{number}")

    def list_files(repository: str, **_: Any) -> list[str]:
        number = names.index(repository)
        return [file.name for file in (trio.base, *trio.models)[number].iterdir()]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # transformers looks for configurations in the default cache.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    config = merge_config(names[0], names[1:])
    options = ("--transformers-cache", str(cache))
    if row.verdict != matrix.WORKS:
        for given in (task_arithmetic(config), config):
            with row.expect():
                run_mergekit(given, tmp_path / "out", *options)
        return
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_files)
    with row.expect():
        merged = run_mergekit(config, tmp_path / "out", *options)
        assert_same_states(merged, trio.plain)


@covers("the engine of `--multi-gpu`, on two CPU workers")
def test_parallel_engine(
    row: Row, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads have a default device that is not the CPU, as on GPUs."""
    pretend_devices(monkeypatch, 2)
    merge = (trio.config, tmp_path, trio.oracle, "--multi-gpu")
    with row.expect():
        for granularity in GRANULARITIES:
            assert_merges(*merge, granularity=granularity)


ON_CUDA: dict[str, tuple[str, ...]] = {
    "`--cuda`": ("--cuda",),
    "`--cuda --low-cpu-memory`": ("--cuda", "--low-cpu-memory"),
    "`--cuda --read-to-gpu`": ("--cuda", "--read-to-gpu"),
    "`--multi-gpu`": ("--multi-gpu",),
    "`--gpu-rich`": ("--gpu-rich",),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@covers(*ON_CUDA)
def test_cuda(row: Row, trio: Trio, tmp_path: Path) -> None:
    """The same lambda as on the CPU, and elements within the same bound."""
    merge = (trio.config, tmp_path, trio.oracle, *ON_CUDA[row.name])
    with row.expect():
        for granularity in GRANULARITIES:
            config = with_granularity(trio.config, granularity)
            cpu = run_mergekit(config, tmp_path / f"cpu-{granularity}")
            gpu = assert_merges(*merge, granularity=granularity)
            assert_merges_exactly(*merge, granularity=granularity)
            for name, tensor in cpu.items():
                torch.testing.assert_close(gpu[name], tensor, rtol=1e-6, atol=1e-7)
