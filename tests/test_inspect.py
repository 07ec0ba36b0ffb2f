"""`inspect`: every figure against float64, every stream and refusal as promised."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import PEFT_WARNS, naive_adapted, write_adapters
from tests.broken import snapshot
from tests.conftest import Cli
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    run_command,
    tuned,
    write_model,
    write_yaml,
)
from tests.oracle import (
    coarser,
    common_part,
    naive_coefficients,
    naive_pool,
    naive_sq_norm,
)
from tests.processes import environment, script

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Report = dict[str, Any]
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SMALL: dict[str, Any] = {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


Shown = Callable[..., str]
Inspect = Callable[..., Report]


@pytest.fixture
def shown(cli: Cli) -> Shown:
    """What `inspect` prints; what goes to stderr is said."""

    def inspected(*arguments: str | Path, says: str = "") -> str:
        printed = cli("inspect", *arguments)
        assert printed.err == says
        return printed.out

    return inspected


@pytest.fixture
def inspect(shown: Shown) -> Inspect:
    """The report of `inspect ... --json -`."""

    def inspected(*arguments: str | Path, says: str = "") -> Report:
        text = shown(*arguments, "--json", "-", says=says)
        return json.loads(text, parse_constant=pytest.fail)

    return inspected


def only(report: Report) -> Report:
    """The one family of a report."""
    (family,) = report["families"]
    return family


def warned(report: Report, part: str) -> list[str]:
    return [line for line in only(report)["warnings"] if part in line]


# --- a naive oracle -------------------------------------------------------------------

# By a word in the names of a Llama's tensors.
PARTS = {
    "embed_tokens": "embeddings",
    "lm_head": "head",
    "norm": "norms",
    "self_attn": "attention",
    "mlp": "mlp",
}


def tau(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """model - base at the coarser of the two stored precisions, in float64."""
    dtype = coarser(base.dtype, model.dtype)
    return model.to(dtype).double() - base.to(dtype).double()


def size(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


@dataclass(frozen=True)
class Naive:
    """Everything that `inspect` measures, from whole state dicts of equal shapes."""

    base: State
    models: tuple[State, ...]
    exclude: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [n for n in self.base if not any(part in n for part in self.exclude)]

    def sq_norms(self, names: Sequence[str]) -> list[float]:
        return [
            sum(naive_sq_norm(self.base[n], model[n]) for n in names)
            for model in self.models
        ]

    def lambdas(
        self,
        names: Sequence[str],
        weight: Sequence[float] | None = None,
        power: float = 2.0,
    ) -> list[float]:
        sq_norms = torch.tensor(self.sq_norms(names), dtype=F64)
        return naive_coefficients(sq_norms, weight, power).tolist()

    def relative(self, names: Sequence[str]) -> list[float]:
        whole = sum(size(self.base[n]) for n in names)
        return [math.sqrt(value / whole) for value in self.sq_norms(names)]

    def cosines(self, names: Sequence[str]) -> list[list[float]]:
        flat = [
            torch.cat([tau(self.base[n], model[n]).flatten() for n in names])
            for model in self.models
        ]
        return [[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat]

    def parts(self, names: Sequence[str]) -> list[dict[str, float]]:
        found = []
        for whole, model in zip(self.sq_norms(names), self.models, strict=True):
            shares = dict.fromkeys([*PARTS.values(), "other"], 0.0)
            for name in names:
                part = next(part for word, part in PARTS.items() if word in name)
                shares[part] += naive_sq_norm(self.base[name], model[name]) / whole
            found.append(shares)
        return found


def near(values: Any) -> Any:
    return pytest.approx(values, rel=1e-9, abs=1e-12)


@dataclass(frozen=True)
class Trio:
    """A float32 base and models in float32, bfloat16 and both."""

    folders: tuple[Path, ...]
    states: tuple[State, ...]

    @property
    def naive(self) -> Naive:
        return Naive(self.states[0], self.states[1:])

    def config(self, **settings: Any) -> dict[str, Any]:
        return merge_config(self.folders[0], self.folders[1:], **settings)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp("mixed")
    base = llama_state()
    shared = tuned(base, 9, 0.01)
    first = tuned(base, 1, 0.02)
    second = {n: t + (shared[n] - base[n]) for n, t in tuned(base, 2, 0.005).items()}
    third = {n: t + (shared[n] - base[n]) for n, t in tuned(base, 3, 0.01).items()}
    states = (
        base,
        first,
        cast(second, BF16),
        {n: t.to(BF16 if "mlp" in n else F32) for n, t in third.items()},
    )
    folders = tuple(
        write_model(folder / f"m{k}", state, shards=1 + k % 2)
        for k, state in enumerate(states)
    )
    return Trio(folders, states)


# --- the figures ----------------------------------------------------------------------


def test_every_figure_of_a_mixed_family(trio: Trio, inspect: Inspect) -> None:
    report = inspect("--base", *trio.folders)
    family, naive = only(report), trio.naive
    names = naive.names
    assert (report["schema_version"], report["method"]) == (3, "metagpt")
    defaults = {"granularity": "model", "power": 2.0, "exclude": []}
    assert defaults.items() <= family["settings"].items()

    base = family["base"]
    assert base["name"] == str(trio.folders[0])
    assert base["norm"] == near(math.sqrt(sum(map(size, trio.states[0].values()))))
    for stored, state in zip((base, *family["models"]), trio.states, strict=True):
        tensors = state.values()
        precisions: dict[str, int] = {}
        for tensor in tensors:
            name = str(tensor.dtype).removeprefix("torch.")
            precisions[name] = precisions.get(name, 0) + tensor.numel()
        assert stored["precisions"] == precisions
        assert stored["parameters"] == sum(tensor.numel() for tensor in tensors)
        assert stored["bytes"] == sum(t.numel() * t.itemsize for t in tensors)
        assert stored["not_written"]["count"] == 0

    sq_norms, lambdas = naive.sq_norms(names), naive.lambdas(names)
    for k, model in enumerate(family["models"]):
        assert model["name"] == str(trio.folders[k + 1])
        assert model["sq_norm"] == near(sq_norms[k])
        assert model["norm"] == near(math.sqrt(sq_norms[k]))
        assert model["relative_norm"] == near(naive.relative(names)[k])
        assert model["coefficient"] == near(lambdas[k])
        assert model["coefficient_range"] == near([lambdas[k]] * 2)
        assert model["parts"] == near(naive.parts(names)[k])
        assert sum(model["parts"].values()) == pytest.approx(1)
        assert (model["weight"], model["weight_by_hand"]) == (1.0, None)
        assert model["not_in_base"]["count"] == model["only_in_base"]["count"] == 0
    for row, expected in zip(family["cosines"], naive.cosines(names), strict=True):
        assert row == near(expected)
    assert family["cosines"][2][1] > 0.5 and "share a direction" in family["reading"]
    assert len(family["pools"]) == 1 and len(family["layers"]) == 6


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize(("power", "exclude"), [(2.0, ""), (-1.0, "embed, lm_head")])
def test_pools(
    granularity: str,
    power: float,
    exclude: str,
    trio: Trio,
    inspect: Inspect,
    tmp_path: Path,
) -> None:
    table = tmp_path / "pools.csv"
    options = ["--granularity", granularity, "--power", str(power), "--csv", str(table)]
    options += ["--exclude", exclude] if exclude else []
    says = f"Wrote {table}\n"
    family = only(inspect("--base", *trio.folders, *options, says=says))
    parts = tuple(part.strip() for part in exclude.split(",") if part.strip())
    naive = Naive(trio.states[0], trio.states[1:], parts)
    assert tuple(family["settings"]["exclude"]) == parts

    seen = {}
    for kind, pools in ((granularity, family["pools"]), ("layer", family["layers"])):
        key_of = {name: naive_pool(name, kind) or "model" for name in naive.names}
        assert {pool["key"] for pool in pools} == {*key_of.values()}
        for pool in pools:
            members = [name for name, key in key_of.items() if key == pool["key"]]
            assert pool["sq_norms"] == near(naive.sq_norms(members))
            assert pool["relative_norms"] == near(naive.relative(members))
            assert pool["coefficients"] == near(naive.lambdas(members, power=power))
            seen[kind, pool["key"]] = pool
    for k, model in enumerate(family["models"]):
        values = [pool["coefficients"][k] for pool in family["pools"]]
        assert model["coefficient_range"] == [min(values), max(values)]
        assert (model["coefficient"] is None) == (granularity != "model")

    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 3 * len(family["pools"])
    for row in rows:
        pool = seen[granularity, row["pool"]]
        k = [str(folder) for folder in trio.folders].index(row["model"]) - 1
        assert row["base"] == str(trio.folders[0])
        assert float(row["sq_norm"]) == pool["sq_norms"][k]
        assert float(row["norm"]) == near(math.sqrt(pool["sq_norms"][k]))
        assert float(row["relative_norm"]) == pool["relative_norms"][k]
        assert float(row["coefficient"]) == pool["coefficients"][k]


def write_models(folder: Path, *states: State, **sizes: Any) -> list[Path]:
    """Write a base and models, of two layers unless sizes are given."""
    config = llama_config(**sizes or SMALL)
    return [write_model(folder / f"m{k}", s, config) for k, s in enumerate(states)]


@pytest.fixture(scope="module")
def base() -> State:
    """Two layers, of which tests make models."""
    return llama_state(**SMALL)


def test_layers_are_in_the_order_of_the_model(inspect: Inspect, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 8, "vocab_size": 8}
    base = llama_state(**sizes)
    folders = write_models(tmp_path, base, tuned(base, 1), **sizes)
    family = only(inspect("--base", *folders, "--granularity", "layer"))
    assert [pool["key"] for pool in family["pools"]] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}" for n in range(12)),
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_resized_vocabularies_are_measured_on_common_rows(
    base: State, inspect: Inspect, tmp_path: Path
) -> None:
    """Two models of other vocabularies than the base's, and than each other's."""
    folders = write_models(tmp_path, base)
    taus, relative = [], []
    for k, rows in enumerate((80, 100), 1):
        sizes = {**SMALL, "vocab_size": rows}
        state, grown = tuned(base, k, 0.02), llama_state(seed=5, **sizes)
        for name, tensor in state.items():
            mine, common = common_part(grown[name], tensor)
            mine.copy_(common)
        pairs = {name: common_part(base[name], grown[name]) for name in base}
        # The task vector is 0 in rows that the model lacks.
        padded = {name: torch.zeros_like(base[name], dtype=F64) for name in base}
        for name, (first, second) in pairs.items():
            padded[name][tuple(map(slice, first.shape))] = tau(first, second)
        taus.append(torch.cat([tensor.flatten() for tensor in padded.values()]))
        whole = math.sqrt(sum(size(first) for first, _ in pairs.values()))
        relative.append(float(taus[-1].norm()) / whole)
        folders.append(write_model(tmp_path / str(k), grown, llama_config(**sizes)))

    family = only(inspect("--base", *folders))
    norms = [float(vector.norm()) for vector in taus]
    assert [model["norm"] for model in family["models"]] == near(norms)
    cosine = float(taus[0] @ taus[1]) / (norms[0] * norms[1])
    assert family["cosines"][0][1] == near(cosine)
    assert [model["relative_norm"] for model in family["models"]] == near(relative)
    # They do not depend on the other models.
    for folder, value in zip(folders[1:], relative, strict=True):
        alone = only(inspect("--base", folders[0], folder))
        assert alone["models"][0]["relative_norm"] == near(value)


def test_tied_heads_count_once(inspect: Inspect, tmp_path: Path) -> None:
    sizes = {**SMALL, "tie_word_embeddings": True}
    base = llama_state(**sizes)
    model = tuned(base, 1)
    stored = {**model, "lm_head.weight": model["model.embed_tokens.weight"].clone()}
    family = only(
        inspect("--base", *write_models(tmp_path, base, model, stored, **sizes))
    )
    first, second = family["models"]
    naive = Naive(base, (model,))
    assert first["sq_norm"] == second["sq_norm"] == near(naive.sq_norms(naive.names)[0])
    assert first["relative_norm"] == near(naive.relative(naive.names)[0])
    assert family["cosines"][0][1] == near(1.0)
    assert second["not_in_base"]["count"] == 0
    assert second["not_written"]["count"] == first["not_written"]["count"] == 0


EXTRA = {
    "model.mtp.0.proj.weight": (8, 32),
    "model.layers.1.self_attn.rotary_emb.inv_freq": (4,),
    "value_head.weight": (1, 32),
}


def test_tensors_that_a_merge_leaves_out(inspect: Inspect, tmp_path: Path) -> None:
    """What lies in both but in no definition; in one model only; in the base only."""
    generator = torch.Generator().manual_seed(0)
    extra = {name: torch.randn(s, generator=generator) for name, s in EXTRA.items()}
    base = {**llama_state(), **extra}
    first, second = tuned(base, 1, 0.02), tuned(base, 2, 0.02)
    del second["value_head.weight"], second["model.mtp.0.proj.weight"]
    second["extra.weight"] = torch.randn(5, 3, generator=generator).to(BF16)
    second["position_ids"] = torch.arange(16)
    folders = write_models(tmp_path, base, first, second, num_hidden_layers=3)
    family = only(inspect("--base", *folders))
    elements = 8 * 32 + 4 + 32
    expected = {"count": 3, "parameters": elements, "bytes": 4 * elements}
    assert expected.items() <= family["base"]["not_written"].items()
    one, two = family["models"]
    assert set(one["not_written"]["examples"]) == set(EXTRA)
    naive = Naive(base, (first,))
    whole = naive.sq_norms(naive.names)[0]
    assert one["sq_norm"] == near(whole)
    assert one["not_written"]["share"] == near(naive.sq_norms(list(EXTRA))[0] / whole)
    assert one["not_in_base"]["count"] == one["only_in_base"]["count"] == 0

    assert two["not_written"]["count"] == 2
    naive = Naive(base, (second,))
    inv_freq = ["model.layers.1.self_attn.rotary_emb.inv_freq"]
    kept = [name for name in base if name in second]
    share = naive.sq_norms(inv_freq)[0] / naive.sq_norms(kept)[0]
    assert two["not_written"]["share"] == near(share)
    expected = {"count": 1, "bytes": 30, "examples": ["extra.weight"]}
    assert expected.items() <= two["not_in_base"].items()
    assert {"count": 2, "parameters": 8 * 32 + 32}.items() <= two[
        "only_in_base"
    ].items()


def test_files_are_told_apart(inspect: Inspect, tmp_path: Path) -> None:
    """The same content elsewhere has the same digest, a changed one another."""
    base = llama_state(**SMALL)
    model = tuned(base, 1)
    other = {name: tensor.clone() for name, tensor in model.items()}
    other["lm_head.weight"][0, 0] += 1
    folders = write_models(tmp_path, base, model, model, other)
    file = folders[1] / "model.safetensors"
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    commit = "c" * 40
    hub = tmp_path / "models--a--b"
    downloaded = hub / "snapshots" / commit
    downloaded.mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / digest).write_bytes(content)
    (downloaded / file.name).symlink_to(hub / "blobs" / digest)
    llama_config(**SMALL).save_pretrained(downloaded)

    family = only(inspect("--base", *folders, downloaded))
    one, copy, changed, of_hub = (model["source"] for model in family["models"])
    assert one == copy != changed and one["digest"] != changed["digest"]
    assert one["revision"] is None and not one["files"][0]["whole"]
    assert of_hub["revision"] == commit
    assert of_hub["files"] == [
        {"name": file.name, "bytes": len(content), "digest": digest, "whole": True}
    ]


@PEFT_WARNS
def test_adapters(cli: Cli, tmp_path: Path) -> None:
    adapted = write_adapters(tmp_path / "m")
    models = [f"{adapted.base}+{adapter}" for adapter in adapted.adapters]
    printed = cli("inspect", "--base", adapted.base, *models, "--json", "-")
    report = json.loads(printed.out)
    assert report["refused"] is None
    for model, adapter in zip(only(report)["models"], adapted.adapters, strict=True):
        exact = naive_adapted(adapted.state, adapter, 8 / 4)
        norm = math.sqrt(Naive(adapted.state, (exact,)).sq_norms(list(exact))[0])
        # The sum of the reference is rounded to float32.
        assert model["norm"] == pytest.approx(norm, rel=1e-4)
        assert model["adapter"]["path"] == str(adapter)


# --- which models, from a YAML --------------------------------------------------------


def test_weights_by_hand_stand_beside_lambda(
    trio: Trio, inspect: Inspect, shown: Shown, tmp_path: Path
) -> None:
    config = trio.config(merge_method="ties", parameters={"weight": 0.3})
    filters = [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    config["models"][1]["parameters"] = {"weight": [0.2, 0.8], "density": 0.5}
    config["models"][2]["parameters"] = {"weight": filters}
    file = write_yaml(tmp_path / "ties.yml", config)
    report = inspect(file)
    assert report["method"] == "ties"
    models = only(report)["models"]
    by_hand = [model["weight_by_hand"] for model in models]
    assert by_hand == ["0.3", "0.2-0.8", "by filter"]
    assert [model["weight"] for model in models] == [1, 1, 1]
    lambdas = trio.naive.lambdas(trio.naive.names)
    assert [model["coefficient"] for model in models] == near(lambdas)
    table = shown(file)
    assert "YAML weight" in table
    assert "0.2-0.8" in table and "by filter" in table


@pytest.mark.parametrize(
    ("options", "exclude", "power"),
    [([], ("embed",), 1.0), (["--exclude", "", "--power", "2"], (), 2.0)],
)
def test_settings_of_a_metagpt_yaml_and_options_above_them(
    options: list[str],
    exclude: tuple[str, ...],
    power: float,
    trio: Trio,
    inspect: Inspect,
    tmp_path: Path,
) -> None:
    config = trio.config(
        parameters={"power": 1.0, "exclude": "embed", "lambda": 0.5},
        merge_method="metagpt_ties",
    )
    config["models"][0]["parameters"] = {"weight": 3.0}
    family = only(inspect(write_yaml(tmp_path / "given.yml", config), *options))
    naive = Naive(trio.states[0], trio.states[1:], exclude)
    lambdas = naive.lambdas(naive.names, [3.0, 1.0, 1.0], power)
    assert [model["coefficient"] for model in family["models"]] == near(lambdas)
    assert [model["weight"] for model in family["models"]] == [3, 1, 1]
    assert family["settings"]["scale"] == 0.5


def test_what_varies_by_tensor_is_shown_by_its_range(
    trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    config = trio.config()
    config["models"][0]["parameters"] = {"weight": [1.0, 2.0]}
    family = only(inspect(write_yaml(tmp_path / "gradient.yml", config)))
    naive = trio.naive
    ends = [naive.lambdas(naive.names, [w, 1.0, 1.0]) for w in (1.0, 2.0)]
    for model, values in zip(family["models"], zip(*ends, strict=True), strict=True):
        assert model["coefficient"] is None
        assert model["coefficient_range"] == near(sorted(values))
    assert "weight tensor by tensor: here are" in family["warnings"][0]
    assert family["pools"][0]["coefficients"] is None
    config["parameters"] = {"granularity": "layer"}
    family = only(inspect(write_yaml(tmp_path / "gradient.yml", config)))
    assert [model["weight_by_hand"] for model in family["models"]] == [
        "1-2",
        "1",
        "1",
    ]
    shares = {pool["key"]: pool["coefficients"] for pool in family["pools"]}
    for layer, weight in enumerate((1.0, 1.5, 2.0)):
        key = f"model.layers.{layer}"
        names = [name for name in naive.names if name.startswith(f"{key}.")]
        assert shares[key] == near(naive.lambdas(names, [weight, 1.0, 1.0]))
    only_default = only(inspect(tmp_path / "gradient.yml", "--power", "1"))
    assert "the coefficients here leave out" in only_default["warnings"][0]


def test_a_base_layer_that_is_used_twice_and_filters_of_one_slice(
    trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    """The range has both uses of the layer, and nothing of another place."""
    base, *models = map(str, trio.folders[:3])
    filters = [{"filter": "mlp", "value": 0.1}, {"value": 9.0}]

    def cut(weight: Any, layer: int) -> dict[str, Any]:
        settings = [{}, {"parameters": {"weight": weight}}, {}]
        return {
            "sources": [
                {"model": name, "layer_range": [layer, layer + 1], **setting}
                for name, setting in zip((base, *models), settings, strict=True)
            ]
        }

    config = merge_config(base, [], slices=[cut(filters, 0), cut(5.0, 0)])
    first, second = inspect(write_yaml(tmp_path / "twice.yml", config))["families"]
    naive = Naive(trio.states[0], trio.states[1:3])
    low, high, alone = (
        naive.lambdas(naive.names, [weight, 1.0])[0] for weight in (0.1, 9.0, 5.0)
    )
    assert first["models"][0]["coefficient_range"] == near([low, high])
    assert second["models"][0]["coefficient"] == near(alone)


def test_a_scale_by_tensor_changes_no_coefficient(
    trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    config = trio.config(parameters={"lambda": [0.5, 1.0], "power": 9.0})
    family = only(inspect(write_yaml(tmp_path / "scaled.yml", config)))
    assert any("a power above 2" in line for line in family["warnings"])
    low, high = family["models"][0]["coefficient_range"]
    assert low == high == family["pools"][0]["coefficients"][0]


def test_slices_of_other_models_are_families_of_their_own(
    trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    names = [str(folder) for folder in trio.folders]
    slices = [
        {"sources": [{"model": names[n], "layer_range": layers} for n in numbers]}
        for layers, numbers in (
            ([0, 1], (0, 1, 2)),
            ([1, 2], (0, 1, 2)),
            ([2, 3], (0, 1, 3)),
        )
    ]
    config = merge_config(names[0], [], slices=slices, merge_method="task_arithmetic")
    families = inspect(write_yaml(tmp_path / "slices.yml", config))["families"]
    places = [family["places"] for family in families]
    assert places == [["slices[0]", "slices[1]"], ["slices[2]"]]
    assert [model["name"] for model in families[1]["models"]] == [names[1], names[3]]
    for family, chosen in zip(families, ((1, 2), (1, 3)), strict=True):
        naive = Naive(trio.states[0], tuple(trio.states[k] for k in chosen))
        lambdas = naive.lambdas(naive.names)
        assert [model["coefficient"] for model in family["models"]] == near(lambdas)


@pytest.mark.parametrize("method", ["slerp", "linear", "nearswap", "dare_ties"])
def test_any_method_with_a_base(
    method: str, trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    """The base may be among the models, as slerp wants it."""
    names = [str(folder) for folder in trio.folders[:2]]
    config = merge_config(names[0], names, merge_method=method, parameters={"t": 0.5})
    report = inspect(write_yaml(tmp_path / "given.yml", config))
    assert report["method"] == method
    (model,) = only(report)["models"]
    assert (model["name"], model["coefficient"]) == (names[1], 1.0)


# --- warnings -------------------------------------------------------------------------


def test_nothing_to_warn_of(base: State, inspect: Inspect, tmp_path: Path) -> None:
    models = (tuned(base, 1, 0.001), tuned(base, 2, 0.001))
    family = only(inspect("--base", *write_models(tmp_path, base, *models)))
    assert family["warnings"] == []
    assert "Near orthogonal" in family["reading"]


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_one_model_takes_all(
    granularity: str, base: State, inspect: Inspect, tmp_path: Path
) -> None:
    models = (tuned(base, 1, 1e-4), tuned(base, 2, 0.01))
    folders = write_models(tmp_path, base, *models)
    options = ["--base", *folders, "--granularity", granularity]
    first, *others = warned(inspect(*options), "takes 99.")
    assert str(folders[2]) in first
    if granularity == "model":
        assert "exclude" not in first and not others
    assert not warned(inspect(*options, "--power", "0"), "takes")


def test_layers_in_which_nothing_moved_are_not_in_a_range(
    base: State, inspect: Inspect, tmp_path: Path
) -> None:
    still = {name: tensor for name, tensor in base.items() if ".layers.0." in name}
    models = ({**tuned(base, k, 0.01), **still} for k in (1, 2))
    folders = write_models(tmp_path, base, *models)
    family = only(inspect("--base", *folders, "--granularity", "layer"))
    (unmoved,) = [pool for pool in family["pools"] if ".layers.0" in pool["key"]]
    assert unmoved["sq_norms"] == [0, 0]
    assert all(0.3 < model["coefficient_range"][0] for model in family["models"])


def test_a_model_stored_more_finely_than_its_base(
    base: State, inspect: Inspect, tmp_path: Path
) -> None:
    models = (tuned(base, 1), cast(tuned(base, 2), BF16))
    folders = write_models(tmp_path, cast(base, BF16), *models)
    (line,) = warned(inspect("--base", *folders), "rounding step")
    assert str(folders[1]) in line and "published in float32" in line


def test_a_wrong_base(inspect: Inspect, tmp_path: Path) -> None:
    """Where norms, which are 1 in all models, are a small share of the whole."""
    base, other = (
        {n: t if "norm" in n else 30 * t for n, t in state.items()}
        for state in (llama_state(**SMALL), llama_state(seed=7, **SMALL))
    )
    folders = write_models(tmp_path, base, tuned(base, 1, 0.1), other)
    (line,) = warned(inspect("--base", *folders), "away from")
    assert str(folders[2]) in line and "fine-tune" in line


def test_embeddings_dominate(base: State, inspect: Inspect, tmp_path: Path) -> None:
    moved = tuned(base, 1, 0.001)
    moved["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].flip(0)
    folders = write_models(tmp_path, base, moved, tuned(base, 2, 0.001))
    report = inspect("--base", *folders)
    (takes,) = warned(report, "takes 99.")
    assert takes.endswith("or exclude: embed_tokens,lm_head"), takes
    (line,) = warned(report, "embeddings hold")
    assert str(folders[1]) in line and "exclude: embed_tokens,lm_head" in line
    assert only(report)["models"][0]["parts"]["embeddings"] > 0.5
    without = inspect("--base", *folders, "--exclude", "embed_tokens,lm_head")
    assert only(without)["warnings"] == []


def test_task_vectors_of_one_direction(
    base: State, inspect: Inspect, tmp_path: Path
) -> None:
    ancestor = tuned(base, 5, 0.01)
    models = (tuned(ancestor, k, 0.002) for k in (1, 2))
    report = inspect("--base", *write_models(tmp_path, base, *models))
    (line,) = warned(report, "point the same way")
    assert "ancestor" in line


def test_models_that_equal_the_base(
    base: State, inspect: Inspect, shown: Shown, tmp_path: Path
) -> None:
    folders = write_models(tmp_path, base, base, tuned(base, 1))
    family = only(inspect("--base", *folders))
    assert [model["coefficient"] for model in family["models"]] == [0.0, 1.0]
    assert family["cosines"] == [[None, None], [None, near(1.0)]]
    alone = inspect("--base", *folders[:2])
    assert only(alone)["models"][0]["coefficient"] == 0.0
    assert warned(alone, "no model differs from the base")
    assert "nan" not in shown("--base", *folders[:2]).lower()
    left_out = inspect("--base", *folders, "--power", "-1")
    assert warned(left_out, f"{folders[1]} equals the base")


def test_a_scale_of_0_is_not_degenerate(
    trio: Trio, inspect: Inspect, tmp_path: Path
) -> None:
    config = trio.config(parameters={"lambda": 0})
    family = only(inspect(write_yaml(tmp_path / "zero.yml", config)))
    assert sum(model["coefficient"] for model in family["models"]) == near(1)
    assert not [line for line in family["warnings"] if "gets only" in line]


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_exclude_leaves_nothing(granularity: str, trio: Trio, inspect: Inspect) -> None:
    """The weights alone count, and it is not said that no model moved."""
    options = ["--exclude", "model,lm_head", "--granularity", granularity]
    report = inspect("--base", *trio.folders, *options)
    assert not warned(report, "no model differs from the base")
    if granularity == "model":
        coefficients = [model["coefficient"] for model in only(report)["models"]]
        assert coefficients == near([1 / 3] * 3)


# --- what is printed ------------------------------------------------------------------

TABLES = """\
Base ./base: 34,016 parameters, float32, ||theta_0|| 207.9
./b: 34,016 parameters, bfloat16

