"""`merge`: what it leaves beside the model, and that nothing else changes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

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
    said,
    tuned,
    write_model,
)
from tests.oracle import assert_same_bits, naive_coefficients, naive_sq_norms

pytestmark = pytest.mark.usefixtures("one_torch_thread")

QUIET = ("--no-copy-tokenizer", "--quiet")
BESIDE = {"metagpt.json", "metagpt.png", "mergekit_config.plain.yml"}
SIZES: dict[str, Any] = {"num_hidden_layers": 2}


@pytest.fixture
def states() -> dict[str, State]:
    base = llama_state(**SIZES)
    found = {"base": base, "a": tuned(base, 1, 0.01), "b": tuned(base, 2, 0.02)}
    return {name: cast(state, torch.bfloat16) for name, state in found.items()}


@pytest.fixture
def work(
    states: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A current folder with `m/base`, `m/a`, `m/b` and `merge.yml`; no network."""
    import huggingface_hub.constants

    folder = tmp_path / "work"
    for name, state in states.items():
        write_model(folder / "m" / name, state, llama_config(**SIZES))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_config()
    return folder


def write_config(**settings: Any) -> dict[str, Any]:
    config = merge_config("m/base", ["m/a", "m/b"], **settings)
    Path("merge.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


def new_in(folder: Path, before: dict[str, Any]) -> set[str]:
    return {Path(name).parts[0] for name in snapshot(folder).keys() - before.keys()}


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_what_lies_beside_the_model(
    granularity: str,
    work: Path,
    states: dict[str, State],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(parameters={"granularity": granularity})
    before = dict(snapshot(work))
    theirs = work.parent / "plain" / "out"
    absolute = {
        **config,
        "base_model": str(work / "m/base"),
        "models": [{"model": str(work / "m" / name)} for name in "ab"],
    }
    weights = run_mergekit(absolute, theirs)

    capsys.readouterr()
    assert run_command("merge", "merge.yml", "out", *QUIET) == 0
    said = capsys.readouterr()
    assert said.out == ""
    out = work / "out"
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    again = "mergekit-metagpt inspect out/mergekit_config.yml"
    last = said.err.splitlines()[-1]
    assert last.startswith(f"Wrote out ({size:,.1f} MB). ") and f"`{again}`" in last
    assert "`mergekit-metagpt verify out`" in last
    assert run_command(*again.split()[1:], "--json", "again.json") == 0
    first = json.loads((out / "metagpt.json").read_text())["families"][0]["models"]
    second = json.loads(Path("again.json").read_text())["families"][0]["models"]
    assert [m["coefficient"] for m in second] == [m["coefficient"] for m in first]
    Path("again.json").unlink()
    capsys.readouterr()
    assert new_in(work, before) == {"out"}
    written = {path.name for path in theirs.iterdir()}
    assert {path.name for path in out.iterdir()} == written | BESIDE
    for path in theirs.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()

    # The report is that of `inspect` without inner products, the plain YAML that of
    # `export`.
    assert run_command("inspect", "merge.yml", "--json", "-") == 0
    inspected = json.loads(capsys.readouterr().out)
    family = inspected["families"][0]
    family["cosines"] = family["lengths"]["merged"] = None
    for pool in (*family["pools"], *family["layers"]):
        assert pool["keep"] >= 1
        pool["keep"] = None
    report = json.loads((out / "metagpt.json").read_text())
    assert "not measured" in report["families"][0].pop("reading")
    assert "orthogonal" in inspected["families"][0].pop("reading")
    # By what options, says the report of a merge alone.
    assert inspected.pop("options") is None
    assert report.pop("options") == {
        "device": "cpu",
        "multi_gpu": False,
        "threads": 1,
        "random_seed": None,
        "lora_merge_dtype": None,
        "unsafe_truncate_embeddings": False,
        "allow_crimes": False,
    }
    assert inspected == report
    assert run_command("export", "merge.yml", "-") == 0
    assert capsys.readouterr().out == (out / "mergekit_config.plain.yml").read_text()
    plain = yaml.safe_load((out / "mergekit_config.plain.yml").read_text())
    for entry in (plain, *plain["models"]):
        for key in {"model", "base_model"} & entry.keys():
            assert entry[key].startswith("./m/")
            entry[key] = str(work / entry[key])
    repeated = run_mergekit(plain, work.parent / "repeated")
    for name, tensor in repeated.items():
        assert tensor.dtype == weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(tensor, weights[name], rtol=2**-7, atol=1e-9)

    assert (out / "metagpt.png").read_bytes().startswith(b"\x89PNG")
    (family,) = json.loads((out / "metagpt.json").read_text())["families"]
    sq_norms = naive_sq_norms(states["base"], [states["a"], states["b"]])
    assert [m["sq_norm"] for m in family["models"]] == pytest.approx(sq_norms.tolist())


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, r"$$\lambda_t = \frac{N_t^{2}}{\sum_k N_k^{2}}$$"),
        (
            {"power": 1.0, "lambda": 0.5},
            r"$$\lambda_t = \frac{N_t^{1}}{\sum_k N_k^{1}}$$",
        ),
    ],
)
def test_the_section_of_the_card(
    settings: dict[str, Any], formula: str, work: Path, states: dict[str, State]
) -> None:
    write_config(parameters=settings)
    assert run_command("merge", "merge.yml", "out", *QUIET) == 0
    card = Path("out/README.md").read_text()
    title, head, section = re.split(r"(?m)^(?=# |## MetaGPT)", card)[-3:]
    assert title.startswith("---\n") and head.startswith("# out\n")
    for word in ("_t", "_k"):
        norm = r"\lVert\theta" + word + r" - \theta_0\rVert"
        formula = formula.replace(f"N{word}", norm)
    assert formula in section.splitlines()
    sq_norms = naive_sq_norms(states["base"], [states["a"], states["b"]])
    power = settings.get("power", 2.0)
    lambdas = naive_coefficients(sq_norms, power=power).tolist()
    assert ("scaled by `lambda: 0.5`" in section) == ("lambda" in settings)
    rows = [line.split("|")[1:-1] for line in section.splitlines() if "| `" in line]
    assert [row[0].strip() for row in rows] == ["`./m/a`", "`./m/b`"]
    for row, value, sq_norm in zip(rows, lambdas, sq_norms.tolist(), strict=True):
        assert float(row[1]) == pytest.approx(value, rel=1e-5)
        assert float(row[3]) == pytest.approx(sq_norm**0.5, rel=1e-4)
    report = json.loads(Path("out/metagpt.json").read_text())
    (family,) = report["families"]
    for stored in (family["base"], *family["models"]):
        digest = stored["source"]["digest"]
        assert re.fullmatch("[0-9a-f]{64}", digest) and digest[:16] in section
    for name, version in report["versions"].items():
        assert f"{name} {version}" in section
    for name in BESIDE:
        assert name in section
    assert str(work) not in section


