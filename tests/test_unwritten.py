"""Weights that mergekit would not write: seen beforehand, from headers alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_metagpt.method.plan_watch import PlanWatch
from mergekit_metagpt.scanning import once
from tests.broken import snapshot
from tests.families import (
    State,
    llama_state,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.layouts import LOADED, ORIGINAL, Trio, save_trio
from tests.merges import write_merge

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Stored names that mergekit does not write, and all stored names.
LOST = {"DeepSeek-V3": (24, 67), "ViT": (32, 40)}


@pytest.fixture(scope="module", params=LOST)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trio(name: str, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return save_trio(tmp_path_factory.mktemp("trio"), name)


def report_of(*arguments: str | Path, folder: Path) -> Any:
    file = folder / "report.json"
    assert run_command("inspect", *arguments, "--json", file, "--force") == 0
    return json.loads(file.read_text())


def missing(model: Path) -> set[str]:
    """What transformers would have to initialise afresh."""
    import transformers

    (name,) = json.loads((model / "config.json").read_text())["architectures"]
    _, info = getattr(transformers, name).from_pretrained(
        model, output_loading_info=True
    )
    return set(info["missing_keys"])


def test_a_merge_that_loses_weights_is_refused(
    name: str, trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *models = trio.folders[ORIGINAL]
    file = write_merge(tmp_path / "merge.yml", base, models)
    before = snapshot(tmp_path)
    assert run_command("merge", file, tmp_path / "out", "--no-copy-tokenizer") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    lost, stored = LOST[name]
    assert f"{lost} of {stored} tensors of {base}" in message
    assert "save_original_format=False" in message
    assert snapshot(tmp_path) == before

    report = report_of(file, folder=tmp_path)
    assert report["refused"] in message
    assert report["families"][0]["models"][0]["sq_norm"] > 0


def test_mergekit_loses_them_and_the_method_warns(
    name: str, trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, *models = trio.folders[ORIGINAL]
    merged = run_mergekit(merge_config(base, models), tmp_path / "out")
    lost, stored = LOST[name]
    assert len(read_model(base).keys() - merged.keys()) == lost
    assert missing(tmp_path / "out")
    (warning,) = said(caplog, "would not write")
    assert f"{lost} of {stored} tensors" in warning


def test_the_way_out_that_is_named_leads_out(
    trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, *models = trio.folders[LOADED]
    file = write_merge(tmp_path / "merge.yml", base, models)
    out = tmp_path / "out"
    assert run_command("merge", file, out, "--no-copy-tokenizer", "--quiet") == 0
    assert missing(out) == set()
    assert not said(caplog, "would not write")
    assert report_of(file, folder=tmp_path)["refused"] is None


UNREAD = {
    "model.layers.3.eh_proj.weight": (32, 32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.mtp.0.weight": (8, 8),
}


def test_tensors_that_no_model_reads_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer that predicts further tokens, and a buffer of an older version."""
    extra = {name: torch.ones(shape) for name, shape in UNREAD.items()}
    states: list[State] = [llama_state() | extra]
    states += [tuned(states[0], seed) for seed in (1, 2)]
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    file = write_merge(tmp_path / "merge.yml", folders[0], folders[1:])
    out = tmp_path / "out"
    assert run_command("merge", file, out, "--no-copy-tokenizer", "--quiet") == 0
    assert states[0].keys() - read_model(out).keys() == UNREAD.keys()
    assert not said(caplog, "would not write")
    left = report_of(file, folder=tmp_path)["families"][0]["base"]["not_written"]
    assert (left["count"], set(left["examples"])) == (3, UNREAD.keys())


def test_looking_from_two_threads_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    from transformers import PreTrainedModel

    from mergekit_metagpt.checkpoints.unwritten import lost

    state = llama_state()
    checkpoint = once.open_checkpoint(write_model(tmp_path, state))
    name = "model.layers.0.mlp.up_proj.weight"
    before = PreTrainedModel.tie_weights, torch.get_default_dtype()
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda _: lost(checkpoint, state.keys() - {name}), range(20))
    assert [list(tensors) for tensors in found] == [[name]] * 20
    assert (PreTrainedModel.tie_weights, torch.get_default_dtype()) == before


def test_a_plan_is_not_mixed_up_with_one_that_another_thread_begins() -> None:
    watch = PlanWatch()
    plan = ("model.layers[0]", ["base", "tuned"], "base")
    watch.saw_slice(*plan)
    for name in ("first", "second"):
        watch.saw_tensor(name, plan[1], "base")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch.saw_slice, *plan).result()
    mine = watch.of("base")
    assert mine and mine.take_names() == {"first", "second"}


def test_what_was_planned_must_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mergekit.io.tasks import SaveTensor

    lost = "model.layers.1.mlp.up_proj.weight"
    execute = SaveTensor.execute

    def forgetful(self: Any, **arguments: Any) -> None:
        if self.tensor_name != lost:
            execute(self, **arguments)

    base = llama_state()
    folders = [
        write_model(tmp_path / str(seed), tuned(base, seed)) for seed in range(3)
    ]
    file = write_merge(tmp_path / "merge.yml", folders[0], folders[1:])
    monkeypatch.setattr(SaveTensor, "execute", forgetful)
    out = tmp_path / "out"
    assert run_command("merge", file, out, "--no-copy-tokenizer", "--quiet") == 2
    assert lost in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
