"""`lambda: keep` and the lengths of merged task vectors, against float64 by hand."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.arithmetic.closed_form import restoring
from mergekit_metagpt.method import advice
from mergekit_metagpt.scanning import once
from tests.conftest import Cli, Family, write_family
from tests.families import (
    State,
    llama_state,
    run_command,
    run_mergekit,
    said,
    tuned,
)
from tests.merges import write_merge
from tests.oracle import GRANULARITIES, naive_pool
from tests.stand_ins import naive_keep

pytestmark = pytest.mark.usefixtures("one_torch_thread")
EMBED = "model.embed_tokens.weight"
EXPERIMENTS = Path(__file__).parents[1] / "docs" / "experiments"
QUIET = ("--no-copy-tokenizer", "--quiet")

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three float32 fine-tunes, whose task vectors have a direction in common."""
    base = llama_state()
    states = []
    for k, size in enumerate((1e-3, 2e-3, 4e-3)):
        alike = tuned(base, 7, 1e-3)
        moved = tuned(alike, k + 1, size)
        if k == 1:  # so that pools differ
            moved = {n: t if "layers.1" in n else alike[n] for n, t in moved.items()}
        states.append(moved)
    return write_family(tmp_path_factory.mktemp("trio"), base, states)


def factor(family: Family, name: str, **settings: Any) -> float:
    """s of a tensor's pool."""
    granularity, exclude = settings.get("granularity", "model"), settings.get("exclude")
    pool = {
        other: tensor
        for other, tensor in family.base_state.items()
        if naive_pool(other, granularity) == naive_pool(name, granularity)
        and not any(part in other for part in exclude or ())
    }
    shares = family.lambdas(**settings)(name)
    return naive_keep([pool, *family.states], shares) if pool else 1.0


def lambdas(family: Family, name: str, **settings: Any) -> torch.Tensor:
    return family.lambdas(**settings)(name) * factor(family, name, **settings)


def keeping(family: Family, method: str = "metagpt", **settings: Any) -> dict[str, Any]:
    parameters = {"lambda": "keep", **settings}
    return family.config(merge_method=method, parameters=parameters)


def assert_kept(merged: State, family: Family, **settings: Any) -> None:
    family.assert_merged(merged, lambda name: lambdas(family, name, **settings))


@pytest.mark.parametrize("power", [2.0, 0.0])
@every_granularity
def test_the_length_of_each_pool_is_kept(
    tmp_path: Path, trio: Family, granularity: str, power: float
) -> None:
    settings = {"granularity": granularity, "power": power}
    merged = run_mergekit(keeping(trio, **settings), tmp_path / "out")
    assert_kept(merged, trio, **settings)


def test_what_is_excluded_has_no_length(tmp_path: Path, trio: Family) -> None:
    config = keeping(trio, granularity="layer", exclude="embed_tokens")
    merged = run_mergekit(config, tmp_path / "out")
    assert_kept(merged, trio, granularity="layer", exclude=["embed_tokens"])


@every_granularity
def test_tensors_in_memory(trio: Family, granularity: str) -> None:
    states = trio.all_states
    settings = {"granularity": granularity}
    merged = merge_methods.merge_state_dicts(
        states,
        "metagpt",
        base=0,
        parameters={"lambda": "keep", **settings},
        dtype=torch.float64,
    )
    assert_kept(merged, trio, **settings)


def test_gradients_flow_through_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    tensors = [row.clone().requires_grad_() for row in drawn]

    def merged(*given: torch.Tensor) -> torch.Tensor:
        group = TensorGroup.from_tensors(given, base_index=0, name="w")
        parameters = {"lambda": "keep", "granularity": "tensor"}
        return merge_methods.get("metagpt")([group], parameters=parameters)[0]

    assert torch.autograd.gradcheck(merged, tensors)


def test_a_composed_method_gets_the_number(tmp_path: Path, trio: Family) -> None:
    config = keeping(trio, method="metagpt_dare_linear", density=1.0)
    merged = run_mergekit(config, tmp_path / "out", "--random-seed", "0")
    assert_kept(merged, trio)
    number = factor(trio, EMBED)
    config = keeping(trio, method="metagpt_ties", density=0.5)
    kept = run_mergekit(config, tmp_path / "kept")
    config["parameters"]["lambda"] = number
    for name, tensor in run_mergekit(config, tmp_path / "number").items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-12, atol=1e-15)


def test_some_tensors_may_keep_it(tmp_path: Path, trio: Family) -> None:
    values = [{"filter": "mlp", "value": "keep"}, {"value": 0.5}]
    merged = run_mergekit(keeping(trio, **{"lambda": values}), tmp_path / "out")
    half = trio.lambdas(scale=0.5)
    trio.assert_merged(
        merged, lambda name: lambdas(trio, name) if "mlp" in name else half(name)
    )