def test_a_composed_method_and_a_random_seed(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(merge_method="metagpt_dare_ties", parameters={"density": 0.5})
    seed = ("--random-seed", "5")
    assert run_command("merge", "merge.yml", "out", *QUIET, *seed) == 0
    assert not said(caplog, "--random-seed")
    assert run_command("merge", "merge.yml", "unseeded", *QUIET) == 0
    assert said(caplog, "give --random-seed N")
    config["base_model"] = str(work / "m/base")
    config["models"] = [{"model": str(work / "m" / name)} for name in "ab"]
    theirs = run_mergekit(config, work.parent / "plain" / "out", *seed)
    ours = read_model(Path("out"))
    for name, tensor in theirs.items():
        assert_same_bits(tensor, ours[name])
    plain = yaml.safe_load(Path("out/mergekit_config.plain.yml").read_text())
    assert plain["merge_method"] == "dare_ties"
    card = Path("out/README.md").read_text()
    assert "`dare_ties` takes the coefficients as its weights" in card
    # That is what the sum would have done, without dropping.
    assert "The merged model moved" not in card
    assert json.loads(Path("out/metagpt.json").read_text())["method"] == (
        "metagpt_dare_ties"
    )


@pytest.mark.parametrize("name", ["made", "beside", "replaced", ".hidden"])
def test_any_name_of_the_folder(name: str, work: Path) -> None:
    before = dict(snapshot(work))
    assert run_command("merge", "merge.yml", name, *QUIET) == 0
    assert new_in(work, before) == {name}
    assert f"\n# {name}\n" in Path(name, "README.md").read_text()
    if name == "replaced":
        assert run_command("merge", "merge.yml", name, *QUIET, "--force") == 0
        assert new_in(work, before) == {name}
    assert {path.name for path in Path(name).iterdir()} >= BESIDE


def test_without_a_card(work: Path) -> None:
    assert (
        run_command("merge", "merge.yml", "out", *QUIET, "--no-write-model-card") == 0
    )
    names = {path.name for path in Path("out").iterdir()}
    assert BESIDE <= names and "README.md" not in names


def test_the_files_are_scanned_once(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.scanning import once

    found = []
    original = once.scan_checkpoints

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(once, "scan_checkpoints", noted)
    assert run_command("merge", "merge.yml", "out", *QUIET) == 0
    assert len(found) == 1


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is full")


# What the command does after its checks, any of which may fail.
STEPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the figure": lambda patch: patch.setattr(
        "mergekit_metagpt.commands.merging.report_figure", fail
    ),
    "the export": lambda patch: patch.setattr(
        "mergekit_metagpt.merge_config.plain_yaml.export", fail
    ),
    "the merge": lambda patch: patch.setattr("mergekit.merge.run_merge", fail),
    "the last step": lambda patch: patch.setattr(
        "mergekit_metagpt.commands.placing.put", fail
    ),
}
CASES = list(itertools.product(STEPS, [False, True]))