Task vectors (granularity layer, power 2); relative: ||tau|| / ||theta_0||

#  model       coefficient  ||tau||  relative
──────────────────────────────────────────────────────────────────
1  ./a    0.0000 to 1.0000        8    0.0385
2  ./b    0.0000 to 1.0000       16    0.0770

The merged task vector has a length of 17.89, 1.00 of the models' average. \
`lambda: keep` would multiply it by 1 to make up for that.

Cosines between task vectors

#      1      2
────────────────
1  +1.00  +0.00
2  +0.00  +1.00

Near orthogonal (below 0.01), as the paper assumes: what one model learned hardly \
overlaps with the others.

Share of each part in ||tau||^2

#  embeddings  attention
─────────────────────────
1        0.0%     100.0%
2      100.0%       0.0%

Coefficients by layer, and in brackets ||tau|| / ||theta_0||

layer                                   #1               #2
────────────────────────────────────────────────────────────
model.embed_tokens.weight  0.0000 (0.0000)  1.0000 (0.2887)
model.layers.0             0.0000 (0.0000)  0.0000 (0.0000)
model.layers.1             1.0000 (0.0830)  0.0000 (0.0000)
model.layers.2             0.0000 (0.0000)  0.0000 (0.0000)
model.norm.weight          0.0000 (0.0000)  0.0000 (0.0000)
lm_head.weight             0.0000 (0.0000)  0.0000 (0.0000)

