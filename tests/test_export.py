"""`export`: the plain YAML merges, without the plugin, to what metagpt merges to."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.config import ConditionalParameter, evaluate_setting

from mergekit_metagpt.merge_config.plain_yaml import weight_setting
from mergekit_metagpt.method.composed import COMPOSED
from tests.broken import snapshot
from tests.conftest import Cli
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_mergekit,
    tuned,
    write_model,
    write_yaml,
)
from tests.layouts import save_trio
from tests.merges import with_granularity
from tests.oracle import (
    GRANULARITIES,
    assert_same_states,
    naive_coefficients,
    naive_pool,
    naive_sq_norm,
    ulp,
)
from tests.processes import assert_succeeded, mergekit_yaml

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:.*token_id must be:UserWarning"),
]

Config = dict[str, Any]

# Twelve layers, so that `layers.1` is a part of `layers.10` and `layers.11`.
DEEP: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True)
class Trio:
    """A base and its fine-tunes, on disk and in memory."""

    base: Path
    models: tuple[Path, ...]
    base_state: State
    states: tuple[State, ...]

    @property
    def inputs(self) -> list[State]:
        return [self.base_state, *self.states]

    def config(self, **settings: Any) -> Config:
        return merge_config(self.base, self.models, **settings)

    def cut(self, *ranges: tuple[int, int]) -> list[Config]:
        """Slices of all models, layers in place if the ranges follow each other."""
        return [
            {
                "sources": [
                    {"model": str(folder), "layer_range": list(layers)}
                    for folder in (self.base, *self.models)
                ]
            }
            for layers in ranges
        ]

    @cached_property
    def sq_norms(self) -> dict[str, list[float]]:
        """n_t of every tensor, in float64."""
        return {
            name: [naive_sq_norm(tensor, state[name]) for state in self.states]
            for name, tensor in self.base_state.items()
        }

    def lambdas(
        self,
        name: str,
        *,
        granularity: str = "model",
        exclude: Sequence[str] = (),
        weight: Sequence[float] | None = None,
        power: float = 2.0,
    ) -> Any:
        """The coefficients of a tensor, straight from the formula, to compare with."""
        pool = naive_pool(name, granularity)
        counted = [
            norms
            for other, norms in self.sq_norms.items()
            if naive_pool(other, granularity) == pool
            and not any(part in other for part in exclude)
        ]
        if not counted:
            power = 0.0
            counted = [[1.0] * len(self.states)]
        sums = torch.tensor(counted, dtype=torch.float64).sum(dim=0)
        lambdas = naive_coefficients(sums, weight, power)
        return pytest.approx(lambdas.tolist(), rel=1e-9)

    def only(self, *numbers: int) -> Trio:
        """The base with some of the models."""
        return Trio(
            self.base,
            tuple(self.models[k] for k in numbers),
            self.base_state,
            tuple(self.states[k] for k in numbers),
        )


def uneven(state: State, seed: int) -> State:
    """A fine-tune that moves every tensor by another distance."""
    sizes = random.Random(seed)
    return {
        name: tuned({name: tensor}, seed + n, sizes.uniform(0.002, 0.03))[name]
        for n, (name, tensor) in enumerate(state.items())
    }


def write_trio(
    folder: Path, dtype: torch.dtype = torch.float32, count: int = 3, **sizes: Any
) -> Trio:
    whole = llama_state(**sizes)
    states = [whole, *(uneven(whole, 100 * (k + 1)) for k in range(count))]
    base, *models = (cast(state, dtype) for state in states)
    config = llama_config(**sizes)
    return Trio(
        write_model(folder / "base", base, config),
        tuple(
            write_model(folder / f"tuned{k}", state, config)
            for k, state in enumerate(models)
        ),
        base,
        tuple(models),
    )


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return write_trio(tmp_path_factory.mktemp("deep"), **DEEP)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Stored in bfloat16."""
    return write_trio(tmp_path_factory.mktemp("small"), torch.bfloat16)