@pytest.mark.parametrize(("step", "exists"), CASES)
def test_a_step_that_fails_leaves_nothing(
    step: str,
    exists: bool,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    STEPS[step](monkeypatch)
    if exists:
        Path("out").mkdir()
        Path("out/precious").write_text("kept")
    before = snapshot(work)
    capsys.readouterr()
    assert run_command("merge", "merge.yml", "out", *QUIET, "--force") == 2
    assert capsys.readouterr() == ("", "Error: the disk is full\n")
    assert snapshot(work) == before


def test_what_fails_when_all_weights_are_written_loses_none(
    work: Path,
    states: dict[str, State],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mergekit.merge.generate_card", fail)
    for number in ("", "-2"):
        capsys.readouterr()
        assert run_command("merge", "merge.yml", "out", *QUIET) == 2
        kept = work / f"out.unfinished{number}"
        message = capsys.readouterr().err.splitlines()[-1]
        assert (
            f"the disk is full. All merged weights are written and kept in {kept}, "
            in (message)
        )
        assert "without tokenizer_config.json" in message
        assert read_model(kept).keys() == states["base"].keys()
        assert {path.name for path in kept.iterdir()} > BESIDE
        assert not (work / "out").exists()


def test_a_folder_that_another_run_has_taken_over_is_left_to_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergekit_metagpt.commands import shards

    merged, token = shards._merge, work / ".out.parts" / "token"

    def taken_over(*args: Any, **kwargs: Any) -> None:
        merged(*args, **kwargs)
        token.write_text("theirs")

    monkeypatch.setattr(shards, "_merge", taken_over)
    assert run_command("merge", "merge.yml", "out", *QUIET, "--resume") == 2
    assert "another merge works in" in capsys.readouterr().err
    assert token.read_text() == "theirs"


def test_a_base_without_tokenizer_is_refused_before_the_merge(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(work)
    assert run_command("merge", "merge.yml", "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "no tokenizer" in message and "--no-copy-tokenizer" in message
    assert snapshot(work) == before


@pytest.mark.parametrize(
    "step",
    [
        "the merge",
        "the last step",
    ],
)
def test_a_step_that_fails_leaves_no_folder_above(
    step: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    STEPS[step](monkeypatch)
    before = snapshot(work)
    assert run_command("merge", "merge.yml", "deep/er/out", *QUIET) == 2
    assert snapshot(work) == before


def test_the_old_model_comes_back_if_the_new_one_cannot_take_its_place(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("kept")
    before = snapshot(work)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.parent.name == "made":
            raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert run_command("merge", "merge.yml", "out", *QUIET, "--force") == 2
    assert snapshot(work) == before


def test_slices_of_different_numbers_of_models(work: Path) -> None:
    def cut(layers: list[int], *names: str) -> dict[str, Any]:
        paths = [str(work / "m" / name) for name in names]
        return {"sources": [{"model": path, "layer_range": layers} for path in paths]}

    slices = [cut([0, 1], "base", "a", "b"), cut([1, 2], "base", "a")]
    config = merge_config(work / "m/base", [], slices=slices)
    theirs = run_mergekit(config, work.parent / "plain" / "out")
    Path("merge.yml").write_text(yaml.safe_dump(config))
    assert run_command("merge", "merge.yml", "out", *QUIET) == 0
    for name, tensor in read_model(Path("out")).items():
        assert_same_bits(tensor, theirs[name])


def test_models_of_two_architectures(tmp_path: Path) -> None:
    """As `mergekit-yaml` does: refused without `--allow-crimes`, merged with it."""
    from transformers import MistralConfig

    config = broken.write_good(tmp_path)
    shape = llama_config().to_dict()
    sizes = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads"),
    )
    mistral = MistralConfig(
        **{size: shape[size] for size in sizes}, architectures=["MistralForCausalLM"]
    )
    mistral.save_pretrained(tmp_path / "tuned1")
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    before = snapshot(tmp_path)
    assert run_command("merge", file, out, *QUIET) == 2
    assert snapshot(tmp_path) == before
    assert run_command("merge", file, out, *QUIET, "--allow-crimes") == 0
    assert {path.name for path in out.iterdir()} >= BESIDE


def test_all_warnings_of_the_report_are_said_once_before_the_merge(
    work: Path,
    states: dict[str, State],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also those that need more than a merge measures; the merge repeats none."""
    stranger = cast(tuned(states["base"], 5, size=1.0), torch.bfloat16)
    write_model(work / "m" / "b", stranger, llama_config(**SIZES))
    before = snapshot(work)
    assert run_command("merge", "merge.yml", "out", *QUIET) == 2
    assert snapshot(work) == before, "a merge with the wrong base was made"
    caplog.clear()
    assert run_command("merge", "merge.yml", "out", *QUIET, "--allow-crimes") == 0
    report = json.loads(Path("out/metagpt.json").read_text())
    (family,) = report["families"]
    ours = [r.getMessage() for r in caplog.records if r.name == "mergekit_metagpt"]
    warnings = [text for text in ours if not text.startswith("coefficients of ")]
    assert warnings == family["warnings"] and len(warnings) >= 2
    assert len(ours) == len(warnings) + 1
    assert any("Is it a fine-tune" in text for text in warnings)


def test_nobody_hears_that_mergekit_calls_dtype_by_its_old_name(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    log = logging.get_logger("transformers.configuration_utils")
    log.addHandler(caplog.handler)
    try:
        config = write_config(dtype="float32")
        logging.warning_once.cache_clear()  # it is logged once in a process
        assert run_command("merge", "merge.yml", "out", *QUIET) == 0
        assert "torch_dtype" not in caplog.text
        logging.warning_once.cache_clear()
        for entry in config["models"]:
            entry["model"] = f"./{entry['model']}"
        run_mergekit({**config, "base_model": "./m/base"}, work / "theirs")
        assert "torch_dtype" in caplog.text
    finally:
        log.removeHandler(caplog.handler)


@pytest.mark.parametrize("command", ["inspect", "merge", "export"])
def test_a_yaml_of_another_folder(
    command: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its relative paths are taken from the current folder, as mergekit does."""
    Path("m", "sub").mkdir()
    monkeypatch.chdir(work / "m" / "sub")
    for base, says in (("./m/base", f"run this in {work}"), ("./x", "they start")):
        file = work / "there.yml"
        file.write_text(yaml.safe_dump(merge_config(base, ["./m/a"])))
        out = [] if command == "inspect" else ["out"]
        assert run_command(command, file, *out) == 2
        said = capsys.readouterr().err
        assert f"{base} does not exist" in said and says in said
        assert str(Path.cwd()) in said and f"lies in {work}:" in said
    assert run_command("inspect", "--base", "../bse", "../a") == 2
    assert "Did you mean ../base?" in capsys.readouterr().err
    monkeypatch.chdir(work)
    for given, meant in (("MERGE.yml", "merge.yml"), ("./M", "m")):
        assert run_command("inspect", given) == 2
        assert f"Did you mean ./{meant}?" in capsys.readouterr().err


def test_warnings_of_tensors_that_the_report_does_not_see_stay(
    work: Path, states: dict[str, State], caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config()
    filtered = [{"filter": "mlp", "value": 1e-6}, {"value": 1.0}]
    config["models"][0]["parameters"] = {"weight": filtered}
    Path("merge.yml").write_text(yaml.safe_dump(config))
    assert run_command("merge", "merge.yml", "out", *QUIET) == 0
    assert re.search(r"m/a .*gets only|m/b .*takes", caplog.text)
