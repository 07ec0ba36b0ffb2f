"""`merge`: what it leaves beside the model, and that nothing else changes."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests import broken
from tests.broken import snapshot
from tests.conftest import Cli
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
    write_yaml,
)
from tests.merges import write_merge
from tests.oracle import assert_same_states, naive_coefficients, naive_sq_norms

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
    write_yaml(Path("merge.yml"), config)
    return config


def absolute(config: dict[str, Any], work: Path) -> dict[str, Any]:
    """The same merge for mergekit, which asks the hub for paths like `m/base`."""
    models = [{**m, "model": str(work / m["model"])} for m in config["models"]]
    return {**config, "base_model": str(work / "m/base"), "models": models}


def new_in(folder: Path, before: dict[str, Any]) -> set[str]:
    return {Path(name).parts[0] for name in snapshot(folder).keys() - before.keys()}


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_what_lies_beside_the_model(
    granularity: str, work: Path, states: dict[str, State], cli: Cli
) -> None:
    config = write_config(parameters={"granularity": granularity})
    before = dict(snapshot(work))
    theirs = work.parent / "plain" / "out"
    weights = run_mergekit(absolute(config, work), theirs)

    printed = cli("merge", "merge.yml", "out", *QUIET)
    assert printed.out == ""
    assert new_in(work, before) == {"out"}
    out = work / "out"
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    again = "mergekit-metagpt inspect out/mergekit_config.yml"
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"Wrote out ({size:,.1f} MB). ") and f"`{again}`" in last
    assert "`mergekit-metagpt verify out`" in last
    report = json.loads((out / "metagpt.json").read_text())
    cli(*again.split()[1:], "--json", "again.json")
    repeated = json.loads(Path("again.json").read_text())
    for first, second in zip(
        report["families"][0]["models"], repeated["families"][0]["models"], strict=True
    ):
        assert first["coefficient"] == second["coefficient"]

    # The files of mergekit, with the same bytes, and three more.
    written, found = snapshot(theirs), snapshot(out)
    assert found.keys() == written.keys() | BESIDE
    for name in written.keys() - {"README.md", "mergekit_config.yml"}:
        assert found[name] == written[name], name
    assert found["mergekit_config.yml"] == Path("merge.yml").read_bytes()

    # The report is that of `inspect` without inner products, the plain YAML that of
    # `export`.
    inspected = json.loads(cli("inspect", "merge.yml", "--json", "-").out)
    family = inspected["families"][0]
    family["cosines"] = family["lengths"]["merged"] = None
    for pool in (*family["pools"], *family["layers"]):
        assert pool["keep"] >= 1
        pool["keep"] = None
    sq_norms = naive_sq_norms(states["base"], [states["a"], states["b"]])
    assert [m["sq_norm"] for m in family["models"]] == pytest.approx(sq_norms.tolist())
    assert "not measured" in report["families"][0].pop("reading")
    assert "orthogonal" in family.pop("reading")
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
    text = (out / "mergekit_config.plain.yml").read_text()
    assert cli("export", "merge.yml", "-").out == text
    plain = yaml.safe_load(text)
    named = [plain["base_model"], *(entry["model"] for entry in plain["models"])]
    assert named == ["./m/base", "./m/a", "./m/b"]
    repeated = run_mergekit(absolute(plain, work), work.parent / "repeated")
    for name, tensor in repeated.items():
        assert tensor.dtype == weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(tensor, weights[name], rtol=2**-7, atol=1e-9)
    assert (out / "metagpt.png").read_bytes().startswith(b"\x89PNG")


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
    settings: dict[str, Any],
    formula: str,
    work: Path,
    states: dict[str, State],
    cli: Cli,
) -> None:
    write_config(parameters=settings)
    cli("merge", "merge.yml", "out", *QUIET)
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
    work: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(merge_method="metagpt_dare_ties", parameters={"density": 0.5})
    seed = ("--random-seed", "5")
    cli("merge", "merge.yml", "out", *QUIET, *seed)
    assert not said(caplog, "--random-seed")
    unseeded = cli("merge", "merge.yml", "unseeded", *QUIET)
    assert said(caplog, "give --random-seed N")
    assert unseeded.err.endswith("Without a seed, nobody can verify the merge\n")
    theirs = run_mergekit(absolute(config, work), work.parent / "plain" / "out", *seed)
    assert_same_states(read_model(Path("out")), theirs)
    text = Path("out/mergekit_config.plain.yml").read_text()
    assert "only with --random-seed 5.\n" in text
    plain = yaml.safe_load(text)
    assert plain["merge_method"] == "dare_ties"
    card = Path("out/README.md").read_text()
    assert "`dare_ties` takes the coefficients as its weights" in card
    # That is what the sum would have done, without dropping.
    assert "The merged model moved" not in card
    report = json.loads(Path("out/metagpt.json").read_text())
    assert report["method"] == "metagpt_dare_ties"


@pytest.mark.parametrize("name", ["made", "made/", "deep/er/made", ".hidden"])
def test_any_name_of_the_folder(name: str, work: Path, cli: Cli) -> None:
    before = dict(snapshot(work))
    for options in ([], ["--force"]):
        cli("merge", "merge.yml", name, *QUIET, *options)
        assert new_in(work, before) == {Path(name).parts[0]}
        assert {path.name for path in Path(name).iterdir()} >= BESIDE
        assert f"\n# {Path(name).name}\n" in Path(name, "README.md").read_text()


def test_the_current_folder(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_merge(
        work / "merge.yml", work / "m/base", [work / "m/a", work / "m/b"]
    )
    here = work / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    cli("merge", config, ".", *QUIET)
    assert here.samefile(".")
    assert read_model(here).keys() == read_model(work / "m/base").keys()
    assert "\n# here\n" in Path("README.md").read_text()


def test_without_a_card(work: Path, cli: Cli) -> None:
    cli("merge", "merge.yml", "out", *QUIET, "--no-write-model-card")
    names = {path.name for path in Path("out").iterdir()}
    assert BESIDE <= names and "README.md" not in names


def test_the_files_are_scanned_once(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.scanning import once

    found = []
    original = once.scan_checkpoints

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(once, "scan_checkpoints", noted)
    cli("merge", "merge.yml", "out", *QUIET)
    assert len(found) == 1


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is full")


# What the command does after its checks, any of which may fail.
STEPS = {
    "the figure": "mergekit_metagpt.commands.merging.report_figure",
    "the export": "mergekit_metagpt.merge_config.plain_yaml.export",
    "the merge": "mergekit.merge.run_merge",
    "the last step": "mergekit_metagpt.commands.placing.put",
}


@pytest.mark.parametrize("out", ["out", "deep/er/out", "existing"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing(
    step: str, out: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STEPS[step], fail)
    Path("existing").mkdir()
    Path("existing/precious").write_text("kept")
    before = snapshot(work)
    said = cli.refused("merge", "merge.yml", out, *QUIET, "--force")
    assert said == "Error: the disk is full"
    assert snapshot(work) == before


def test_what_fails_when_all_weights_are_written_loses_none(
    work: Path, states: dict[str, State], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit.merge.generate_card", fail)
    for number in ("", "-2"):
        printed = cli("merge", "merge.yml", "out", *QUIET, status=2)
        kept = work / f"out.unfinished{number}"
        message = printed.err.splitlines()[-1]
        assert "the disk is full. All merged weights are written" in message
        assert f"kept in {kept}, " in message
        assert "without tokenizer_config.json" in message
        assert read_model(kept).keys() == states["base"].keys()
        assert {path.name for path in kept.iterdir()} > BESIDE
        assert not (work / "out").exists()


def test_a_tokenizer_that_cannot_be_copied_is_an_error(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit only logs it, and says that the merge was successful."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")

    monkeypatch.setattr("mergekit.merge._copy_tokenizer", full)
    checks = "mergekit_metagpt.merge_config.tokenizer_checks.check_copied_tokenizer"
    monkeypatch.setattr(checks, lambda config, options: None)
    said = cli("merge", "merge.yml", "out", "--quiet", status=2).err
    assert "tokenizer.json" in said and "kept in" in said
    assert "Other files there may be cut short" in said
    assert not (work / "out").exists()


def test_a_folder_that_another_run_has_filled_is_left_to_it(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.merge_config import running

    merged = running.run

    def filled(*args: Any, **kwargs: Any) -> None:
        merged(*args, **kwargs)
        (work / "out").mkdir()
        (work / "out" / "config.json").write_text("theirs")

    monkeypatch.setattr(running, "run", filled)
    printed = cli("merge", "merge.yml", "out", *QUIET, status=2)
    assert "out exists and is not empty" in printed.err
    assert (work / "out" / "config.json").read_text() == "theirs"
    assert (work / "out.unfinished" / "metagpt.json").is_file()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--num-threads", "0", "--num-threads is 0; expected"),
        ("--device", "cuda:99", "run on cuda:99, which torch does not see"),
        ("--lora-merge-dtype", "fp8", "--lora-merge-dtype is fp8; expected"),
        ("--lora-merge-cache", "merge.yml", "merge.yml is a file; expected a folder"),
        ("--random-seed", "-1", "--random-seed is -1; expected a number from 0"),
        ("--out-shard-size", "5GB", "--out-shard-size is no whole number"),
    ],
)
def test_options_that_cannot_be(
    option: str, value: str, says: str, work: Path, cli: Cli
) -> None:
    assert says in cli.refused("merge", "merge.yml", "out", option, value)


def test_a_full_disk_is_noticed_before_anything_is_measured(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights,) = (work / "m" / "base").glob("*.safetensors")
    size = weights.stat().st_size

    def usage(path: Path) -> SimpleNamespace:
        assert path == work
        return SimpleNamespace(total=1, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = int(0.9 * size)
    for options in ([], ["--resume"]):
        said = cli.refused("merge", "merge.yml", "out", *QUIET, *options)
        assert "the merged model takes 0.00 GB, and " in said
    assert not (work / "out").exists()
    free = size
    cli("merge", "merge.yml", "out", *QUIET)


def test_force_does_not_remove_a_folder_of_folders(work: Path, cli: Cli) -> None:
    (work / "models" / "precious").mkdir(parents=True)
    said = cli.refused("merge", "merge.yml", "models", *QUIET, "--force")
    assert "is no model, and --force would remove the folder precious in it" in said
    (work / "models" / "precious").rename(work / "models" / ".models.abcd")  # ours
    cli("merge", "merge.yml", "models", *QUIET, "--force")
    (work / "models" / "folder").mkdir()  # it is a model now
    cli("merge", "merge.yml", "models", *QUIET, "--force")


def test_a_folder_that_was_filled_while_a_rank_merged(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished files stay, for a run that may replace it."""
    from mergekit_metagpt.merge_config import running

    completed = running.run_without_tensors

    def filled(*args: Any, **kwargs: Any) -> None:
        completed(*args, **kwargs)
        (work / "out").mkdir(exist_ok=True)
        (work / "out" / "theirs").touch()

    monkeypatch.setattr(running, "run_without_tensors", filled)
    printed = cli("merge", "merge.yml", "out", *QUIET, "--resume", status=2)
    assert "out exists and is not empty" in printed.err
    assert (work / "out" / "theirs").exists()
    cli("merge", "merge.yml", "out", *QUIET, "--resume", "--force")
    assert not (work / "out" / "theirs").exists()
    assert read_model(Path("out"))