@every_granularity
@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
def test_an_export_has_numbers(
    tmp_path: Path, trio: Family, granularity: str, method: str
) -> None:
    config = keeping(trio, granularity=granularity, method=method)
    ours = run_mergekit(config, tmp_path / "ours")
    plain = tmp_path / "plain.yml"
    assert run_command("export", tmp_path / "ours.yml", plain) == 0
    document = yaml.safe_load(plain.read_text())
    number = document["parameters"]["lambda"]
    if granularity == "model":
        assert number == pytest.approx(factor(trio, EMBED))
    else:
        assert len({entry["value"] for entry in number}) > 3
    assert "keep" not in plain.read_text()
    for name, tensor in run_mergekit(document, tmp_path / "theirs").items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-12, atol=1e-15)


def test_a_merge_scans_once_says_it_and_is_verified(
    tmp_path: Path,
    trio: Family,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scans = []
    original = once.scan_checkpoints

    def counted(*arguments: Any, **options: Any) -> Any:
        scans.append(options["gram"])
        return original(*arguments, **options)

    monkeypatch.setattr(once, "scan_checkpoints", counted)
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(keeping(trio)))
    assert run_command("merge", file, out, *QUIET) == 0
    assert scans == [True]
    number = factor(trio, EMBED)
    (line,) = said(caplog, "coefficients of the whole model")
    assert f"lambda {number:.4g} (keep)" in line
    report = json.loads((out / "metagpt.json").read_text())["families"][0]
    assert report["settings"]["scale"] == "keep"
    assert report["pools"][0]["keep"] == pytest.approx(number)
    card = (out / "README.md").read_text()
    assert f"`lambda: keep` ({number:.4g})" in card
    assert " times as far as these models did on average, before `lambda`." in card
    console = ("mergekit-metagpt compare", "ACE", "keep` would")
    assert not any(words in card for words in console)
    assert (out / "metagpt.png").exists()
    assert run_command("verify", out, "--full") == 0