Warning: embeddings hold 100% of ||tau||^2 of ./b: if its vocabulary was resized or \
reordered, keep them out with exclude: embed_tokens,lm_head
Norms are 2 to 1 apart. Up to 2 to 1, MetaGPT and the plain average were close in \
our experiment on small models: MetaGPT was better in 7 of 9 comparisons, by 0.003 on \
average. At such ratios on Gemma 3 270M, the average was better in 21 of 21.
Compare on your own text: mergekit-metagpt compare ab.yml --text MODEL=FILE
"""


def test_the_way_on_can_be_gone_without_a_yaml(inside: Path, cli: Cli) -> None:
    printed = cli("inspect", "--base", "./base", "./a", "./b").out
    (line,) = re.findall("^Compare on your own.*", printed, re.M)
    assert "recipes your-own-models > merge.yml), then mergekit-metagpt c" in line
    assert "compare merge.yml --text MODEL=FILE" in line
    cli("recipes", "your-own-models")


def test_a_sample_that_estimates_nothing_says_so(inside: Path, shown: Shown) -> None:
    last = shown("ab.yml", "--sample", "1%").splitlines()[-1]
    assert last == "Nothing had to be estimated: all figures are exact."
    assert "estimated" not in shown("ab.yml")


def test_the_length_is_that_before_a_composed_method_drops_elements(
    inside: Path, shown: Shown
) -> None:
    for method, said in (("metagpt", ""), ("metagpt_ties", ", before `ties` drops")):
        write_yaml(
            Path("merge.yml"), merge_config("base", ["a", "b"], merge_method=method)
        )
        printed = " ".join(shown("merge.yml").split())
        (between,) = re.findall("The merged task vector(.*?) has a length", printed)
        assert between.startswith(said) and bool(between) == bool(said)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base of ones, `a` and `b` that moved, and `ab.yml`."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    base = {name: torch.ones_like(tensor) for name, tensor in llama_state().items()}
    base["lm_head.weight"] *= 2  # else it would be the embedding's
    a, b = dict(base), dict(base)
    # 32 x 32 elements by 1/4: ||tau|| = 8. 1024 of 3072 elements by 1/2: 16.
    a["model.layers.1.self_attn.q_proj.weight"] = torch.full((32, 32), 1.25)
    b["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].clone()
    b["model.embed_tokens.weight"][:32] = 1.5
    for name, state in (("base", base), ("a", a), ("b", cast(b, BF16))):
        write_model(tmp_path / name, state)
    write_yaml(tmp_path / "ab.yml", merge_config("base", ["a", "b"]))
    return tmp_path


def test_exact_tables(inside: Path, shown: Shown) -> None:
    text = shown("ab.yml", "--granularity", "layer")
    rules = re.compile("─+")
    assert rules.sub("─", text) == rules.sub("─", TABLES)


def test_exact_csv(inside: Path, shown: Shown) -> None:
    text = shown("--base", "base", "a", "b", "--csv", "-")
    # A coefficient is computed in log space: 0.2 may end in ...96.
    assert re.sub(r"0\.1999999999999\d+", "0.2", text) == (
        "base,model,pool,sq_norm,norm,relative_norm,coefficient,weight,"
        "sq_norm_se,coefficient_se\n"
        f"base,a,model,64.0,8.0,{math.sqrt(64 / 43232)},0.2,1.0,,\n"
        f"base,b,model,256.0,16.0,{math.sqrt(256 / 43232)},0.8,1.0,,\n"
    )


def test_files_are_written_beside_the_tables(inside: Path, shown: Shown) -> None:
    before = snapshot(inside)
    plain = shown("ab.yml")
    options = ["--json", "r.json", "--csv", "r.csv", "--plot", "r.png"]
    assert shown("ab.yml", *options, says="Wrote r.json, r.csv and r.png\n") == plain
    assert snapshot(inside).keys() - before.keys() == {"r.json", "r.csv", "r.png"}
    report = json.loads(Path("r.json").read_text())
    assert shown("ab.yml", "--json", "-") == Path("r.json").read_text()
    assert [m["norm"] for m in only(report)["models"]] == [8.0, 16.0]


def test_files_that_exist_are_replaced_by_force_only(
    inside: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.commands import measuring

    Path("r.png").write_text("mine")
    command = ["inspect", "ab.yml", "--json", "r.json", "--plot", "r.png"]
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "config_of", pytest.fail)  # refused before it
        assert "r.png exists" in cli.refused(*command)
        same = cli.refused("inspect", "ab.yml", "--json", "r", "--csv", "r")
        assert "--json and --csv are both r;" in same
        said = cli.refused("inspect", "ab.yml", "--json", "./ab.yml", "--force")
        assert "is what this command reads; choose another name" in said
        for name in ("a/model.safetensors", "a/config.json"):
            said = cli.refused("inspect", "ab.yml", "--csv", name, "--force")
            assert f"{name} is a file of a model" in said
    assert Path("r.png").read_text() == "mine" and not Path("r.json").exists()
    cli(*command, "--force")
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    # No file to lose.
    printed = cli("inspect", "ab.yml", "--json", os.devnull)
    assert printed.err == f"Wrote {os.devnull}\n"


def test_what_is_mistaken_for_a_yaml_or_a_model(inside: Path, cli: Cli) -> None:
    said = cli.refused("inspect", "ab.yml", "--base", "base")
    assert "ab.yml is a YAML, which names its own base" in said
    Path("metagpt.json").write_text("{}")
    said = cli.refused("inspect", "metagpt.json")
    assert "is the report of a merge" in said and "mergekit_config.yml" in said


def test_a_filter_that_is_in_no_name(
    inside: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config("base", ["a", "b"])
    config["models"][1]["parameters"] = {
        "weight": [
            {"filter": "self_atn", "value": 2},
            {"filter": "mlp", "value": 3},
            {"value": 1},
        ]
    }
    write_yaml(Path("filtered.yml"), config)
    cli("inspect", "filtered.yml")
    (warning,) = (line for line in caplog.messages if "filter" in line)
    assert warning.startswith("filter self_atn is in no tensor's name")
    assert warning.endswith("did you mean self_attn?")


def test_weights_on_the_command_line(
    inside: Path, inspect: Inspect, shown: Shown
) -> None:
    """By a model's name or that of its folder, above the YAML's."""
    config = merge_config("base", ["a", "b"])
    config["models"][1]["parameters"] = {"weight": [1, 2]}
    write_yaml(Path("graded.yml"), config)
    for name in ("a", "./a"):
        for source in (["ab.yml"], ["--base", "base", "./a", "./b"]):
            models = only(inspect(*source, "--weight", f"{name}=4"))["models"]
            assert [m["coefficient"] for m in models] == near([0.5, 0.5])
            assert [m["weight"] for m in models] == [4, 1]
    report = only(inspect("graded.yml", "--weight", "b=3", "--weight", "a=0"))
    assert report["settings"]["varying"] == []
    assert [m["coefficient"] for m in report["models"]] == [0.0, 1.0]
    table = io.StringIO(shown("ab.yml", "--weight", "a=4", "--csv", "-"))
    assert [row["weight"] for row in csv.DictReader(table)] == ["4.0", "1.0"]


def test_json_is_read_in_every_locale(inside: Path, cli: Cli) -> None:
    name = "./größer 模型"
    Path("a").rename(name)
    cli("inspect", "--base", "./base", name, "./b", "--json", "r.json")
    report = json.loads(Path("r.json").read_text("ascii"))
    assert only(report)["models"][0]["name"] == name


def test_a_wide_report_fits_a_terminal(
    inside: Path,
    inspect: Inspect,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three models with names as on the hub, an adapter, a weight, by layer."""
    from mergekit_metagpt.commands.printing import show
    from mergekit_metagpt.report import schema, tables

    names = (
        "meta-llama/Llama-3.1-8B-Instruct",
        "mistralai/Mistral-Nemo-Base-2407",
        "meta-llama/Llama-3.1-8B-Instruct+someone/adapter-of-some-length-r64",
    )
    write_model(inside / "c", tuned(llama_state(), 5))
    options = ["--base", "base", "a", "b", "c", "--weight", "b=12.5"]
    report = inspect(*options, "--granularity", "layer")
    for model, name in zip(only(report)["models"], names, strict=True):
        model["name"] = name
    monkeypatch.setenv("COLUMNS", "80")
    show(tables.lay_out(schema.Report.model_validate(report)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    heading = next(line for line in lines if line.startswith("#  model"))
    order = ["coefficient", "weight", "||tau||", "relative"]
    assert heading.split()[2:] == order
    # Only longer names than these are folded.
    (row,) = (line for line in lines if line.startswith(f"2  {names[1]} "))
    assert re.search(r" 0\.\d{4} to \d\.\d{4}  +12\.5  ", row)
    assert any(line.startswith("Warning: ") for line in lines)


@pytest.mark.parametrize("columns", [80, 120])
def test_no_number_breaks_in_a_table_of_many_models(
    columns: int,
    inside: Path,
    inspect: Inspect,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve models by layer: blocks of columns, each with the names of the layers."""
    from mergekit_metagpt.commands.printing import show
    from mergekit_metagpt.report import schema, tables

    report = inspect("--base", "base", "a", "b", "--granularity", "layer")
    family = only(report)
    family["models"] *= 6
    family["cosines"] = [row * 6 for row in family["cosines"]] * 6
    for pool in family["pools"]:
        for of_models in ("coefficients", "relative_norms", "sq_norms"):
            pool[of_models] *= 6
    monkeypatch.setenv("COLUMNS", str(columns))
    show(tables.lay_out(schema.Report.model_validate(report)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for pool in family["pools"]:
        rows = [line for line in lines if line.startswith(f"{pool['key']} ")]
        cells = re.findall(r" (\d\.\d{4}) \([\d.]+\)", " ".join(rows))
        assert cells == [f"{value:.4f}" for value in pool["coefficients"]]
    headings = re.findall(r"#\d+", "\n".join(lines))
    assert headings == [f"#{number}" for number in range(1, 13)]
    matrix = [line for line in lines if re.match(r" ?\d+  [+-]\d\.\d\d ", line)]
    assert len(re.findall(r"[+-]\d\.\d\d(?!\d)", "\n".join(matrix))) == 144


def test_a_long_name_breaks_at_its_separators(capsys: Any, monkeypatch: Any) -> None:
    from mergekit_metagpt.commands.printing import show
    from mergekit_metagpt.report.blocks import Blocks

    monkeypatch.setenv("COLUMNS", "40")
    table = Blocks(["model", "coefficient"], names=("model",))
    table.add(["acme/Some-Model-3.1-8B-Instruct-tuned", "0.5 ± 0.1"])
    show([table])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["acme/Some-Model-3.1-8B-", "0.5", "±", "0.1"]
    assert second == "Instruct-tuned"


# What every reader of the tables needs, whatever the terminal.
NEEDED = ("./a", "./b", "0.2000", "0.8000", "0.0385", "0.0770")


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_loses_nothing(
    columns: int, inside: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown("ab.yml")
    if columns == 80:
        assert [word for word in NEEDED if word not in text] == []
    # Narrower cells are folded, not cut.
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns


def test_a_usual_terminal_shows_all_columns(
    inside: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = merge_config("base", ["a", "b"], merge_method="ties")
    config["models"][0]["parameters"] = {"weight": [0.2, 0.8]}
    write_model(
        inside / "b", cast({n: t + 1e-4 for n, t in llama_state().items()}, BF16)
    )
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(write_yaml(Path("ties.yml"), config))
    assert "0.2-0.8" in text and not re.search(r"\w…", text)


def test_a_terminal_without_colour(
    inside: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shown("ab.yml")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown("ab.yml")
    codes = re.findall(r"\x1b\[([\d;]*)m", text)
    assert not [c for code in codes for c in code.split(";") if c and int(c) >= 30]
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain


@pytest.mark.parametrize(
    "name",
    ["[red]a[|red]", "-".join(["an-awfully-long-name-of-a-model"] * 5), "a:smile:b"],
)
def test_names_are_printed_as_they_are(name: str, inside: Path, shown: Shown) -> None:
    Path("a").rename(name)
    assert name in shown("--base", "base", name, "b")


@pytest.mark.parametrize(
    "command",
    [
        "inspect ab.yml --granularity tensor",
        "inspect ab.yml --granularity tensor --json -",
        "--help",
        "merge --help",
    ],
)
def test_a_reader_that_has_seen_enough(
    command: str,
    inside: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    os.close(read)
    with capfd.disabled():
        stream = os.fdopen(write, "w", encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stream)
    status = run_command(*command.split())
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert status == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_the_head_of_the_tables(inside: Path) -> None:
    """`| head -1`, in processes of their own."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [script("mergekit-metagpt"), "inspect", "ab.yml"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=inside,
    )
    os.close(write)
    assert os.read(read, 10) == b"Base ./bas"
    os.close(read)
    _, stderr = process.communicate(timeout=120)
    assert stderr == b""
    assert process.returncode in (0, 128 + signal.SIGPIPE)


def test_a_model_that_cannot_be_merged_is_warned_of(
    trio: Trio, inspect: Inspect
) -> None:
    """What `merge` would refuse can still be measured."""
    folder = trio.folders[1]
    (folder / "config.json").write_text("{")
    report = inspect("--base", *trio.folders)
    assert report["families"][0]["models"][0]["sq_norm"] > 0
    assert report["refused"].startswith(f"{folder}/config.json of {folder} ")


# --- the cost -------------------------------------------------------------------------


def test_one_pass_over_the_files_and_no_model(
    trio: Trio, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.checkpoints.files import Readers
    from mergekit_metagpt.scanning import once
    from mergekit_metagpt.scanning.pieces import Files

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was made")

    reads: list[tuple[Path, str]] = []
    whole, source = Readers.read, Files.source

    def noted(self: Readers, stored: Any) -> torch.Tensor:
        reads.append((stored.file, stored.name))
        return whole(self, stored)

    def noted_source(self: Files, pair: Any, stored: Any) -> Any:
        reads.append((stored.file, stored.name))
        return source(self, pair, stored)

    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    monkeypatch.setattr(once, "_REQUESTS", {})
    monkeypatch.setattr(once, "_PAIRS", {})
    monkeypatch.setattr(Readers, "read", noted)
    monkeypatch.setattr(Files, "source", noted_source)
    inspect("--base", *trio.folders)
    # The heads once more, to see whether they are the embeddings.
    layers = [read for read in reads if ".layers." in read[1]]
    stored = [name for state in trio.states for name in state if ".layers." in name]
    assert len(layers) == len(set(layers)) == len(stored)
    heads = [name for _, name in reads if ".layers." not in name]
    assert len(heads) <= 4 * 3 + 2 * 2 * 3


# --- bad input ------------------------------------------------------------------------


def test_a_base_among_the_models_is_named(inside: Path, shown: Shown) -> None:
    """A user of `linear` expects a weight for it."""
    said = shown("--base", "./base", "./base", "./a")
    assert "./base is the base and also listed" in said
    config = merge_config("./base", ["./base", "./a", "./b"])
    for entry, weight in zip(config["models"], (0.5, 0.25, 0.25), strict=True):
        entry["parameters"] = {"weight": weight}
    for method in ("linear", "metagpt"):
        file = write_yaml(Path("listed.yml"), {**config, "merge_method": method})
        family = only(json.loads(shown(file, "--json", "-")))
        assert family["note"].endswith("and its weight 0.5 does not count")
    assert "listed" not in shown("ab.yml")


BAD_ARGUMENTS = [
    ("a b", "no base"),
    ("ab.yml a", "ab.yml is a merge YAML, which comes alone"),
    ("a missing.yaml", "missing.yaml is a merge YAML, which comes alone"),
    ("abc.yml", "Did you mean ./ab.yml?"),
    ("--base base ab.yml", "ab.yml is a YAML"),
    ("--base missing a", "missing"),
    ("--base base base", "only the base"),
    ("--base base a a", "a is given twice"),
    ("ab.yml --power nan", "power is nan"),
    ("ab.yml --weight c=2", "names no model; expected one of ./a, ./b"),
    ("--base base ./arithmetic b --weight arithmetik=3", "Did you mean arithmetic?"),
    ("ab.yml --weight a", "expected MODEL=W"),
    ("ab.yml --weight a=x", "'x' is no number"),
    ("ab.yml --weight a=-1", "weight of ./a is -1.0"),
    ("ab.yml --plot r.gif", "expected one of .png, .svg, .pdf"),
    ("ab.yml --plot r", "expected one of .png, .svg, .pdf"),
    ("ab.yml --plot -", "--plot"),
    ("ab.yml --plot there/r.png", "there/r.png cannot be written"),
    ("ab.yml --json there/r.json", "there/r.json cannot be written"),
    ("ab.yml --csv base", "base is a folder"),
    ("ab.yml --json - --csv -", "stdout"),
]


@pytest.mark.parametrize(("arguments", "part"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: str, part: str, inside: Path, cli: Cli) -> None:
    before = snapshot(inside)
    assert part in cli.refused("inspect", *arguments.split())
    assert snapshot(inside) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full(inside: Path, cli: Cli) -> None:
    """What cannot be known before."""
    said = cli.refused("inspect", "ab.yml", "--json", "/dev/full")
    assert "No space left" in said