def test_a_merge_by_ranks_that_is_unfinished(work: Path, cli: Cli) -> None:
    (work / ".out.parts").mkdir()
    said = cli.refused("merge", "merge.yml", "out", *QUIET)
    assert ".out.parts holds an unfinished merge" in said and "--resume" in said
    assert not (work / "out").exists()


def test_control_c_with_resume_says_what_is_finished(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.commands import placing, shards

    merge = ("merge", "merge.yml", "out", *QUIET, "--out-shard-size", "20K")
    note, noted = shards._note, []

    def interrupted(*args: Any) -> Any:
        noted.append(note(*args))
        if len(noted) == 2:
            raise KeyboardInterrupt
        return noted[-1]

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_note", interrupted)
        last = cli(*merge, "--resume", status=130).err.splitlines()[-1]
    assert last.startswith("Aborted! Finished files for out: 2, in ")
    assert str(work / ".out.parts") in last and "--resume goes on" in last
    said = cli.refused(*merge)
    assert "with --resume or under torchrun" in said and "2 files are finished" in said

    remove, removed = placing.remove, []

    def cut_short(folder: Path, out: Path) -> None:
        removed.append(folder)
        if removed.count(work / ".out.parts") == 1 and folder.name == ".out.parts":
            raise KeyboardInterrupt
        remove(folder, out)

    monkeypatch.setattr(placing, "remove", cut_short)
    last = cli(*merge, "--resume", status=130).err.splitlines()[-1]
    assert last == "Aborted! out is complete all the same."
    assert read_model(Path("out")) and not (work / ".out.parts").exists()


def test_a_misspelt_source_of_the_tokenizer(work: Path, cli: Cli) -> None:
    write_config(tokenizer_source="unoin")
    said = cli.refused("merge", "merge.yml", "out", *QUIET)
    assert "tokenizer_source is 'unoin'" in said and "mean union?" in said
    for source in (
        {"tokenizer_source": "./m/bas"},
        {"tokenizer": {"source": "./m/bas"}},
    ):
        write_config(**source)
        said = cli.refused("merge", "merge.yml", "out", *QUIET)
        assert "source: ./m/bas does not exist" in said and "mean ./m/base?" in said


def test_a_place_below_a_file(work: Path, cli: Cli) -> None:
    said = cli.refused("merge", "merge.yml", "merge.yml/out", *QUIET)
    assert "merge.yml is a file; expected a folder" in said


@pytest.mark.parametrize("out", ["/proc/out", "o" * 300])
def test_a_place_where_no_folder_can_be_made(
    out: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = "mergekit_metagpt.merge_config.jobs.check"
    monkeypatch.setattr(reading, lambda *args: pytest.fail("read a header"))
    said = cli.refused("merge", "merge.yml", out, *QUIET)
    assert said.startswith(f"Error: {work / out}") and said.count(out) == 1


def test_two_that_resume_at_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one has written its token over that of the first."""
    from mergekit_metagpt.commands import shards
    from mergekit_metagpt.scanning import ranks

    (work / shards.TOKEN).write_text("theirs")
    monkeypatch.setattr(shards, "SEEN_S", 0.0)
    with pytest.raises(ValueError, match="another merge works in"):
        shards.await_token(work, "ours", ranks.alone())


def test_a_folder_that_another_run_has_taken_over_is_left_to_it(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.commands import shards

    merged, token = shards._merge, work / ".out.parts" / "token"

    def taken_over(*args: Any, **kwargs: Any) -> None:
        merged(*args, **kwargs)
        token.write_text("theirs")

    monkeypatch.setattr(shards, "_merge", taken_over)
    printed = cli("merge", "merge.yml", "out", *QUIET, "--resume", status=2)
    assert "another merge works in" in printed.err
    assert token.read_text() == "theirs"


def test_a_base_without_tokenizer_is_refused_before_the_merge(
    work: Path, cli: Cli
) -> None:
    before = snapshot(work)
    message = cli("merge", "merge.yml", "out", status=2).err.splitlines()[-1]
    assert "no tokenizer" in message and "--no-copy-tokenizer" in message
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


def test_slices_of_different_numbers_of_models(work: Path, cli: Cli) -> None:
    slices = [
        {
            "sources": [
                {"model": str(work / "m" / name), "layer_range": layers}
                for name in names
            ]
        }
        for layers, names in (([0, 1], ("base", "a", "b")), ([1, 2], ("base", "a")))
    ]
    config = merge_config(work / "m/base", [], slices=slices)
    theirs = run_mergekit(config, work.parent / "plain" / "out")
    cli("merge", write_yaml(Path("merge.yml"), config), "out", *QUIET)
    assert_same_states(read_model(Path("out")), theirs)


def test_models_of_two_architectures(tmp_path: Path, cli: Cli) -> None:
    """As `mergekit-yaml` does: refused without `--allow-crimes`, merged with it."""
    from transformers import MistralConfig

    file = write_yaml(tmp_path / "merge.yml", broken.write_good(tmp_path))
    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    mistral = MistralConfig.from_dict({**llama_config().to_dict(), **named})
    mistral.save_pretrained(tmp_path / "tuned1")
    out = tmp_path / "out"
    before = snapshot(tmp_path)
    cli("merge", file, out, *QUIET, status=2)
    assert snapshot(tmp_path) == before
    cli("merge", file, out, *QUIET, "--allow-crimes")
    assert {path.name for path in out.iterdir()} >= BESIDE


def test_all_warnings_of_the_report_are_said_once_before_the_merge(
    work: Path, states: dict[str, State], cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that need more than a merge measures; the merge repeats none."""
    stranger = cast(tuned(states["base"], 5, size=1.0), torch.bfloat16)
    write_model(work / "m" / "b", stranger, llama_config(**SIZES))
    before = snapshot(work)
    cli("merge", "merge.yml", "out", *QUIET, status=2)
    assert snapshot(work) == before, "a merge with the wrong base was made"
    caplog.clear()
    cli("merge", "merge.yml", "out", *QUIET, "--allow-crimes")
    (family,) = json.loads(Path("out/metagpt.json").read_text())["families"]
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
        run_mergekit(absolute(config, work), work / "theirs")
        assert "torch_dtype" in caplog.text
    finally:
        log.removeHandler(caplog.handler)


def test_a_model_that_is_alone_is_noticed(
    work: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    write_merge(work / "one.yml", "./m/base", ["./m/a"])
    cli("merge", "one.yml", "out", *QUIET)
    assert "./m/a is the only model beside the base ./m/base: its" in caplog.text


@pytest.mark.parametrize("command", ["inspect", "merge", "export"])
def test_a_yaml_of_another_folder(
    command: str, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its relative paths are taken from the current folder, as mergekit does."""
    Path("m", "sub").mkdir()
    monkeypatch.chdir(work / "m" / "sub")
    for base, says in (("./m/base", f"run this in {work}"), ("./x", "they start")):
        file = write_merge(work / "there.yml", base, ["./m/a"])
        said = cli.refused(command, file, *([] if command == "inspect" else ["out"]))
        assert f"{base} does not exist" in said and says in said
        assert str(Path.cwd()) in said and f"lies in {work}:" in said
    assert "Did you mean ../base?" in cli.refused("inspect", "--base", "../bse", "../a")
    monkeypatch.chdir(work)
    file = write_merge(work / "m" / "typo.yml", "./m/bse", ["./m/a"])
    assert "./m/bse does not exist; expected" in cli.refused("inspect", file)
    for given, meant in (("MERGE.yml", "merge.yml"), ("./M", "m")):
        assert f"Did you mean ./{meant}?" in cli.refused("inspect", given)


def test_warnings_of_tensors_that_the_report_does_not_see_stay(
    work: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config()
    filtered = [{"filter": "mlp", "value": 1e-6}, {"value": 1.0}]
    config["models"][0]["parameters"] = {"weight": filtered}
    cli("merge", write_yaml(Path("merge.yml"), config), "out", *QUIET)
    assert re.search(r"m/a .*gets only|m/b .*takes", caplog.text)
