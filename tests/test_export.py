"""`export`: the plain YAML merges, without the plugin, to what metagpt merges to."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tests import broken
from tests.broken import snapshot
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    tuned,
    write_model,
)
from tests.layouts import save_trio
from tests.merges import with_granularity
from tests.oracle import (
    GRANULARITIES,
    assert_same_bits,
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
    ) -> list[float]:
        """The coefficients of a tensor, straight from the formula."""
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
        return naive_coefficients(sums, weight, power).tolist()

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
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Export a configuration through the command line."""
    numbers = itertools.count()

    def exported(config: Config, *options: str) -> Plain:
        file = tmp_path / f"given{next(numbers)}.yml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        target = file.with_suffix(".plain.yml")
        capsys.readouterr()
        status = run_command("export", file, target, *options)
        said = capsys.readouterr()
        assert (status, said.out) == (0, ""), said.err
        *differences, wrote = said.err.splitlines(keepends=True)
        assert wrote.startswith(f"Wrote {target} (")
        plain = Plain(target.read_text(), "".join(differences))
        body = "\n".join(
            line for line in plain.text.splitlines() if not line.startswith("#")
        )
        assert "metagpt" not in re.sub(r"model: .*", "", body)
        return plain

    return exported


def weight_of(setting: Any, name: str) -> float:
    """What mergekit makes of a setting: the first filter that is in the name."""
    if not isinstance(setting, list):
        return setting
    return next(
        entry["value"]
        for entry in setting
        if entry.get("filter") is None or entry["filter"] in name
    )


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
        expected = deep.lambdas(name, granularity=granularity)
        assert found[name] == pytest.approx(expected, rel=1e-9), name
    distinct = {"model": 1, "layer": 15, "tensor": len(deep.base_state)}
    assert len({tuple(v) for v in found.values()}) == distinct[granularity]
    assert plain.config["merge_method"] == "task_arithmetic"
    assert "parameters" not in plain.config
    assert_same_merge(config, plain, [deep.base_state, *deep.states], tmp_path)


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
    inputs = [small.base_state, *small.states]
    theirs = read_model(tmp_path / "theirs")
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    assert_one_ulp(ours, theirs, inputs)


def test_slices_have_weights_of_their_own(
    deep: Trio, export: Export, tmp_path: Path
) -> None:
    """Other models in either slice, and a slice's own parameters."""
    slices = deep.cut((0, 2), (2, 12))
    del slices[0]["sources"][3], slices[1]["sources"][1]
    slices[1]["parameters"] = {"power": 1.0}
    slices[1]["sources"][1]["parameters"] = {"weight": 3.0}
    config = merge_config(deep.base, deep.models, slices=slices)
    plain = export(config)
    first, second = (cut["sources"] for cut in plain.config["slices"])
    name = "model.layers.0.mlp.up_proj.weight"
    two = deep.only(0, 1).lambdas(name)
    assert weights(first, name) == pytest.approx(two, rel=1e-9)
    other = deep.only(1, 2).lambdas(name, weight=[3.0, 1.0], power=1.0)
    assert weights(second, name) == pytest.approx(other, rel=1e-9)
    assert all("parameters" not in cut for cut in plain.config["slices"])
    assert_same_merge(config, plain, [deep.base_state, *deep.states], tmp_path)