@dataclass(frozen=True)
class Plain:
    """What `export` wrote, and what it said on stderr."""

    text: str
    said: str

    @cached_property
    def config(self) -> Config:
        return yaml.safe_load(self.text)

    @property
    def comment(self) -> str:
        lines = [line for line in self.text.splitlines() if line.startswith("#")]
        return " ".join(line.removeprefix("#").strip() for line in lines)


Export = Callable[..., Plain]


@pytest.fixture
def export(tmp_path: Path, cli: Cli) -> Export:
    """Export a configuration through the command line."""
    numbers = itertools.count()

    def exported(config: Config, *options: str) -> Plain:
        file = write_yaml(tmp_path / f"given{next(numbers)}.yml", config)
        target = file.with_suffix(".plain.yml")
        printed = cli("export", file, target, *options)
        assert printed.out == ""
        *differences, wrote = printed.err.splitlines(keepends=True)
        assert wrote.startswith(f"Wrote {target} (")
        plain = Plain(target.read_text(), "".join(differences))
        body = "\n".join(
            line for line in plain.text.splitlines() if not line.startswith("#")
        )
        assert "metagpt" not in re.sub(r"model: .*", "", body)
        return plain

    return exported


def weight_of(setting: Any, name: str) -> float:
    """What mergekit itself resolves a setting to."""
    if isinstance(setting, list):
        setting = [ConditionalParameter(**entry) for entry in setting]
    return evaluate_setting(name, setting, validate=float)


def weights(entries: Sequence[Config], name: str) -> list[float]:
    """The weight of each entry's model on a tensor."""
    return [
        weight_of(entry["parameters"]["weight"], name)
        for entry in entries
        if "parameters" in entry
    ]


def assert_one_ulp(ours: State, plain: State, inputs: Sequence[State]) -> None:
    """Check two merges to one unit in the last place of the result and each operand.

    The result's is that of its dtype, those of the operands are of the precision in
    which both merges compute, at the size of the largest task vector.
    """
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        other = plain[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        wide = torch.promote_types(tensor.dtype, torch.float32)
        base, *tuned_ones = (state[name].double().abs() for state in inputs)
        largest = base + reduce(torch.maximum, tuned_ones)
        result = torch.maximum(tensor.double().abs(), other.double().abs())
        bound = ulp(result, tensor.dtype) + len(inputs) * ulp(largest, wide)
        excess = (tensor.double() - other.double()).abs() - bound
        assert excess.max() <= 0, (name, float(excess.max()))


def moved(state: State, layers: Sequence[int]) -> State:
    """A model made of these layers of a Llama, in this order."""
    found = {name: t for name, t in state.items() if ".layers." not in name}
    for number, layer in enumerate(layers):
        start = f"model.layers.{layer}."
        found |= {
            f"model.layers.{number}.{name.removeprefix(start)}": tensor
            for name, tensor in state.items()
            if name.startswith(start)
        }
    return found


def assert_same_merge(
    config: Config, plain: Plain, inputs: Sequence[State], out: Path
) -> State:
    """Merge both, and compare; return what the plain one gives."""
    ours = run_mergekit(config, out / "ours")
    theirs = run_mergekit(plain.config, out / "theirs")
    assert_one_ulp(ours, theirs, inputs)
    return theirs


# --- every tensor gets its coefficient ------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_tensor_of_twelve_layers_has_its_coefficient(
    granularity: str, deep: Trio, export: Export, tmp_path: Path
) -> None:
    config = with_granularity(deep.config(), granularity)
    plain = export(config)
    found = {}
    for name in deep.base_state:
        found[name] = weights(plain.config["models"], name)
        assert found[name] == deep.lambdas(name, granularity=granularity), name
    distinct = {"model": 1, "layer": 15, "tensor": len(deep.base_state)}
    assert len({tuple(v) for v in found.values()}) == distinct[granularity]
    assert plain.config["merge_method"] == "task_arithmetic"
    assert "parameters" not in plain.config
    assert_same_merge(config, plain, deep.inputs, tmp_path)


