"""`compare --task`: scores of the EleutherAI harness against a computation by hand."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergekit_metagpt.commands import demo, harness
from mergekit_metagpt.report import ranking, scoring
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.cache import TaskScores
from tests.families import run_command

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SMALL: dict[str, Any] = {"steps": (40, 10, 15, 20), "width": 32}
COUNT = 24


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained family, a text, `merge.yml`, and a task with its data."""
    folder = tmp_path_factory.mktemp("trained")
    made = demo.make_family(folder / "m", **SMALL)
    config = {
        "merge_method": "metagpt",
        "base_model": str(made.base),
        "models": [{"model": str(path)} for path in made.specialists.values()],
        "dtype": "float32",
    }
    (folder / "merge.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = demo.text("arithmetic", 2_000, held_out=True)
    (folder / "arithmetic.txt").write_text(text)
    lines = [
        {"question": f"{n} + {n} =", "choices": [f" {2 * n}", f" {n + 7}"], "answer": 0}
        for n in range(10, 10 + COUNT)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    for file in folder.rglob("*"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture
def installed() -> None:
    """Skips where lm-eval is not installed."""
    pytest.importorskip(
        "lm_eval", reason='lm-eval is not installed: pip install ".[eval]"'
    )


@pytest.fixture(autouse=True)
def places(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a place for merges and data sets of the test's own."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if "datasets" in sys.modules:  # which reads the variable once
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    monkeypatch.chdir(family)
    return tmp_path


def run(*arguments: str) -> int:
    return run_command("compare", "merge.yml", "--device", "cpu", *arguments)


def scored(out: Path, *arguments: str) -> dict[str, Any]:
    file = out / "found.json"
    assert run(*arguments, "--json", str(file), "--force") == 0
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


def by_hand(folder: Path, data: Path) -> list[float]:
    """1 for each document whose right answer is the likelier one, else 0."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = []
    for line in data.read_text().splitlines():
        document, likelihoods = json.loads(line), []
        first = tokenizer(document["question"])["input_ids"]
        for choice in document["choices"]:
            ids = torch.tensor([*first, *tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].double().log_softmax(-1)
            told = range(len(first) - 1, len(ids) - 1)
            likelihoods.append(sum(float(log_p[n, ids[n + 1]]) for n in told))
        right.append(float(likelihoods[0] > likelihoods[1]))
    return right


@pytest.mark.usefixtures("installed")
def test_scores_are_those_of_an_evaluation_by_hand(
    family: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = places / "best.yml"
    tasks = ("--task", "sums.yaml", "--power", "-1")
    found = scored(places, *tasks, "--write", str(best))
    comments = best.read_text()
    assert "# Scored on tasks of lm-eval: sums.\n" in comments
    assert f"# {found['verdict']}\n" in comments and "ALD" not in comments
    shown = capsys.readouterr()
    assert (found["texts"], found["models"], found["candidates"]) == ([], [], [])
    scoring = found["scoring"]
    assert scoring["tasks"] == [
        {"name": "sums", "metric": "acc", "higher_is_better": True, "documents": COUNT}
    ]
    folders = {name: family / "m" / name for name in ("base", *demo.SPECIALTIES)}
    rows = {row["name"]: row for row in scoring["models"]}
    assert rows.keys() == folders.keys()
    for name, folder in folders.items():
        right = by_hand(folder, family / "sums.jsonl")
        mean = sum(right) / COUNT
        error = math.sqrt(sum((r - mean) ** 2 for r in right) / (COUNT - 1) / COUNT)
        score = rows[name]["scores"][0]["acc"]
        assert score["value"] == pytest.approx(mean)
        assert score["error"] == pytest.approx(error)
        assert rows[name]["mean"] == score
        assert {"acc", "acc_norm"} == rows[name]["scores"][0].keys()
    ranked = [row["mean"]["value"] for row in scoring["candidates"]]
    assert ranked == sorted(ranked, reverse=True)
    assert found["best"] == scoring["candidates"][0]["name"]
    assert "power -1" in {row["name"] for row in scoring["candidates"]}
    assert found["verdict"] == scoring["verdict"]
    assert found["verdict"] in shown.out and "1: sums, acc, 24 documents" in shown.out
    assert "it/s" not in shown.err  # the harness is silent


@pytest.mark.usefixtures("installed")
def test_texts_and_tasks_together_and_remembered(
    family: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ["--text", "arithmetic=arithmetic.txt", "--context", "64"]
    both += ["--task", "sums.yaml", "--limit", "10"]
    found = scored(places, *both)
    assert found["best"] == found["candidates"][0]["name"]  # by the texts
    assert found["scoring"]["tasks"][0]["documents"] == 10
    names = [row["name"] for row in found["candidates"]]
    assert sorted(names) == sorted(r["name"] for r in found["scoring"]["candidates"])

    calls = []
    original = harness.score

    def counted(*arguments: Any) -> TaskScores:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(harness, "score", counted)
    assert scored(places, *both) == found
    assert calls == []
    scored(places, *both, "--power", "-1")
    assert len(calls) == 1
    data = family / "sums.jsonl"
    before = data.read_text()
    try:
        data.write_text(before.replace("10 + 10", "10 + 11"))
        calls.clear()
        scored(places, *both)
        assert len(calls) == len(found["models"]) + len(names)
    finally:
        data.write_text(before)


@pytest.mark.usefixtures("installed")
def test_tasks_that_cannot_be_loaded(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "bad.yaml").write_text("task: bad\ndataset_path: json\n")
    assert run("--task", str(places / "bad.yaml")) == 2
    assert "bad.yaml cannot be loaded" in capsys.readouterr().err.splitlines()[-1]
    assert run("--task", "sums.yaml", "--task", "sums.yaml") == 2
    assert "sums is given twice" in capsys.readouterr().err.splitlines()[-1]
    assert run("--task", "sums.yaml", "--plot", "f.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "Error: --plot is for texts; expected --text MODEL=FILE"


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert run("--task", "sums.yaml") == 2
    assert 'pip install ".[eval]"' in capsys.readouterr().err.splitlines()[-1]


def scores(metric: str, values: list[float], *, higher: bool = True) -> TaskScores:
    return TaskScores(documents={metric: values}, higher_is_better={metric: higher})


def test_means_over_tasks_and_paired_errors() -> None:
    measured = {
        "base": [scores("acc", [0, 0, 1, 0]), scores("loss", [2, 4], higher=False)],
        "one": [scores("acc", [1, 0, 1, 1]), scores("loss", [1, 2], higher=False)],
        "two": [scores("acc", [1, 0, 1, 0]), scores("loss", [1, 2], higher=False)],
    }
    merges = {name: ranking.Merge([name], "") for name in ("two", "one")}
    found = scoring.compare(["a", "b"], measured, merges, "0")
    assert [row.name for row in found.candidates] == ["one", "two"]
    one, two = found.candidates
    assert one.mean.value == pytest.approx((0.75 - 1.5) / 2)
    error = math.sqrt(0.25**2 + 0.5**2) / 2  # std / sqrt(n) of each task
    assert one.mean.error == pytest.approx(error)
    assert two.below_best == pytest.approx(0.125)
    assert two.below_best_error == pytest.approx(0.125)  # the losses cancel
    assert not two.beyond_noise
    assert "mean score better by 0.1250±0.1250 than two: no difference" in found.verdict


@pytest.mark.parametrize(
    ("merge", "end"),
    [
        ([0, 1, 1], "base alone scored better, but not beyond noise."),
        ([0, 0, 0], "base alone scored better."),
    ],
)
def test_what_is_better_without_a_merge_is_said(merge: list[float], end: str) -> None:
    found = scoring.compare(
        ["a"],
        {"base": [scores("acc", [1, 1, 1])], "one": [scores("acc", merge)]},
        {"one": ranking.Merge(["one"], "")},
        "0",
    )
    assert found.verdict.endswith(f"But without any merge, {end}")