def test_what_cancels_has_no_length_to_keep(
    tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {name: tensor.double() for name, tensor in llama_state().items()}
    states = [
        {name: tensor + step for name, tensor in base.items()}
        for step in (2.0**-9, -(2.0**-9))
    ]
    family = write_family(tmp_path, base, states)
    keep = {"lambda": "keep"}
    file = tmp_path / "merge.yml"
    write_merge(file, family.base, family.models, parameters=keep)
    said = cli.error("merge", file, tmp_path / "out", "--no-copy-tokenizer")
    assert "cancel each other" in said
    assert run_command("inspect", file) == 0
    assert "`lambda: keep` cannot make up" in capsys.readouterr().out


def test_where_nothing_moved_there_is_nothing_to_scale() -> None:
    shares, gram = torch.zeros(2).double(), torch.zeros(2, 2).double()
    assert restoring(shares, gram) == 1
    # Nor does a model that has a share, and did not move, matter.
    gram[0, 0] = 4.0
    assert restoring(shares + 0.5, gram) == 1


@every_granularity
def test_inspect_tells_lengths_and_disparity(
    tmp_path: Path, trio: Family, granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "found.json", tmp_path / "merge.yml"
    settings = {"granularity": granularity}
    write_merge(file, trio.base, trio.models, parameters=settings)
    assert run_command("inspect", file, "--json", out) == 0
    (family,) = json.loads(out.read_text())["families"]
    shares = trio.lambdas(**settings)
    merged = torch.cat(
        [
            sum(
                share * (state[name].double() - base.double()).ravel()
                for share, state in zip(shares(name), trio.states, strict=True)
            )
            for name, base in trio.base_state.items()
        ]
    )
    lengths = family["lengths"]
    assert lengths["merged"] == pytest.approx(float(merged.norm()))
    norms = [model["norm"] for model in family["models"]]
    assert lengths["disparity"] == pytest.approx(max(norms) / min(norms))
    logs = torch.tensor(norms).double().square().log()
    gamma = float(logs.var(correction=0) / logs.mean() ** 2)
    assert lengths["gamma"] == pytest.approx(gamma)
    if granularity == "model":
        found = [model["coefficient"] for model in family["models"]]
        inputs = sum(s * n for s, n in zip(found, norms, strict=True))
        assert lengths["inputs"] == pytest.approx(inputs)
        assert lengths["inputs"] / lengths["merged"] == pytest.approx(
            family["pools"][0]["keep"]
        )
    shown = capsys.readouterr().out
    assert f" a length of {lengths['merged']:.4g}, " in shown
    assert re.search(r"mergekit-metagpt compare \S+ --text MODEL=FILE\n\Z", shown)


def test_a_merge_without_inner_products_tells_norms_alone(
    tmp_path: Path, trio: Family, own_cache: Path
) -> None:
    out = tmp_path / "out"
    file = write_merge(tmp_path / "merge.yml", trio.base, trio.models)
    assert run_command("merge", file, out, *QUIET) == 0
    (family,) = json.loads((out / "metagpt.json").read_text())["families"]
    assert family["lengths"]["merged"] is family["pools"][0]["keep"] is None
    assert family["lengths"]["disparity"] > 1
    assert "moved farthest moved " in (out / "README.md").read_text()


def test_advice_says_what_the_experiment_measured() -> None:
    """Its thresholds and counts follow from the records of the experiment."""
    raw = json.loads((EXPERIMENTS / "results.json").read_text())
    models = {(m["seed"], m["model"]): m for m in raw["models"]}
    merges = {(m["seed"], m["mixture"], m["method"]): m["loss"] for m in raw["merges"]}
    domain = {
        name: raw["setting"]["domains"].index(entry["domain"])
        for name, entry in raw["setting"]["specialists"].items()
    }
    near, apart, farthest = [], [], 0.0
    for mixture, names in raw["setting"]["mixtures"].items():
        for seed in {m["seed"] for m in raw["models"] if mixture != "harsh"}:
            sq_norms = [models[seed, name]["sq_norm"] for name in names]
            disparity = math.sqrt(max(sq_norms) / min(sq_norms))
            usual, mild, average = (
                math.fsum(merges[seed, mixture, method][domain[name]] for name in names)
                / len(names)
                for method in ("metagpt", "metagpt power 1", "average")
            )
            pair = usual - average, mild - usual
            (apart if disparity > advice.APART_NORMS else near).append(pair)
            assert not 1.5 < disparity < 2.25
            farthest = max(farthest, disparity)
    better = sum(less < 0 for less, _ in near)
    mean = -sum(less for less, _ in near) / len(near)
    said_near, said_apart = advice.which_weights(1.2), advice.which_weights(2.5)
    assert f"better in {better} of {len(near)} comparisons, by {mean:.3f}" in said_near
    worse = sum(less > 0 for less, _ in apart)
    assert f"worse than the plain average in {worse} of {len(apart)}" in said_apart
    milder = sum(less < 0 for _, less in apart)
    assert f"than MetaGPT in {milder} of {len(apart)}" in said_apart
    outcomes = list(real_outcomes())
    near = [gap for disparity, gap, _ in outcomes if disparity <= advice.APART_NORMS]
    apart = [pair for disparity, *pair in outcomes if disparity > advice.APART_NORMS]
    better = sum(gap > 0 for gap in near)
    assert f"the average was better in {better} of {len(near)}." in said_near
    worse = sum(gap > 0 for gap, _ in apart)
    assert f"was worse than the average in {worse} of {len(apart)}," in said_apart
    milder = sum(less < 0 for _, less in apart)
    assert f"better than MetaGPT in {milder} of {len(apart)}. Try" in said_apart
    assert "Try" not in advice.which_weights(2.5, power=1.0)
    assert advice.which_weights(2.5, (1.0, 1.0, 0.0)) == said_apart
    assert f"{farthest:.1f}" == str(advice.FARTHEST_TRIED)
    assert "1,640 to 1 apart, farther than any" in advice.which_weights(1640)
    for shown, ratio in (("2 to 1", 2.0004), ("2.01 to 1", 2.0051)):
        said = advice.which_weights(ratio)
        assert said.startswith(f"Norms are {shown} apart. ")
        assert ("Above 2 to 1" in said) == (ratio > 2.005)
    assert "4.2 to 1 apart. Above" in advice.which_weights(4.2004)
    said = advice.which_weights(2.5, (30.0, 1.0))
    assert "2.5 to 1" in said and " of 18" not in said and "says nothing" in said


def real_outcomes() -> Iterator[tuple[float, float, float]]:
    """For each mixture of the real model and seed: its disparity, and two losses.

    These are MetaGPT's above the average's, and that of `power: 1` above MetaGPT's.
    """
    found = json.loads((EXPERIMENTS / "real_model.json").read_text())
    domain = {
        name: plan["domain"]
        for plan in found["setting"]["plans"]
        for name in plan["steps"]
    }
    for raw in found["seeds"]:
        models = {model["model"]: model for model in raw["models"]}
        merges = {(m["mixture"], m["method"]): m["loss"] for m in raw["merges"]}
        for mixture, names in found["setting"]["mixtures"].items():
            sq_norms = [models[name]["sq_norm"] for name in names]
            usual, average, mild = (
                math.fsum(
                    statistics.fmean(merges[mixture, method][domain[name]])
                    for name in names
                )
                for method in ("metagpt", "average", "power 1")
            )
            disparity = math.sqrt(max(sq_norms) / min(sq_norms))
            yield disparity, usual - average, mild - usual