@pytest.mark.parametrize("fewer", [0, 1])
def test_slices_of_different_numbers_of_models(
    fewer: int, deep: Trio, export: Export, tmp_path: Path
) -> None:
    slices = deep.cut((0, 2), (2, 12))
    del slices[fewer]["sources"][3]
    config = merge_config(deep.base, deep.models, slices=slices)
    run_mergekit(config, tmp_path / "mergekit-can")
    plain = export(config)
    inputs = [deep.base_state, *deep.states]
    assert_same_merge(config, plain, inputs, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_slices_in_all_granularities(
    granularity: str, deep: Trio, export: Export, tmp_path: Path
) -> None:
    """Layers stay in place, but under `model` and `tensor` some come twice."""
    ranges = [(0, 7), (7, 12)] if granularity == "layer" else [(0, 7), (4, 12)]
    slices = deep.cut(*ranges)
    config = merge_config(deep.base, deep.models, slices=slices)
    config = with_granularity(config, granularity)
    plain = export(config)
    for cut, (start, end) in zip(plain.config["slices"], ranges, strict=True):
        for name in deep.base_state:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and start <= int(layer[1]) < end:
                expected = deep.lambdas(name, granularity=granularity)
                found = weights(cut["sources"], name)
                assert found == pytest.approx(expected, rel=1e-9), name
    inputs = [
        moved(state, [n for start, end in ranges for n in range(start, end)])
        for state in (deep.base_state, *deep.states)
    ]
    assert_same_merge(config, plain, inputs, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_vision_language_model(
    granularity: str,
    tmp_path_factory: pytest.TempPathFactory,
    export: Export,
    tmp_path: Path,
) -> None:
    """Two modules, both of which have layers of the same numbers."""
    trio = save_trio(tmp_path_factory.mktemp("vl"), "Qwen2.5-VL")
    folders = trio.folders[True]
    states = [read_model(folder) for folder in folders]
    config = with_granularity(merge_config(folders[0], folders[1:]), granularity)
    plain = export(config)
    oracle = Trio(folders[0], folders[1:], states[0], tuple(states[1:]))
    for name in states[0]:
        expected = oracle.lambdas(name, granularity=granularity)
        found = weights(plain.config["models"], name)
        assert found == pytest.approx(expected, rel=1e-9), name
    theirs = assert_same_merge(config, plain, states, tmp_path)
    assert {name.split(".")[0] for name in theirs} >= {"visual", "model"}


def test_all_parameters(deep: Trio, export: Export, tmp_path: Path) -> None:
    config = deep.config(
        parameters={
            "granularity": "layer",
            "power": 1.5,
            "lambda": 0.6,
            "exclude": "embed_tokens, lm_head",
        }
    )
    importance = [2.0, 0.0, 0.5]
    for entry, value in zip(config["models"], importance, strict=True):
        entry["parameters"] = {"weight": value}
    plain = export(config)
    chosen: dict[str, Any] = {
        "granularity": "layer",
        "power": 1.5,
        "exclude": ["embed_tokens", "lm_head"],
        "weight": importance,
    }
    for name in deep.base_state:
        found = weights(plain.config["models"], name)
        assert found == pytest.approx(deep.lambdas(name, **chosen), rel=1e-9), name
    assert plain.config["parameters"] == {"lambda": 0.6}
    norms = [f"w_{k} ||theta_{k} - theta_0||^1.5" for k in "tk"]
    assert f"lambda_t = {norms[0]} / sum_k {norms[1]}, measured" in plain.comment
    assert "with parameters of metagpt: exclude, granularity, power, weight." in (
        plain.comment
    )
    assert_same_merge(config, plain, [deep.base_state, *deep.states], tmp_path)


def test_filters_and_gradients(deep: Trio, export: Export, tmp_path: Path) -> None:
    """Another granularity, importance and scale for every tensor."""
    config = deep.config(
        parameters={
            "granularity": [{"filter": "mlp", "value": "tensor"}, {"value": "model"}],
            "lambda": [1.0, 0.5],
        }
    )
    config["models"][0]["parameters"] = {"weight": [1.0, 3.0]}
    plain = export(config)
    assert plain.config["parameters"] == {"lambda": [1.0, 0.5]}
    name = "model.layers.11.mlp.up_proj.weight"
    expected = deep.lambdas(name, granularity="tensor", weight=[3.0, 1.0, 1.0])
    assert weights(plain.config["models"], name) == pytest.approx(expected, rel=1e-9)
    name = "model.layers.11.self_attn.q_proj.weight"
    expected = deep.lambdas(name, weight=[3.0, 1.0, 1.0])
    assert weights(plain.config["models"], name) == pytest.approx(expected, rel=1e-9)
    assert_same_merge(config, plain, [deep.base_state, *deep.states], tmp_path)


def test_the_base_among_the_models_and_a_model_that_is_the_base(
    deep: Trio, export: Export, tmp_path: Path
) -> None:
    copy = write_model(tmp_path / "copy", deep.base_state, llama_config(**DEEP))
    config = merge_config(deep.base, [deep.base, deep.models[0], copy])
    plain = export(config)
    entries = plain.config["models"]
    assert [entry["model"] for entry in entries] == [
        str(deep.base),
        str(deep.models[0]),
        str(copy),
    ]
    assert [entry.get("parameters") for entry in entries] == [
        None,
        {"weight": 1.0},
        {"weight": 0.0},
    ]
    assert_same_merge(config, plain, [deep.base_state, deep.states[0]], tmp_path)


# --- mergekit's filters ---------------------------------------------------------------

LAYERS = [f"model.layers.{n}.{part}" for n in (1, 10, 11, 2) for part in ("w", "b")]
NAMES: dict[str, list[str]] = {
    "layers of one and two digits": LAYERS,
    "a layer within a longer path": [
        *LAYERS,
        *(f"vision.{name}" for name in LAYERS),
    ],
    "names that end another name": ["norm.weight", "model.norm.weight", "h.0.norm"],
    "names that begin another name": ["lm_head", "lm_head.weight", "lm_head.weight_g"],
    "a name that a layer is part of": ["h.1.w", "x.h.1.w", "h.1", "h.11"],
}


def mergekits(values: Any, name: str) -> float:
    """What mergekit itself resolves a setting to."""
    if isinstance(values, list):
        values = [ConditionalParameter(**entry) for entry in values]
    return evaluate_setting(name, values, validate=float)


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
            assert {name: mergekits(written, name) for name in names} == values


def test_a_layer_is_one_filter_and_equal_values_are_a_number() -> None:
    assert weight_setting(dict.fromkeys(LAYERS, 0.25)) == 0.25
    values = {name: float(name.split(".")[2]) for name in LAYERS}
    written = weight_setting(values)
    assert isinstance(written, list)
    assert [entry.get("filter") for entry in written[:2]] == [
        "model.layers.10.",
        "model.layers.11.",
    ]
    assert len(written) == 4


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
    assert [entry["parameters"].get("density") for entry in plain.config["models"]] == [
        None,
        0.7,
        None,
    ]
    assert plain.said == ""
    seed = ("--random-seed", "20")
    ours = run_mergekit(config, tmp_path / "ours", *seed)
    theirs = run_mergekit(plain.config, tmp_path / "theirs", *seed)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_same_bits(tensor, theirs[name])


def test_composed_methods_keep_an_absent_dtype(
    small: Trio, export: Export, tmp_path: Path
) -> None:
    config = small.config(merge_method="metagpt_ties", parameters={"density": 0.5})
    plain = export(config)
    assert not {"dtype", "out_dtype"} & plain.config.keys()
    ours = run_mergekit(config, tmp_path / "ours")
    for name, tensor in run_mergekit(plain.config, tmp_path / "theirs").items():
        assert_same_bits(ours[name], tensor)


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
    assert_same_merge(config, plain, [trio.base_state, *trio.states], tmp_path)


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


def mixed(state: State) -> State:
    """Norms in float32, all else in bfloat16."""
    return {n: t.to(F32 if "norm" in n else BF16) for n, t in state.items()}


def test_stored_precisions_that_differ_are_named(
    export: Export, tmp_path: Path
) -> None:
    whole = llama_state()
    states = [mixed(whole), mixed(uneven(whole, 1)), cast(uneven(whole, 2), BF16)]
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
    config = merge_config(
        "m/base", ["m/tuned0", "m/tuned1"], chat_template="chatml", dtype="float32"
    )
    (work / "merge.yml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(work)
    return work


def test_exact_output(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("export", "merge.yml", "-") == 0
    said = capsys.readouterr()
    text = re.sub(r"mergekit-metagpt \d\S*\.$", "mergekit-metagpt VERSION.", said.out)
    text = re.sub(r"(?m)(?<=mergekit-metagpt )\d\S*(?=\.$)", "VERSION", said.out)
    text = re.sub(r"samples: [0-9a-f]{16}\)", "samples: DIGEST)", text)
    assert text == EXACT
    size = f"({len(said.out.encode()):,} bytes). It needs no plugin: mergekit-yaml"
    assert said.err == f"Wrote stdout {size} OUT.yml ./merged\n"

    assert run_command("export", "merge.yml", "plain.yml") == 0
    assert Path("plain.yml").read_text() == said.out
    wrote = f"Wrote plain.yml {size} plain.yml ./merged\n"
    assert capsys.readouterr() == ("", wrote)


def test_nothing_is_merged_and_no_model_is_loaded(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit.merge

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not to be called")

    monkeypatch.setattr(mergekit.merge, "run_merge", fail)
    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    before = snapshot(inside)
    assert run_command("export", "merge.yml", "plain.yml") == 0
    assert snapshot(inside).keys() - before.keys() == {"plain.yml"}


def test_a_file_that_exists_is_kept_without_force(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plain.yml").write_text("precious")
    assert run_command("export", "merge.yml", "plain.yml") == 2
    assert capsys.readouterr() == (
        "",
        "Error: plain.yml exists; choose another name, or --force\n",
    )
    assert Path("plain.yml").read_text() == "precious"
    assert run_command("export", "merge.yml", "plain.yml", "--force") == 0
    assert yaml.safe_load(Path("plain.yml").read_text())["dtype"] == "float32"


# --- bad input ------------------------------------------------------------------------


def under_one_model(**given: Any) -> broken.Spoil:
    """Parameters of the last model alone."""

    def spoil(folder: Path, config: dict[str, Any]) -> None:
        config["models"][-1]["parameters"] = given

    return spoil


BAD: dict[str, tuple[Any, str]] = {
    "another method": (
        broken.settings(merge_method="ties"),
        "merge.yml NEW.yml (gives metagpt_ties)",
    ),
    "a method that is not converted": (
        broken.settings(merge_method="slerp"),
        "Use mergekit-yaml for other methods",
    ),
    "no base": (broken.without("base_model"), "base_model"),
    "only the base": (broken.models("base"), "only the base"),
    "unknown granularity": (broken.parameters(granularity="block"), "granularity"),
    "all weights 0": (broken.weights(0, 0), "weight is 0"),
    "negative weight": (broken.weights(-1, 1), "tuned0 is -1"),
    "misspelt parameter": (broken.parameters(granularty="layer"), "granularity"),
    "shared parameter under a model": (under_one_model(power=1), "power stands under"),
    "NaN": (broken.poisoned("tuned1", float("nan")), broken.TENSOR),
    "infinity in the base": (broken.poisoned("base", float("inf")), broken.TENSOR),
    "quantised": (broken.rewritten("tuned0", broken.to_fp8), "quantised"),
    "bare adapter": (broken.adapter(), "--lora-merge-cache"),
    "other architecture": (broken.gpt2, "tuned1"),
    "other width": (broken.llama(hidden_size=64), "tuned1"),
    "truncated": (broken.in_file("tuned0/model.safetensors", broken.truncated), "tun"),
    "missing shard": (broken.missing_file(f"tuned0/{broken.SHARD}", 3), broken.SHARD),
    "no YAML": (broken.text("a: [b"), "merge.yml"),
    "no text": (broken.text(b"\xff\xfe\x00"), "merge.yml"),
    "layers that move, by layer": (
        broken.each(
            broken.slices(["base", "tuned0"], (1, 3)),
            broken.parameters(granularity="layer"),
        ),
        "layer",
    ),
}
BAD["adapter without a place to merge it"] = (
    broken.adapter(spelling="{dir}/base+{dir}/adapter"),
    "--lora-merge-cache",
)


def rows() -> Iterator[Any]:
    for name in BAD:
        yield pytest.param(*BAD[name], id=name)


def assert_refused(status: int, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """Check for exit status 2 and one line on stderr that holds some words."""
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.startswith("Error: ") and len(said.err.splitlines()) == 1, said.err
    assert part in said.err


@pytest.mark.parametrize(("spoil", "part"), list(rows()))
def test_bad_input_is_one_line_and_nothing_is_created(
    spoil: broken.Spoil,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = broken.write_good(tmp_path)
    content = spoil(tmp_path, config)
    content = yaml.safe_dump(config) if content is None else content
    content = content.encode() if isinstance(content, str) else content
    Path("merge.yml").write_bytes(content)
    before: Mapping[str, Any] = snapshot(tmp_path)
    capsys.readouterr()
    status = run_command("export", "merge.yml", "plain.yml")
    assert_refused(status, capsys, part)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["missing.yml", "plain.yml"], "missing.yml"),
        (["m", "plain.yml"], "m is a folder; expected a merge YAML"),
        (["merge.yml", "m"], "m cannot be written"),
        (["merge.yml", "there/plain.yml"], "there/plain.yml cannot be written"),
    ],
)
def test_bad_places(
    arguments: list[str],
    part: str,
    inside: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(inside)
    status = run_command("export", *arguments)
    assert_refused(status, capsys, part)
    assert snapshot(inside) == before
