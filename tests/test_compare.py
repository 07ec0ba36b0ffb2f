"""`compare`: losses, errors and the winner, each against a computation of its own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from mergekit_metagpt.commands import demo, losses
from mergekit_metagpt.merge_config import candidates, running
from mergekit_metagpt.report import comparison, ranking
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.cache import ChunkLosses
from tests.broken import snapshot
from tests.conftest import Cli
from tests.families import (
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    write_yaml,
)
from tests.oracle import assert_same_states

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL: dict[str, Any] = {"steps": (40, 10, 15, 20), "width": 32}
CONTEXT, BYTES = 64, 2_000
SETTINGS = ("--context", str(CONTEXT), "--device", "cpu")
USUAL = ["metagpt", "power 1", "average", "task arithmetic 0.3", "no embeddings"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained family, its texts and `merge.yml`; long unchanged."""
    folder = tmp_path_factory.mktemp("trained")
    made = demo.make_family(folder / "m", **SMALL)
    for name in ("general", *demo.SPECIALTIES):
        text = demo.text(name, BYTES, held_out=True)
        (folder / f"{name}.txt").write_text(text)
    config = merge_config(made.base, [*made.specialists.values()], dtype="bfloat16")
    write_yaml(folder / "merge.yml", config)
    for file in (folder / "m").rglob("*"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture(autouse=True)
def places(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A cache and a place for merges of the test's own; no merge stays there."""
    merges = tmp_path / "merges"
    merges.mkdir()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(merges))
    monkeypatch.chdir(family)
    before = snapshot(family)
    yield tmp_path
    assert list(merges.iterdir()) == []
    assert snapshot(family) == before, "something was left beside the models"


@pytest.fixture
def copy(family: Path, places: Path) -> Path:
    """The models and `merge.yml` in a folder of the test's own, to be changed."""
    shutil.copytree(family / "m", places / "m")
    text = (family / "merge.yml").read_text()
    (places / "merge.yml").write_text(text.replace(str(family), str(places)))
    return places


def texts_of(*names: str) -> list[str]:
    return [part for name in names for part in ("--text", f"{name}={name}.txt")]


ALL = texts_of("arithmetic", "logs", "code", "general")


def run(*arguments: str, config: str = "merge.yml") -> int:
    return run_command("compare", config, *SETTINGS, *arguments)


def compared(out: Path, *arguments: str, config: str = "merge.yml") -> dict[str, Any]:
    """Run `compare` and return what it wrote as JSON."""
    file = out / "found.json"
    assert run(*arguments, "--json", str(file), "--force", config=config) == 0
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


def refused(cli: Cli, *arguments: str, config: str = "merge.yml") -> str:
    """The last line of a comparison that ends with status 2 and prints no table."""
    printed = cli("compare", config, *SETTINGS, *arguments, status=2)
    assert printed.out == ""
    return printed.err.splitlines()[-1]


@pytest.fixture(scope="module")
def remembered() -> dict[str, Any]:
    return {}


@pytest.fixture
def found(places: Path, remembered: dict[str, Any]) -> dict[str, Any]:
    """The comparison on all texts, made once."""
    if not remembered:
        remembered.update(compared(places, *ALL))
    return remembered


def naive_chunks(folder: Path, text: str) -> list[float]:
    """Loss of each chunk, in float64 from the logits on, by its own tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    sums = []
    for at in range(0, len(ids), CONTEXT):
        part = torch.tensor(ids[at : at + CONTEXT])
        with torch.no_grad():
            log_p = model(part[None]).logits[0].double().log_softmax(-1)
        sums.append(-sum(float(log_p[n, t]) for n, t in enumerate(part[1:])))
    return sums


def sizes_of(text: str) -> list[int]:
    return [len(text[at : at + CONTEXT]) - 1 for at in range(0, len(text), CONTEXT)]


def naive_error(residuals: list[float], total: int) -> float:
    count = len(residuals)
    return math.sqrt(count / (count - 1) * sum(r * r for r in residuals)) / total


def test_losses_and_errors_are_those_of_an_evaluation_by_hand(
    family: Path, found: dict[str, Any], places: Path
) -> None:
    texts = {name: (family / f"{name}.txt").read_text() for name in demo.SPECIALTIES}
    texts["general"] = (family / "general.txt").read_text()
    rows = {row["name"]: row for row in (*found["models"], *found["candidates"])}
    assert list(rows)[:4] == ["base", *demo.SPECIALTIES]
    assert {*rows} == {"base", *demo.SPECIALTIES, "as written", *USUAL} - {"metagpt"}
    assert [text["name"] for text in found["texts"]] == list(texts)
    folders = {name: family / "m" / name for name in ("base", *demo.SPECIALTIES)}
    for row in found["candidates"]:
        out = places / row["name"].replace(" ", "-")
        run_mergekit(yaml.safe_load(row["yaml"]), out, "--copy-tokenizer")
        folders[row["name"]] = out

    sums = {
        (name, at): naive_chunks(folder, text)
        for name, folder in folders.items()
        for at, text in texts.items()
    }
    for k, (at, text) in enumerate(texts.items()):
        sizes, total = sizes_of(text), sum(sizes_of(text))
        assert found["texts"][k]["tokens"] == found["texts"][k]["bytes"] == total
        for name, row in rows.items():
            loss = row["losses"][k]
            mean = sum(sums[name, at]) / total
            assert loss["per_token"] == pytest.approx(mean, rel=1e-4)
            assert loss["per_byte"] == loss["per_token"]  # a byte is a token here
            pairs = zip(sums[name, at], sizes, strict=True)
            error = naive_error([s - mean * n for s, n in pairs], total)
            assert loss["per_token_error"] == pytest.approx(error, rel=1e-3)

    def gap(name: str, others: list[str]) -> tuple[float, float]:
        """Mean over the specialists' texts of a paired difference, and its error."""
        means, variance = [], 0.0
        for at, other in zip(demo.SPECIALTIES, others, strict=True):
            sizes, total = sizes_of(texts[at]), sum(sizes_of(texts[at]))
            pairs = zip(sums[name, at], sums[other, at], strict=True)
            less = [a - b for a, b in pairs]
            mean = sum(less) / total
            means.append(mean)
            residuals = [d - mean * n for d, n in zip(less, sizes, strict=True)]
            variance += naive_error(residuals, total) ** 2
        return sum(means) / len(means), math.sqrt(variance) / len(means)

    best = min(
        (row["name"] for row in found["candidates"]),
        key=lambda name: gap(name, list(demo.SPECIALTIES))[0],
    )
    assert found["best"] == best == found["candidates"][0]["name"]
    for name, row in rows.items():
        ald, error = gap(name, list(demo.SPECIALTIES))
        assert row["ald"] == pytest.approx(ald, rel=1e-4, abs=1e-6)
        assert row["ald_error"] == pytest.approx(error, rel=1e-2, abs=1e-6)
    for row in found["candidates"]:
        above, error = gap(row["name"], [best] * 3)
        assert row["above_best"] == pytest.approx(above, rel=1e-2, abs=1e-6)
        assert row["above_best_error"] == pytest.approx(error, rel=2e-2, abs=1e-6)
        assert row["beyond_noise"] == (row["above_best"] > 2 * row["above_best_error"])
        # Pairing is what makes small differences visible.
        assert row["above_best_error"] < row["ald_error"]
    assert f"Best on these texts: {best}, " in found["verdict"]
    assert (found["unit"], found["context"], found["dtype"]) == (
        *("token", CONTEXT, "float32"),
    )


def test_candidates_are_the_closed_form_with_these_parameters(
    found: dict[str, Any], family: Path
) -> None:
    given = yaml.safe_load((family / "merge.yml").read_text())
    by_name = {row["name"]: row for row in found["candidates"]}
    assert by_name["as written"]["names"] == ["as written", "metagpt"]
    assert by_name["as written"]["yaml"] == (family / "merge.yml").read_text()
    assert by_name["as written"]["meaning"].startswith("the YAML as it was given; ")
    assert by_name["average"]["meaning"] == "equal weights"
    summed = by_name["task arithmetic 0.3"]["meaning"]
    assert summed == "each model's change times 0.3"
    parameters = {
        "power 1": {"power": 1.0},
        "average": {"power": 0.0},
        "task arithmetic 0.3": {"power": 0.0, "lambda": 0.9},
        "no embeddings": {"exclude": "embed_tokens,lm_head"},
    }
    for name, expected in parameters.items():
        document = yaml.safe_load(by_name[name]["yaml"])
        assert document == {**given, "parameters": expected}


def test_the_parameters_of_another_method_are_left_out() -> None:
    layers = {"layer_range": [0, 1]}
    sources = [{"model": "b", **layers}]
    sources.append({"model": "a", **layers, "parameters": {"weight": 2}})
    given = {
        "merge_method": "ties",
        "base_model": "b",
        "slices": [{"sources": sources, "parameters": {"density": 0.2}}],
        "parameters": {"normalize": True},
        "dtype": "float32",
    }
    written = candidates.by_metagpt(yaml.safe_dump(given), {"power": 1.0})
    document = yaml.safe_load(written)
    assert document["merge_method"] == "metagpt"
    assert document["parameters"] == {"power": 1.0} and document["dtype"] == "float32"
    assert written.count("parameters") == 1 and "layer_range" in written


def judged(
    losses: Mapping[str, list[Any]], models: Mapping[str, str | None] | None = None
) -> comparison.Comparison:
    """Compare merges by given losses on texts of nine chunks.

    Args:
        losses: for `base`, the specialist `t` and each merge, its loss on each text, or
            one for every chunk of it.
        models: the model of each text, by the text's name.
    """
    rows = {
        name: [
            ChunkLosses(
                losses=loss if isinstance(loss, list) else [loss] * 9,
                tokens=[1] * 9,
                bytes=[1] * 9,
            )
            for loss in of_texts
        ]
        for name, of_texts in losses.items()
    }
    texts = [
        comparison.Text(name=name, file=name, model=of, chunks=9, tokens=9, bytes=9)
        for name, of in (models or {"t": "t"}).items()
    ]
    merges = {n: ranking.Merge([n], "") for n in losses if n not in ("base", "t")}
    about = {"versions": {}, "context": 8, "dtype": "float32", "device": "cpu"}
    return comparison.compare(texts, rows, merges, about)


def test_equal_merges_are_made_once_and_never_differ(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = running.run

    def counted(config: Any, *args: Any, **options: Any) -> None:
        made.append(config)
        original(config, *args, **options)

    monkeypatch.setattr(running, "run", counted)
    document = yaml.safe_load(Path("merge.yml").read_text())
    same = write_yaml(places / "same.yml", {**document, "parameters": {"power": 1}})
    thrice = {**document, "parameters": {"weight": 3.0}}
    other = write_yaml(places / "other.yml", thrice)
    arguments = [*texts_of("code"), "--power", "2,-1", "--lambda", "1,0.5, keep"]
    arguments += ["--candidate", f"mine={same}", "--candidate", f"thrice={other}"]
    found = compared(places, *arguments)
    names = {row["name"]: row["names"] for row in found["candidates"]}
    assert names["as written"] == ["as written", "metagpt", "power 2", "lambda 1"]
    assert names["power 1"] == ["power 1", "mine"]
    assert {"power -1", "lambda 0.5", "lambda keep", "thrice"} < names.keys()
    assert len(made) == len(names) == 9
    rows = {row["name"]: row for row in found["candidates"]}
    # Written otherwise, and the same weights: the models' weights cancel.
    assert rows["thrice"]["ald"] == rows["as written"]["ald"]
    shown = judged({"t": [1.0], "one": [1.0], "two": [1.0]})
    assert not any(row.beyond_noise for row in shown.candidates)
    assert shown.verdict.endswith("than two: no difference beyond noise.")


def test_what_is_printed_fits_80_columns(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from rich.console import Console

    shown = comparison.Comparison.model_validate(found)
    candidates, models = (
        tuple(row.model_copy(update={"losses": row.losses * 4}) for row in rows)
        for rows in (shown.candidates, shown.models)
    )
    many = shown.model_copy(
        update={"texts": shown.texts * 4, "candidates": candidates, "models": models}
    )
    for part in comparison.lay_out(many):
        Console(width=80).print(part, soft_wrap=isinstance(part, str))
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if not line.startswith(("16:", "Average"))]
    assert max(len(line.rstrip()) for line in tables) <= 80
    assert "…" not in "".join(lines)
    text = "\n".join(lines)
    for row in shown.candidates:
        assert f"{row.ald:.4f}" in text and f"{row.losses[3].per_token:.4f}" in text
    assert re.search(r"^16: general, general.txt, .* not in the ALD$", text, re.M)


def test_a_second_run_goes_on_where_ctrl_c_ended_the_first(
    found: dict[str, Any],
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache.clear()  # of `found`, if this test is the first to ask for it
    original, measured = losses.evaluate, []

    def counted(model: Any, text: Any, **options: Any) -> ChunkLosses:
        measured.append(text.digest)
        return original(model, text, **options)

    def interrupted(model: Any, text: Any, **options: Any) -> ChunkLosses:
        if len(measured) == 18:
            raise KeyboardInterrupt
        return counted(model, text, **options)

    monkeypatch.setattr(losses, "evaluate", interrupted)
    assert run(*ALL) == 130  # the fixture checks that nothing is left
    assert capsys.readouterr().out == ""
    assert len(list((places / "cache").glob("*.json"))) >= 18
    monkeypatch.setattr(losses, "evaluate", counted)
    assert compared(places, *ALL) == found
    compared(places, *ALL, "--power", "0")
    assert len(measured) == 9 * 4  # each once

    # What the losses depend on: the text, the chunks, the merge.
    for more, count in (
        (["--tokens", "1000"], 36),
        (["--power", "3"], 4),
        (["--context", "32"], 36),
        (["--dtype", "bfloat16"], 36),
    ):
        measured.clear()
        compared(places, *ALL, *more)
        assert len(measured) == count

    capsys.readouterr()
    assert run_command("cache") == 0
    assert "losses" in capsys.readouterr().out
    assert run_command("cache", "--clear") == 0
    assert not list((places / "cache").iterdir())


def test_ctrl_c_during_a_merge_leaves_nothing(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any, out: str, *args: Any, **options: Any) -> None:
        (Path(out) / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", interrupted)
    assert run(*texts_of("code"), "--keep", str(places / "kept")) == 130
    assert not (places / "kept").exists()


def test_the_best_is_written_kept_and_drawn(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, best, figure = places / "kept", places / "best.yml", places / "f.png"
    arguments = [*ALL, "--keep", str(kept), "--write", str(best), "--plot", str(figure)]
    found = compared(places, *arguments)
    text = best.read_text()
    top, _, rest = text.partition(found["candidates"][0]["yaml"])
    comments = top.splitlines()
    assert not rest and all(line.startswith("# ") for line in comments)
    assert comments[0].startswith("# Written by mergekit-metagpt compare merge.yml, ")
    assert f"# {found['best']}: {found['candidates'][0]['meaning']}." in comments
    assert "Measured on: arithmetic (arithmetic.txt, " in top
    assert "not counted: general (general.txt, " in top
    assert comments[-1] == f"# {found['verdict']}"
    theirs = run_mergekit(yaml.safe_load(text), places / "theirs")
    assert_same_states(theirs, read_model(kept))
    names = {path.name for path in kept.iterdir()}
    assert {"metagpt.json", "README.md", "tokenizer.json"} <= names
    card = (kept / "README.md").read_text()
    assert found["verdict"] in card
    for row in (*found["models"], *found["candidates"]):
        cells = [f"{loss['per_token']:.4f}" for loss in row["losses"]]
        assert re.search(f"{row['name']}.* [|] {' [|] '.join(cells)} [|]\n", card)
    assert f"**{found['best']}** (this merge) | " in card
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert run(*ALL, "--keep", str(kept)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "Wrote" in x]
    assert f"{best} (the YAML of '{found['best']}'), {kept} (the merge" in line
    assert f"{figure} (the figure), " in line
    assert "mergekit-yaml" not in line  # it is merged already
    tied = [row["name"] for row in found["candidates"][1:] if not row["beyond_noise"]]
    said = f" '{found['best']}' is best, but '{(*tied, '')[0]}' is within noise of it."
    assert (said in line) == bool(tied)
    assert run(*ALL, "--write", str(best), "--plot", str(figure)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{best} and {figure} exist; choose other names, or --force" in line
    assert run(*ALL, "--keep", str(kept), "--write", str(best), "--force") == 0
    assert best.read_text() == text
    capsys.readouterr()
    assert run(*ALL) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "--write" in x]
    assert line.startswith(f"For the YAML of '{found['best']}', add --write BEST.yml")


def test_the_yaml_may_lie_in_the_folder_of_the_best(places: Path) -> None:
    kept = places / "kept"
    kept.mkdir()
    arguments = [*texts_of("code"), "--keep", str(kept)]
    arguments += ["--write", str(kept / "best.yml")]
    assert run(*arguments) == 0
    assert run(*arguments, "--force") == 0
    assert {"best.yml", "config.json"} <= {path.name for path in kept.iterdir()}


def test_a_merge_by_another_method_can_win(places: Path) -> None:
    document = yaml.safe_load(Path("merge.yml").read_text())
    (code,) = (m for m in document["models"] if m["model"].endswith("code"))
    alone = {"merge_method": "linear", "models": [code], "dtype": "bfloat16"}
    alone["parameters"] = {"weight": 1.0}
    file, kept = write_yaml(places / "alone.yml", alone), places / "kept"
    arguments = [*texts_of("code"), "--candidate", f"alone={file}"]
    found = compared(places, *arguments, "--keep", str(kept))
    assert found["best"] == "alone" and found["candidates"][0]["ald"] == 0
    assert_same_states(read_model(kept), read_model(Path(code["model"])))
    assert "metagpt.json" not in {path.name for path in kept.iterdir()}
    write_yaml(
        file,
        {**alone, "merge_method": "dare_linear", "base_model": document["base_model"]},
    )
    best = places / "best.yml"
    assert compared(places, *arguments, "--write", str(best))["best"] == "alone"
    first = best.read_text().splitlines()[0]
    assert first == "# Drops the same elements only with --random-seed 0."


# ---- texts


def byte_tokenizer(**settings: Any) -> Any:
    tokenizer = demo._byte_tokenizer()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_jsonl_of_text_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Ho"}]
    lines = [{"text": "plain\n"}, {"messages": chat}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    able = byte_tokenizer(chat_template=TEMPLATE)
    texts = losses.documents(file, [byte_tokenizer(), able])
    assert texts == ["plain\n", "[user]Hé[assistant]Ho"]
    # Legal in JSON, and ends of lines for str.splitlines.
    (tmp_path / "web.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n', "utf-8")
    assert losses.documents(tmp_path / "web.jsonl", []) == ["a\u2028b\x85c"]
    # No chunk reaches from one document into the next; single tokens are left out.
    chunks = losses.cut(texts, able, context=5, tokens=99)
    assert chunks == ["plain", "[user", "]Hé[", "assis", "tant]", "Ho"]
    assert losses.cut(texts, able, context=5, tokens=9) == ["plain", "[us"]
    shown = losses.tokenize(chunks, able)
    assert [len(ids) for ids in shown.ids] == [5, 5, 5, 5, 5, 2]
    assert shown.bytes == (4, 4, 4, 4, 4, 1)

    for content, problem in (
        ("{", "line 1 of .* is not JSON"),
        ('{"txt": "a"}', "neither `text` nor `messages`"),
        ('["text"]', "neither `text` nor `messages`"),
        ('{"messages": [{}]}', "no tokenizer of these models has a chat template"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=problem):
            losses.documents(file, [byte_tokenizer()])
    strict = byte_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="does not take these messages: no system"):
        losses.documents(file, [strict])


def test_messages_are_measured_through_the_specialists_template(copy: Path) -> None:
    byte_tokenizer(chat_template=TEMPLATE).save_pretrained(copy / "m" / "logs")
    turns = [{"role": "user", "content": "1 + 1 = 2, and so on; " * 3}]
    chat = copy / "chat.jsonl"
    chat.write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    arguments = ["--text", f"logs={chat}", "--tokens", "10000"]
    found = compared(copy, *arguments, config=str(copy / "merge.yml"))
    rendered = f"[user]{turns[0]['content']}"
    sums = naive_chunks(copy / "m" / "logs", rendered)
    expected = sum(sums) / sum(sizes_of(rendered))
    (logs,) = (row for row in found["models"] if row["name"] == "logs")
    assert logs["losses"][0]["per_token"] == pytest.approx(expected, rel=1e-4)
    assert found["texts"][0]["chunks"] == 8 * len(sums)


def test_a_token_that_begins_every_sequence_begins_every_chunk() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token=demo.END)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{demo.END} $A", special_tokens=[(demo.END, 256)]
    )
    chunks = losses.cut(["abcdefg"], tokenizer, context=4, tokens=9)
    assert chunks == ["abc", "def", "g"]
    shown = losses.tokenize(chunks, tokenizer)
    assert [ids[0] for ids in shown.ids] == [256] * 3
    assert shown.bytes == (3, 3, 1)


def test_a_tokenizer_that_makes_no_token_of_a_chunk_is_named() -> None:
    """Its model would get these bytes for nothing, and fails on no token at all."""
    import tokenizers

    blind = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])),
        name_or_path="blind",
    )
    assert losses.tokenize(["a", "aa"], blind).ids == ((0,), (0, 0))
    with pytest.raises(ValueError, match=r"tokenizer of blind makes no token of 'bb'"):
        losses.tokenize(["a", "bb"], blind)


def test_other_tokens_are_compared_by_the_byte(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One specialist writes ` =` as one token: its losses per token are others."""
    file = copy / "m" / "arithmetic" / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["Ġ="] = vocabulary.pop("ÿ")
    stored["model"]["merges"] = [["Ġ", "="]]
    file.write_text(json.dumps(stored))
    found = compared(copy, *ALL, config=str(copy / "merge.yml"))
    out = capsys.readouterr().out
    assert found["unit"] == "byte" and "only losses per byte can be compared" in out
    rows = {row["name"]: row for row in (*found["models"], *found["candidates"])}
    own = rows["arithmetic"]["losses"][0]
    assert own["per_byte"] < own["per_token"]
    best = rows[found["best"]]
    less = [
        best["losses"][k]["per_byte"] - rows[name]["losses"][k]["per_byte"]
        for k, name in enumerate(demo.SPECIALTIES)
    ]
    assert best["ald"] == pytest.approx(sum(less) / 3)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--text", "code"], "--text code: expected MODEL=FILE"),
        (["--text", "code=cod.txt"], "cod.txt does not exist; expected a file. Did "),
        (["--text", "code=cod.txt"], "Did you mean ./code.txt?"),
        (["--text", "code=m"], "m is a folder; expected a file"),
        ([*texts_of("code"), "--candidate", "x=merg.yml"], "Did you mean ./merge.yml?"),
        ([*texts_of("code"), *texts_of("code")], "--text code is given twice"),
        ([], "Give --text MODEL=FILE"),
        ([*texts_of("code"), "--lambda", "kept"], "--lambda kept: expected numbers"),
        (texts_of("general"), "no --text names a model of the YAML"),
        (["--text", "cod=code.txt"], "Did you mean code?"),
        ([*texts_of("code"), "--tokens", "400"], "gives 7 chunks of 64 tokens"),
        ([*texts_of("code"), "--context", "999"], "--context is 999; expected at most"),
        ([*texts_of("code"), "--limit", "5"], "--limit is for tasks; expected --task "),
        (["--task", "x.yml", "--tokens", "5"], "--tokens is for texts; expected --"),
        ([*texts_of("code"), "--power", "1;2"], "expected numbers"),
        ([*texts_of("code"), "--power", "inf"], "power inf: "),
        ([*texts_of("code"), "--candidate", "average=merge.yml"], "named average"),
        ([*texts_of("code"), "--candidate", "x=code.txt"], "code.txt: "),
        ([*texts_of("code"), "--keep", "m"], "m holds "),
        ([*texts_of("code"), "--plot", "f.gif"], "'.gif'"),
        ([*texts_of("code"), "--write", "none/best.yml"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_merged(
    arguments: list[str], problem: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run", lambda *args, **options: pytest.fail("merged"))
    assert problem in refused(cli, *arguments)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("not finite")]
)
def test_a_model_that_cannot_be_measured(
    error: Exception, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(losses, "evaluate", fail)
    assert refused(cli, *texts_of("code")) == f"Error: {error}"


def test_one_model_is_in_memory_at_a_time(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    original = losses.load

    def alone(*args: Any, **options: Any) -> Any:
        assert not any(model() for model in loaded), "another model is in memory"
        model = original(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(losses, "load", alone)
    compared(places, *texts_of("code"))
    assert len(loaded) == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there(cli: Cli) -> None:
    said = refused(cli, *texts_of("code"), "--device", "cuda")
    assert "torch sees no GPU here" in said


def test_two_texts_for_one_model(family: Path, cli: Cli) -> None:
    full = f"{family / 'm' / 'code'}=code.txt"
    assert "has two texts" in refused(cli, *texts_of("code"), "--text", full)


def test_a_base_without_tokenizer(copy: Path, cli: Cli) -> None:
    for file in (copy / "m" / "base").glob("tokenizer*"):
        file.unlink()
    said = refused(cli, *ALL, config=str(copy / "merge.yml"))
    assert "has no tokenizer" in said


def test_what_a_model_cannot_predict(family: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    with losses.quiet_transformers():
        model = losses.load(family / "m" / "base", trust_remote_code=False, **settings)
        shown = losses.Tokenized(((1, 2), (3, 999)), (1, 1))
        with pytest.raises(ValueError, match=r"257 embeddings.* token 999"):
            losses.evaluate(model, shown)
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            losses.evaluate(model, losses.Tokenized(((1, 2),), (1,)))
        model.config.save_pretrained(tmp_path)
        state = read_model(family / "m" / "base")
        del state["model.norm.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not hold model\.norm\.weight"):
            losses.load(tmp_path, trust_remote_code=False, **settings)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"a": 1.0}, "one merge was compared: a, ALD 0.0000."),
        (
            {"a": 1.0, "b": 2.0},
            "a, lower by 1.0000±0.0000 nats per token than b: beyond noise.",
        ),
        (
            {"b": 3.0, "a": 1.0, "c": 1.0},
            "0.0000±0.0000 nats per token than c: no difference beyond noise.",
        ),
        ({"a": 2.0}, "one merge was compared: a, ALD 1.0000."),
        (
            {"a": 2.0, "base": 1.5},
            "a lower ALD than any merge. Only one merge was compared: a, ALD 1.0000.",
        ),
        ({"a": 2.0, "base": 2.5}, "one merge was compared: a, ALD 1.0000."),
    ],
)
def test_the_last_line(values: dict[str, float], verdict: str) -> None:
    of_texts = {name: [value] for name, value in values.items()}
    found = judged({"base": [9.0], "t": [1.0], **of_texts})
    assert found.verdict.endswith(verdict)


@pytest.mark.parametrize(("value", "worse"), [(1.5, True), (0.9, False)])
def test_texts_on_which_the_base_beats_the_best_merge_are_named(
    value: float, worse: bool
) -> None:
    of_texts = {"base": [2.0, 1.0], "t": [1.0, 3.0], "a": [1.5, value]}
    found = judged(of_texts, {"maths": "t", "talk": None})
    said = "But a is worse than the base on talk (by 0.5000±0.0000)."
    assert (said in found.verdict) == worse and "maths" not in found.verdict


@pytest.mark.parametrize(
    ("chunks", "harmed"),
    [([1.0] * 9, False), ([1.5] * 9, True), ([0.5, *[1.0] * 7, 1.6], False)],
)
def test_a_specialist_worse_than_the_base_on_its_own_text_is_named(
    chunks: list[float], harmed: bool
) -> None:
    found = judged({"base": [1.0], "t": [chunks], "a": [1.1]})
    sentence = " t is worse than the base on its own text, by 0.5000±0.0000: "
    assert (sentence in found.verdict) == harmed
