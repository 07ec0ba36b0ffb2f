"""`sample` in a merge YAML: estimated coefficients, the same wherever they are made."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts

from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.merge_config import candidates
from mergekit_metagpt.scanning import cache, once, pieces
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.results import Pooled, ScanResult
from mergekit_metagpt.scanning.sampling import Sample, sample_checkpoints
from tests.conftest import Cli
from tests.families import (
    State,
    forget,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.merges import pretend_devices, write_merge
from tests.oracle import assert_merged_exactly, assert_same_states

pytestmark = pytest.mark.usefixtures("one_torch_thread", "own_cache")

SIZES = {
    "hidden_size": 128,
    "vocab_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHARE = 0.2
QUIET = ("--no-copy-tokenizer", "--quiet")


def uneven(base: State, seed: int) -> State:
    """A fine-tune whose rows moved by very different lengths."""
    other = tuned(base, seed, size=2e-4)
    draw = torch.Generator().manual_seed(seed)
    return {
        name: base[name]
        + seed
        * torch.rand(len(t), generator=draw).mul(3).exp()[:, None]
        * (t - base[name])
        if t.dim() == 2
        else t
        for name, t in other.items()
    }


@pytest.fixture(scope="module")
def states() -> list[State]:
    base = llama_state(**SIZES)
    return [base, uneven(base, 1), uneven(base, 2)]


def write(folder: Path, states: Sequence[State], shards: int = 1) -> list[Path]:
    """Write them as if long ago, so that the cache remembers them."""
    paths = [
        write_model(folder / f"m{at}", state, llama_config(**SIZES), shards=shards)
        for at, state in enumerate(states)
    ]
    for file in folder.rglob("*"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, states: list[State]) -> list[Path]:
    return write(tmp_path_factory.mktemp("sampled"), states)


def config(paths: Sequence[Path], **parameters: Any) -> dict[str, Any]:
    parameters = {"sample": SHARE, **parameters}
    return merge_config(paths[0], paths[1:], dtype="float64", parameters=parameters)


def estimated(paths: Sequence[Path]) -> ScanResult:
    base, *models = map(open_checkpoint, paths)
    return sample_checkpoints(base, models, Sample(share=SHARE))


def shares(pooled: Pooled, name: str) -> torch.Tensor:
    sq_norms = pooled.sq_norms
    if pooled.granularity == "layer":
        sq_norms = sq_norms[pooled.rows[pooled.key_of(name)]]
    return sq_norms / sq_norms.sum()


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_merge_takes_estimated_coefficients(
    granularity: str,
    paths: list[Path],
    states: list[State],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    merged = run_mergekit(config(paths, granularity=granularity), tmp_path / "out")
    pooled = estimated(paths).pool(granularity)
    assert_merged_exactly(
        merged, states[0], states[1:], lambda name: shares(pooled, name)
    )
    (line,) = said(caplog, "coefficients of")
    assert f"estimated from a sample of {SHARE}" in line
    found = re.findall(r"([\d.]+) ± ([\d.]+) ", line)
    assert len(found) == 2
    base, *models = map(open_checkpoint, paths)
    exact = scan_checkpoints(base, models).pool(granularity)
    name = next(iter(merged))
    if granularity == "model":
        for (value, error), true in zip(found, shares(exact, name), strict=True):
            assert 0 < abs(float(value) - float(true)) < 4 * float(error)


def test_other_parameters_and_methods_take_a_sample_too(
    paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for method in ("metagpt", "metagpt_ties"):
        caplog.clear()
        asked = {
            **config(paths, exclude="embed_tokens", power=1),
            "merge_method": method,
        }
        run_mergekit(asked, tmp_path / method)
        (line,) = said(caplog, "coefficients of")
        assert " ± " in line and "power 1, without embed_tokens, estimated" in line


def test_the_same_bits_wherever_a_merge_is_made(
    paths: list[Path],
    states: list[State],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "0")
    first = run_mergekit(config(paths), tmp_path / "first")
    sharded = write(tmp_path / "sharded", states, shards=3)
    monkeypatch.setattr(pieces, "default_workers", lambda: 7)
    forget()
    assert_same_states(first, run_mergekit(config(sharded), tmp_path / "sharded-out"))
    pretend_devices(monkeypatch, 2)
    forget()
    read: list[Sample] = []

    def counted(*given: Any, **options: Any) -> ScanResult:
        read.append(given[2])
        return sample_checkpoints(*given, **options)

    monkeypatch.setattr(once, "sample_checkpoints", counted)
    merged = run_mergekit(config(paths), tmp_path / "multi", "--multi-gpu")
    assert_same_states(first, merged)
    assert read == [Sample(share=SHARE)], "once, without a cache"


def test_an_exact_result_serves_and_is_named(
    paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = run_mergekit(config(paths, sample=1), tmp_path / "exact")
    for cleared in (False, True):
        caplog.clear()
        if cleared:
            forget()
        out = tmp_path / f"served-{cleared}"
        assert_same_states(exact, run_mergekit(config(paths), out))
        (line,) = said(caplog, "coefficients of")
        assert "exact: no sample of 0.2 was needed" in line and "±" not in line


def test_a_merge_that_began_with_estimates_ends_with_them(paths: list[Path]) -> None:
    base, *models = map(open_checkpoint, paths)
    first = once.measure(base, models, sample=Sample(share=SHARE))
    assert once.measure(base, models).sampled is None
    assert once.measure(base, models, sample=Sample(share=SHARE)) is first
    assert once.measure(base, models, sample=Sample(share=0.3)).sampled is None


BY_FILTER = [{"filter": "mlp", "value": 0.1}]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sample": BY_FILTER}, "sample is 0.1 on some tensors and 1 on others"),
        ({"sample": [0.1, 0.3]}, "sample is 0.1 on some tensors and 0.3 on others"),
        ({"granularity": "tensor"}, "sample is 0.2, but granularity 'tensor'"),
        ({"sample": 0}, "sample is 0; expected a number above 0 and at most 1"),
        ({"sample": 1.5}, "sample is 1.5; expected a number above 0"),
        ({"sample": "2%"}, "number above 0 and at most 1. Write sample: 0.02"),
    ],
    ids=str,
)
def test_what_is_no_share_of_the_whole_merge_is_refused(
    parameters: dict[str, Any],
    message: str,
    paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    def read(*given: Any, **options: Any) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr(once, "sample_checkpoints", read)
    monkeypatch.setattr(once, "scan_checkpoints", read)
    asked = config(paths, **parameters)
    with pytest.raises(ValueError, match=re.escape(message)):
        run_mergekit(asked, tmp_path / "out")
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(asked))
    for command in (["inspect", file], ["merge", file, tmp_path / "out2", *QUIET]):
        assert message in cli.error(*command)


def test_slices_with_samples_of_their_own_are_refused(
    paths: list[Path], tmp_path: Path, cli: Cli
) -> None:
    cuts = [
        {
            "sources": [{"model": str(p), "layer_range": [at, at + 1]} for p in paths],
            "parameters": {"sample": share},
        }
        for at, share in enumerate((0.1, 0.2))
    ]
    message = "sample is 0.1 on some tensors and 0.2 on others"
    with pytest.raises(ValueError, match=message):
        run_mergekit(merge_config(paths[0], (), slices=cuts), tmp_path / "out")
    file = write_merge(tmp_path / "merge.yml", paths[0], (), slices=cuts)
    assert message in cli.error("inspect", file)


def test_tensors_in_memory_are_all_measured(states: list[State]) -> None:
    inputs = dict(zip(("base", "a", "b"), states, strict=True))
    merged = [
        merge_state_dicts(
            inputs, method="metagpt", base="base", parameters={"sample": share}
        )
        for share in (1.0, 0.01)
    ]
    assert_same_states(*merged)


@pytest.fixture
def yml(paths: list[Path], tmp_path: Path) -> Path:
    return write_merge(
        tmp_path / "merge.yml", paths[0], paths[1:], parameters={"sample": SHARE}
    )


def verified(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command("verify", out, "--full", "--json", "-") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["verdict"] for check in checks} <= {"verified", "not recorded"}


def scan_exactly(paths: Sequence[Path]) -> None:
    base, *models = map(open_checkpoint, paths)
    once.measure(base, models)


def test_what_a_merge_was_made_from_is_recorded_and_verified(
    yml: Path, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_command("merge", yml, out, *QUIET) == 0
    (family,) = json.loads((out / "metagpt.json").read_text())["families"]
    assert family["settings"]["sample"] == family["sample"]["share"] == SHARE
    assert all(model["coefficient_se"] > 0 for model in family["models"])
    card = (out / "README.md").read_text()
    assert f"`sample: {SHARE}`; ± is one standard error" in card
    # The coefficient, the norm and the relative norm of each model.
    assert len(re.findall(r"\d ± \d", card)) == 3 * (len(paths) - 1)
    assert "moved farthest moved about " in card
    plain = (out / "mergekit_config.plain.yml").read_text()
    assert f"# Estimated from a sample of {SHARE} of each large tensor" in plain
    weights = [
        entry["parameters"]["weight"]
        for entry in yaml.safe_load(plain)["models"]
        if "parameters" in entry
    ]
    assert weights == [model["coefficient"] for model in family["models"]]
    assert "sample" not in yaml.safe_load(plain).get("parameters", {})
    scan_exactly(paths)  # which the cache remembers
    forget()
    verified(out, capsys)
    shutil.copytree(out, tmp_path / "plainly")
    (tmp_path / "plainly" / "metagpt.json").unlink()
    verified(tmp_path / "plainly", capsys)


def test_a_merge_by_exact_figures_is_verified_by_exact_figures(
    yml: Path, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan_exactly(paths)
    out = tmp_path / "out"
    assert run_command("merge", yml, out, *QUIET) == 0
    (family,) = json.loads((out / "metagpt.json").read_text())["families"]
    assert family["settings"]["sample"] == SHARE and family["sample"] is None
    assert "not needed: all figures are exact" in (out / "README.md").read_text()
    plain = (out / "mergekit_config.plain.yml").read_text()
    assert "Estimated" not in plain
    cache.clear()
    forget()
    verified(out, capsys)


def test_export_and_inspect_read_the_same_sample(
    yml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "out"
    assert run_command("merge", yml, merged, *QUIET) == 0
    forget()
    assert run_command("export", yml, tmp_path / "plain.yml") == 0
    written = merged / "mergekit_config.plain.yml"
    assert (tmp_path / "plain.yml").read_text() == written.read_text()
    recorded = json.loads((merged / "metagpt.json").read_text())["families"][0]

    def inspected(*options: str) -> Any:
        capsys.readouterr()
        assert run_command("inspect", yml, "--json", "-", *options) == 0
        return json.loads(capsys.readouterr().out)["families"][0]

    found = inspected()
    assert found["sample"]["share"] == SHARE
    for one, other in zip(found["models"], recorded["models"], strict=True):
        assert one["coefficient"] == pytest.approx(other["coefficient"], rel=1e-9)
    assert inspected("--sample", "40%")["sample"]["share"] == 0.4
    assert inspected("--sample", "100%")["sample"] is None


def test_layers_with_weights_of_their_own_have_errors_of_their_own(
    yml: Path, paths: list[Path], cli: Cli
) -> None:
    def report(weight: Any) -> dict[str, Any]:
        given = config(paths, granularity="layer", **{"lambda": "keep"})
        given["models"][0]["parameters"] = {"weight": weight}
        yml.write_text(yaml.safe_dump(given))
        found = json.loads(cli("inspect", yml, "--json", "-").out)
        return {pool["key"]: pool for pool in found["families"][0]["pools"]}

    gradient = report([1.0, 40.0])
    for key, weight in (("model.layers.0", 1.0), ("model.layers.1", 40.0)):
        alone = report(weight)[key]
        for figure in ("coefficients", "coefficients_se", "keep"):
            assert gradient[key][figure] == pytest.approx(alone[figure])
        assert min(gradient[key]["coefficients_se"]) > 0


def test_the_plain_yaml_merges_to_the_same_model(yml: Path, tmp_path: Path) -> None:
    assert run_command("merge", yml, tmp_path / "out", *QUIET) == 0
    plain = yaml.safe_load((tmp_path / "out/mergekit_config.plain.yml").read_text())
    theirs = run_mergekit(plain, tmp_path / "plain")
    for name, tensor in read_model(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


def test_candidates_are_compared_by_the_same_sample(yml: Path) -> None:
    found = candidates.distinct(
        candidates.usual(yml.read_text(), [2], "embed_tokens", sample=SHARE)
    )
    given = {
        c.names: c.config.parameters.get("sample") for c in found if c.config.parameters
    }
    assert given.pop(("average",)) is None
    assert given.pop(("task arithmetic 0.3",)) is None
    assert given == {
        ("as written", "metagpt"): SHARE,
        ("power 1",): SHARE,
        ("no embeddings",): SHARE,
    }