def test_with_the_plugin_switched_off(
    small: Trio, export: Export, tmp_path: Path
) -> None:
    config = with_granularity(small.config(), "layer")
    plain = export(config)
    off = {"MERGEKIT_METAGPT_AUTOLOAD": "0"}
    done = mergekit_yaml(plain.config, tmp_path / "theirs", "--quiet", **off)
    assert_succeeded(done)
    assert "metagpt" not in done.stderr.replace(str(tmp_path), "")
    ours = run_mergekit(config, tmp_path / "ours")
    theirs = read_model(tmp_path / "theirs")
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    assert_one_ulp(ours, theirs, small.inputs)


def test_slices_have_weights_of_their_own(
    deep: Trio, export: Export, tmp_path: Path
) -> None:
    """Other models in either slice, and a slice's own parameters."""
    slices = deep.cut((0, 2), (2, 12))
    del slices[0]["sources"][3], slices[1]["sources"][1]
    slices[1]["parameters"] = {"power": 1.0}
    slices[1]["sources"][1]["parameters"] = {"weight": 3.0}
    config = deep.config(slices=slices)
    plain = export(config)
    first, second = (cut["sources"] for cut in plain.config["slices"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights(first, name) == deep.only(0, 1).lambdas(name)
    other = deep.only(1, 2).lambdas(name, weight=[3.0, 1.0], power=1.0)
    assert weights(second, name) == other
    assert all("parameters" not in cut for cut in plain.config["slices"])
    assert_same_merge(config, plain, deep.inputs, tmp_path)


@pytest.mark.parametrize("fewer", [0, 1])
def test_slices_of_different_numbers_of_models(
    fewer: int, deep: Trio, export: Export, tmp_path: Path
) -> None:
    slices = deep.cut((0, 2), (2, 12))
    del slices[fewer]["sources"][3]
    config = deep.config(slices=slices)
    assert_same_merge(config, export(config), deep.inputs, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_slices_in_all_granularities(
    granularity: str, deep: Trio, export: Export, tmp_path: Path
) -> None:
    """Layers stay in place, but under `model` and `tensor` some come twice."""
    ranges = [(0, 7), (7, 12)] if granularity == "layer" else [(0, 7), (4, 12)]
    config = with_granularity(deep.config(slices=deep.cut(*ranges)), granularity)
    plain = export(config)
    for cut, (start, end) in zip(plain.config["slices"], ranges, strict=True):
        for name in deep.base_state:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and start <= int(layer[1]) < end:
                found = weights(cut["sources"], name)
                assert found == deep.lambdas(name, granularity=granularity), name
    layers = [n for start, end in ranges for n in range(start, end)]
    inputs = [moved(state, layers) for state in deep.inputs]
    assert_same_merge(config, plain, inputs, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_vision_language_model(
    granularity: str,
    tmp_path_factory: pytest.TempPathFactory,
    export: Export,
    tmp_path: Path,
) -> None:
    """Two modules, both of which have layers of the same numbers."""
    base, *models = save_trio(tmp_path_factory.mktemp("vl"), "Qwen2.5-VL").folders[True]
    states = [read_model(folder) for folder in (base, *models)]
    vl = Trio(base, tuple(models), states[0], tuple(states[1:]))
    config = with_granularity(vl.config(), granularity)
    plain = export(config)
    for name in states[0]:
        found = weights(plain.config["models"], name)
        assert found == vl.lambdas(name, granularity=granularity), name
    theirs = assert_same_merge(config, plain, states, tmp_path)
    assert {name.split(".")[0] for name in theirs} >= {"visual", "model"}


def test_all_parameters(deep: Trio, export: Export, tmp_path: Path) -> None:
    given = {"granularity": "layer", "power": 1.5}
    exclude = ["embed_tokens", "lm_head"]
    config = deep.config(
        parameters={**given, "lambda": 0.6, "exclude": ", ".join(exclude)}
    )
    importance = [2.0, 0.0, 0.5]
    for entry, value in zip(config["models"], importance, strict=True):
        entry["parameters"] = {"weight": value}
    plain = export(config)
    for name in deep.base_state:
        expected = deep.lambdas(name, exclude=exclude, weight=importance, **given)
        assert weights(plain.config["models"], name) == expected, name
    assert plain.config["parameters"] == {"lambda": 0.6}
    norms = [f"w_{k} ||theta_{k} - theta_0||^1.5" for k in "tk"]
    assert f"lambda_t = {norms[0]} / sum_k {norms[1]}, measured" in plain.comment
    assert "of metagpt: exclude, granularity, power, weight." in plain.comment
    assert_same_merge(config, plain, deep.inputs, tmp_path)


def test_filters_and_gradients(deep: Trio, export: Export, tmp_path: Path) -> None:
    """Another granularity, importance and scale for every tensor."""
    filters = [{"filter": "mlp", "value": "tensor"}, {"value": "model"}]
    config = deep.config(parameters={"granularity": filters, "lambda": [1.0, 0.5]})
    config["models"][0]["parameters"] = {"weight": [1.0, 3.0]}
    plain = export(config)
    assert plain.config["parameters"] == {"lambda": [1.0, 0.5]}
    for part, granularity in (("mlp.up_proj", "tensor"), ("self_attn.q_proj", "model")):
        name = f"model.layers.11.{part}.weight"
        expected = deep.lambdas(name, granularity=granularity, weight=[3.0, 1.0, 1.0])
        assert weights(plain.config["models"], name) == expected
    assert_same_merge(config, plain, deep.inputs, tmp_path)


def test_the_base_among_the_models_and_a_model_that_is_the_base(
    deep: Trio, export: Export, tmp_path: Path
) -> None:
    copy = write_model(tmp_path / "copy", deep.base_state, llama_config(**DEEP))
    config = merge_config(deep.base, [deep.base, deep.models[0], copy])
    plain = export(config)
    assert plain.config["models"] == [
        {"model": str(deep.base)},
        {"model": str(deep.models[0]), "parameters": {"weight": 1.0}},
        {"model": str(copy), "parameters": {"weight": 0.0}},
    ]
    assert_same_merge(config, plain, [deep.base_state, deep.states[0]], tmp_path)


# --- mergekit's filters ---------------------------------------------------------------

LAYERS = [f"model.layers.{n}.{part}" for n in (1, 10, 11, 2) for part in ("w", "b")]
NAMES: dict[str, list[str]] = {
    "layers of one and two digits": LAYERS,
    "a layer within a longer path": [*LAYERS, *(f"vision.{n}" for n in LAYERS)],
    "names that end another name": ["norm.weight", "model.norm.weight", "h.0.norm"],
    "names that begin another name": ["lm_head", "lm_head.weight", "lm_head.weight_g"],
    "a name that a layer is part of": ["h.1.w", "x.h.1.w", "h.1", "h.11"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_filters_catch_no_other_name(names: list[str]) -> None:
    chance = random.Random(0)
    for _ in range(100):
        choices = [chance.random() for _ in range(chance.randint(1, 4))]
        of_layer: dict[str, float] = {}
        by_layer, by_name = {}, {}
        for name in names:
            layer = re.sub(r"(\d)\..*", r"\1", name)
            by_layer[name] = of_layer.setdefault(layer, chance.choice(choices))
            by_name[name] = chance.choice(choices)
        for values in (by_layer, by_name):
            written = weight_setting(values)
            assert {name: weight_of(written, name) for name in names} == values


def test_a_layer_is_one_filter_and_equal_values_are_a_number() -> None:
    assert weight_setting(dict.fromkeys(LAYERS, 0.25)) == 0.25
    written = weight_setting({name: float(name.split(".")[2]) for name in LAYERS})
    assert isinstance(written, list) and len(written) == 4
    filters = [entry.get("filter") for entry in written]
    assert filters[:2] == ["model.layers.10.", "model.layers.11."]


# --- composed methods -----------------------------------------------------------------

SETTINGS: Config = {
    "density": 0.6,
    "gamma": 0.05,
    "epsilon": 0.2,
    "lambda": 0.7,
    "int8_mask": True,
    "normalize": False,
    "rescale": True,
}
# Every method, and every granularity more than once.
CASES = list(zip(COMPOSED, itertools.cycle(GRANULARITIES)))


@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_composed_methods_keep_every_bit(
    method: str, granularity: str, small: Trio, export: Export, tmp_path: Path
) -> None:
    known = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    settings = {name: value for name, value in SETTINGS.items() if name in known}
    config = small.config(
        merge_method=f"metagpt_{method}",
        parameters={**settings, "granularity": granularity, "power": 1.0},
        dtype="float32",
        out_dtype="bfloat16",
    )
    config["models"][1]["parameters"] = {"weight": 2.0, "density": 0.7}
    plain = export(config)
    assert plain.config["merge_method"] == method
    assert plain.config["parameters"] == settings
    assert (plain.config["dtype"], plain.config["out_dtype"]) == ("float32", "bfloat16")
    given = [entry["parameters"] for entry in plain.config["models"]]
    assert [parameters.get("density") for parameters in given] == [None, 0.7, None]
    assert plain.said == ""
    seed = ("--random-seed", "20")
    ours = run_mergekit(config, tmp_path / "ours", *seed)
    theirs = run_mergekit(plain.config, tmp_path / "theirs", *seed)
    assert_same_states(ours, theirs)


def test_composed_methods_keep_an_absent_dtype(
    small: Trio, export: Export, tmp_path: Path
) -> None:
    config = small.config(merge_method="metagpt_ties", parameters={"density": 0.5})
    plain = export(config)
    assert not {"dtype", "out_dtype"} & plain.config.keys()
    ours = run_mergekit(config, tmp_path / "ours")
    assert_same_states(ours, run_mergekit(plain.config, tmp_path / "theirs"))


# --- precision ------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("stored", "given", "written"),
    [
        (BF16, {}, ("float32", "bfloat16")),
        (F32, {}, ("float32", "float32")),
        (F64, {}, ("float64", "float64")),
        (F16, {"dtype": "float16"}, ("float32", "float16")),
        (F32, {"dtype": "float64"}, ("float64", "float64")),
        (BF16, {"dtype": "float32", "out_dtype": "float16"}, ("float32", "float16")),
    ],
)
def test_precision(
    stored: torch.dtype,
    given: Config,
    written: tuple[str, str],
    export: Export,
    tmp_path: Path,
) -> None:
    trio = write_trio(tmp_path, stored, count=2, num_hidden_layers=1)
    config = trio.config(**given)
    plain = export(config)
    assert (plain.config["dtype"], plain.config["out_dtype"]) == written
    assert plain.said == ""
    assert_same_merge(config, plain, trio.inputs, tmp_path)


def test_an_output_finer_than_the_merge_is_named(
    small: Trio, export: Export, tmp_path: Path
) -> None:
    config = small.config(dtype="bfloat16", out_dtype="float32")
    plain = export(config)
    ours = run_mergekit(config, tmp_path / "ours")
    theirs = run_mergekit(plain.config, tmp_path / "theirs")
    if any((tensor - theirs[n]).abs().max() > 1e-6 for n, tensor in ours.items()):
        assert "Differs from metagpt" in plain.said and plain.said.strip() in (
            plain.comment
        )


def test_stored_precisions_that_differ_are_named(
    export: Export, tmp_path: Path
) -> None:
    whole = llama_state()
    *mixed, last = whole, uneven(whole, 1), uneven(whole, 2)
    states = [
        {n: t.to(F32 if "norm" in n else BF16) for n, t in state.items()}
        for state in mixed
    ]
    states.append(cast(last, BF16))
    base, *models = (
        write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)
    )
    config = merge_config(base, models)
    plain = export(config)
    elements = Counter[torch.dtype]()
    for name, tensor in states[0].items():
        dtype = reduce(torch.promote_types, (state[name].dtype for state in states))
        elements[dtype] += tensor.numel()
    assert elements[BF16] > elements[F32] > 0
    assert plain.config["out_dtype"] == "bfloat16"
    norms = [name for name in whole if "norm" in name]
    change = (
        "stored precisions differ: all tensors come out as bfloat16, which most "
        f"elements have; metagpt keeps {len(norms)} others, such as "
    )
    (line,) = plain.said.splitlines()
    assert line.startswith(f"Differs from metagpt: {change}")
    assert re.search(r"such as \S*norm\S* as float32\.$", line)
    assert line in plain.text.replace("# ", "")
    ours = run_mergekit(config, tmp_path / "ours")
    theirs = run_mergekit(plain.config, tmp_path / "theirs")
    assert {name for name in ours if ours[name].dtype != theirs[name].dtype} == {*norms}
    assert_one_ulp(cast(ours, BF16), theirs, states)


def test_inputs_that_metagpt_would_round_first_are_named(
    export: Export, tmp_path: Path
) -> None:
    trio = write_trio(tmp_path, F32, count=2, num_hidden_layers=1)
    plain = export(trio.config(dtype="bfloat16"))
    assert plain.said == (
        "Differs from metagpt: metagpt rounds inputs to bfloat16 before it merges; "
        "here those stored as float32 are merged as they are.\n"
    )
    assert plain.said.strip() in plain.comment


# --- what is written ------------------------------------------------------------------

EXACT = """\
# metagpt as plain mergekit, by mergekit-metagpt VERSION.
# Each weight is a coefficient of MetaGPT (https://arxiv.org/abs/2406.11385),
# lambda_t = ||theta_t - theta_0||^2 / sum_k ||theta_k - theta_0||^2, measured on
#   ./m/tuned0 (SHA-256 of samples: DIGEST)
#   ./m/tuned1 (SHA-256 of samples: DIGEST)
#   ./m/base (SHA-256 of samples: DIGEST)
merge_method: task_arithmetic
base_model: ./m/base
models:
- model: ./m/tuned0
  parameters:
    weight: 0.25
- model: ./m/tuned1
  parameters:
    weight: 0.75
dtype: float32
chat_template: chatml
out_dtype: float32
"""


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with models of squared norms 1 and 3, and `merge.yml`."""
    work = tmp_path / "work"
    base = llama_state(num_hidden_layers=1)
    for name, steps in (("base", 0), ("tuned0", 1), ("tuned1", 3)):
        state = {n: t.clone() for n, t in base.items()}
        state["model.norm.weight"][:steps] += 1
        write_model(work / "m" / name, state, llama_config(num_hidden_layers=1))
    config = merge_config("m/base", ["m/tuned0", "m/tuned1"])
    config |= {"chat_template": "chatml", "dtype": "float32"}
    write_yaml(work / "merge.yml", config)
    monkeypatch.chdir(work)
    return work


def test_exact_output(inside: Path, cli: Cli) -> None:
    printed = cli("export", "merge.yml", "-")
    text = re.sub(r"(?m)(?<=mergekit-metagpt )\d\S*(?=\.$)", "VERSION", printed.out)
    assert re.sub(r"samples: [0-9a-f]{16}\)", "samples: DIGEST)", text) == EXACT
    assert printed.err == "It needs no plugin: mergekit-yaml OUT.yml ./merged\n"

    wrote = cli("export", "merge.yml", "plain.yml")
    assert Path("plain.yml").read_text() == printed.out
    assert wrote.out == ""
    then = printed.err.replace("OUT", "plain")
    size = f"{len(printed.out.encode()):,} bytes"
    assert wrote.err == f"Wrote plain.yml ({size}). {then}"


def test_nothing_is_merged_and_no_model_is_loaded(
    inside: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit.merge

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not to be called")

    monkeypatch.setattr(mergekit.merge, "run_merge", fail)
    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    before = snapshot(inside)
    cli("export", "merge.yml", "plain.yml")
    assert snapshot(inside).keys() - before.keys() == {"plain.yml"}


def test_a_file_that_exists_is_kept_without_force(inside: Path, cli: Cli) -> None:
    Path("plain.yml").write_text("precious")
    said = cli.refused("export", "merge.yml", "plain.yml")
    assert "plain.yml exists" in said and "--force" in said
    assert Path("plain.yml").read_text() == "precious"
    assert "is what" in cli.refused("export", "merge.yml", "./merge.yml", "--force")
    cli("export", "merge.yml", "plain.yml", "--force")
    assert yaml.safe_load(Path("plain.yml").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("out", ["m", "there/plain.yml"])
def test_a_place_that_cannot_be_written(out: str, inside: Path, cli: Cli) -> None:
    before = snapshot(inside)
    said = cli.refused("export", "merge.yml", out)
    assert f"{out} is a folder" in said or f"{out} cannot be written: there is" in said
    assert snapshot(inside) == before
