"""The recipes: what their comments promise, and what merges of stand-ins give."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from mergekit import merge_methods

from mergekit_metagpt.commands import cli, shipped_recipes
from mergekit_metagpt.merge_config import checks, merge_yaml
from mergekit_metagpt.method.composed import COMPOSED
from tests.adapters import naive_adapted
from tests.conftest import Cli
from tests.families import State, cast, read_model, run_mergekit, write_yaml
from tests.processes import assert_succeeded, run_process, script
from tests.stand_ins import (
    ORIGINALS,
    Original,
    Shelf,
    assert_composed,
    assert_merged,
    expectation,
    replaced,
    values_of,
    with_weights,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROOT = Path(__file__).parents[1]
FILES = {
    file.relative_to(ROOT / "recipes").with_suffix("").as_posix(): file
    for file in sorted((ROOT / "recipes").rglob("*.yml"))
}
assert len(FILES) == 31, "the README counts them"
EACH = pytest.mark.parametrize("name", FILES)


def documents_of(name: str) -> list[dict[str, Any]]:
    """The merges of a recipe: one, or several for mergekit-multi."""
    return list(yaml.safe_load_all(FILES[name].read_text()))


CHAINS = [name for name in FILES if len(documents_of(name)) > 1]
SINGLE = pytest.mark.parametrize("name", [name for name in FILES if name not in CHAINS])


def models_of(name: str) -> list[str]:
    """All models and adapters of a recipe once, the base first."""
    documents = documents_of(name)
    steps = {document["name"] for document in documents if "name" in document}
    spelt = values_of(documents, "base_model") + values_of(documents, "model")
    parts = (part for spelling in spelt for part in spelling.split("+"))
    return [part for part in dict.fromkeys(parts) if part not in steps]


# ---- what the comments say


ADAPTERS = ("./adapters/math", "./adapters/code", "./adapters/chat")

PARTS = ("What", "Source", "Download", "Memory", "Run", "Inspect first")


def lines_of(name: str) -> dict[str, list[str]]:
    """The parts of a recipe's comment: the lines of each, by its label."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), FILES[name].read_text().splitlines()
    )
    summary, blank, *rest = lines
    assert blank == "#", "an empty line sets the summary off"
    parts: dict[str, list[str]] = {"summary": [summary.removeprefix("# ")]}
    label = ""
    for line in rest:
        assert re.match(r"# ( {2}| {4})?\S", line), line
        if not line.startswith("#   "):
            found = re.match(r"# ([A-Z][a-z ]+?)(?: \([^)]*\))?:(.*)", line)
            assert found is not None, f"no label: {line}"
            label, line = found.groups()
            assert label not in parts, f"{label} is said twice"
            parts[label] = []
        if text := line.removeprefix("#").strip():
            parts[label].append(text)
    return parts


def parts_of(name: str) -> dict[str, str]:
    """The parts of a recipe's comment by their labels, their lines joined."""
    return {label: " ".join(lines) for label, lines in lines_of(name).items()}


def command_of(name: str, part: str = "Run") -> list[str]:
    """The one command of a part, in words."""
    lines = lines_of(name)[part]
    (command,) = (line for line in lines if re.match(r"mergekit-\w+ ", line))
    return shlex.split(command)


@EACH
def test_comment(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9]+(-[a-z0-9]+)*", name)
    parts = parts_of(name)
    assert all(parts.values()), "a part is empty"
    given = [label for label in parts if label != "summary"]
    assert given == [label for label in PARTS if label in given]
    assert {*PARTS} - {*given} <= {"Memory"}
    summary = parts["summary"]
    assert 30 < len(summary) <= 88 and summary.endswith(".")
    boast = r"state of the art|state-of-the-art|sota\b|\bbest\b"
    assert not re.search(boast, FILES[name].read_text(), re.I)
    if not name.startswith(("paper/", "converted/")):
        assert "example, not a published merge" in parts["What"]


def test_summaries_differ() -> None:
    assert len({parts_of(name)["summary"] for name in FILES}) == len(FILES)


@EACH
def test_download(name: str) -> None:
    """What is said of sizes follows from the numbers of parameters and bytes."""
    models = [model for model in models_of(name) if model not in ADAPTERS]
    known = [ORIGINALS[model] for model in models]
    total = sum(original.billions * original.width for original in known)
    said = parts_of(name)["Download"]
    if not total:
        assert said.startswith("nothing")
        return
    sizes = re.match(
        r"about ([\d,]+) GB \((?:(\d+) models|the base) of ([\d.]+) B parameters", said
    )
    assert sizes is not None
    gigabytes, count, billions = sizes.groups(default="1")
    assert abs(total - float(gigabytes.replace(",", ""))) <= 0.5
    assert len(known) == int(count)
    assert {f"{original.billions:.1f}" for original in known} == {billions}
    wider = [m for m in models if ORIGINALS[m].width == 4]
    assert [m.rpartition("/")[2] for m in wider] == re.findall(r", (\S+) 4\)", said)
    gated = any(model.startswith(("meta-llama/", "google/")) for model in models)
    assert ("licence" in said) == gated


def click_command(program: str) -> click.Command:
    from mergekit.scripts import multimerge, run_yaml

    return {"mergekit-yaml": run_yaml.main, "mergekit-multi": multimerge.main}[program]


@EACH
def test_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's own parser takes it, and it is this recipe that it merges."""
    monkeypatch.chdir(ROOT)
    program, *arguments = command_of(name)
    assert (program == "mergekit-multi") == (name in CHAINS)
    context = click_command(program).make_context(program, list(arguments))
    assert context.params["config_file"] == f"recipes/{name}.yml"
    assert context.params["out_path"].startswith("./")


def test_an_unknown_option_is_noticed() -> None:
    with pytest.raises(click.NoSuchOption, match="--lazy"):
        arguments = ["config.yml", "./out", "--lazy"]
        click_command("mergekit-yaml").make_context("mergekit-yaml", arguments)


@EACH
def test_what_to_inspect(name: str) -> None:
    program, command, *arguments = command_of(name, "Inspect first")
    assert (program, command) == ("mergekit-metagpt", "inspect")
    # click keeps what the first context of a command says, such as its help options.
    parent = click.Context(cli.main, **cli.main.context_settings)
    cli.main.commands[command].make_context(command, list(arguments), parent=parent)
    if name in CHAINS:
        option, base, *models = arguments
        first = documents_of(name)[0]
        assert (option, base) == ("--base", first["base_model"])
        assert models == values_of(first, "model")
    else:
        assert arguments[0] == f"recipes/{name}.yml"
        adapted = "--lora-merge-cache" in command_of(name)
        assert ("--peft" in arguments) == adapted
    hint = [line for line in lines_of(name)["Inspect first"] if "inspect -" not in line]
    assert len(" ".join(hint[1:])) > 60, "nothing is said of what to look at"


def test_every_model_is_known_and_used() -> None:
    named = {model for name in FILES for model in models_of(name)}
    assert named == {*ORIGINALS, *ADAPTERS}


@EACH
def test_configuration(name: str) -> None:
    """Our own checks of a YAML pass, and mergekit ignores no parameter of it."""
    for document in documents_of(name):
        document.pop("name", None)
        # mergekit's methods round at every step, metagpt once.
        one_rounding = document["merge_method"] == "metagpt" and not any(
            ORIGINALS[m].width == 4 for m in models_of(name) if m in ORIGINALS
        )
        said = document["dtype"], document.get("out_dtype")
        expected = ("bfloat16", None) if one_rounding else ("float32", "bfloat16")
        assert said == expected
        config = merge_yaml.read(yaml.safe_dump(document))
        checks.check_yaml(config)
        checks.check_names(config)
        known = {p.name for p in merge_methods.get(config.merge_method).spec.parameters}
        assert all(level.keys() <= known for level in values_of(document, "parameters"))
        widths = {ORIGINALS[m].added for m in models_of(name) if m in ORIGINALS}
        assert (config.tokenizer is not None) == (len(widths) > 1)
        if name.startswith("converted/"):
            assert not values_of(document, "weight", "normalize", "int8_mask")


def settings_of(name: str) -> set[str]:
    """All keys that occur in a recipe."""
    found: set[str] = set()
    waiting: list[Any] = [documents_of(name)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            found.update(item)
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return found


def originals_of(name: str) -> list[Original]:
    return [ORIGINALS[model] for model in models_of(name) if model in ORIGINALS]


REQUIRED: dict[str, Callable[[str], bool]] = {
    "two models": lambda name: len(models_of(name)) == 3,
    "vocabularies": lambda name: "tokenizer" in settings_of(name),
    "slices": lambda name: "slices" in settings_of(name),
    "LoRA": lambda name: (
        "--lora-merge-cache" in command_of(name)
        and any("+" in spelt for spelt in values_of(documents_of(name), "model"))
    ),
    "vision": lambda name: any(o.kind == "Qwen2.5-VL" for o in originals_of(name)),
    "mixture of experts": lambda name: any(
        original.kind == "Mixtral" for original in originals_of(name)
    ),
    "several GPUs": lambda name: (
        any(original.billions > 30 for original in originals_of(name))
        and "--multi-gpu" in command_of(name)
    ),
    "chain": lambda name: command_of(name)[0] == "mergekit-multi",
    "all knobs": lambda name: {"weight", "power", "exclude"} <= settings_of(name),
    "little memory": lambda name: (
        "16 GB" in parts_of(name)["summary"]
        and {"--lazy-unpickle", "--out-shard-size"} <= {*command_of(name)}
    ),
}


@pytest.mark.parametrize("kind", REQUIRED)
def test_each_required_kind_is_there(kind: str) -> None:
    assert any(REQUIRED[kind](name) for name in FILES)


def test_the_paper_and_the_published_merges_are_there() -> None:
    papers = {name for name in FILES if name.startswith("paper/")}
    families = {"llama-2-7b", "llama-2-13b", "mistral-7b"}
    composed = {"llama-2-7b-ties", "llama-2-7b-dare"}
    assert papers == {f"paper/{name}" for name in families | composed}
    for name in composed:
        assert values_of(documents_of(f"paper/{name}"), "density") == [0.55]
    assert sum(name.startswith("converted/") for name in FILES) >= 8


def test_every_method_has_a_recipe() -> None:
    used = {d["merge_method"] for name in FILES for d in documents_of(name)}
    assert used == {"metagpt", *(f"metagpt_{name}" for name in COMPOSED)}


# ---- merges of tiny stand-ins


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Write a LoRA adapter of a base, of rank 4 and with random weights."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.05 * seed)
    adapter.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Staged:
    """A recipe whose models are stand-ins.

    Attributes:
        places: the folder of each stand-in, by the name of the model in the recipe.
        documents: its merges, with those folders in place of names.
        options: those of its command that need no GPU.
        states: what each of its models stores, by its name in the recipe.
    """

    places: dict[str, Path]
    documents: list[dict[str, Any]]
    options: list[str]
    states: dict[str, State]


def staged(name: str, shelf: Shelf, folder: Path) -> Staged:
    """Put stand-ins in the place of a recipe's models."""
    places: dict[str, Path] = {}
    states: dict[str, State] = {}
    for position, model in enumerate(models_of(name)):
        if model in ADAPTERS:
            base = places[models_of(name)[0]]
            places[model] = make_adapter(folder / Path(model).name, base, position)
        else:
            found = shelf(model, position)
            places[model], states[model] = found.folder, found.state
    documents = documents_of(name)
    for document in documents:
        if step := document.get("name"):
            places[step] = Path(step)
    options = [
        str(folder / "lora-cache") if option == "./lora-cache" else option
        for option in command_of(name)[2 if name in CHAINS else 3 :]
        if option not in ("--cuda", "--multi-gpu")
    ]
    staged_documents = [replaced(document, places) for document in documents]
    return Staged(places, staged_documents, options, states)


def with_adapters(name: str, stage: Staged, folder: Path) -> dict[str, State]:
    """The states of a recipe's models by their full spelling, adapters merged.

    Those are what mergekit has left in its cache; checked against W + 2 B A.
    """
    states = dict(stage.states)
    for spelling in values_of(documents_of(name), "model"):
        base, _, adapter = spelling.partition("+")
        if not adapter:
            continue
        (cached,) = (folder / "lora-cache").glob(f"*_{Path(adapter).name}_*")
        states[spelling] = read_model(cached)
        start = cast(states[base], torch.float32)
        merged = naive_adapted(start, folder / Path(adapter).name, 2.0)
        assert any(merged[key] is not start[key] for key in start)
        for key, tensor in cast(states[spelling], torch.float32).items():
            torch.testing.assert_close(tensor, merged[key], rtol=2**-7, atol=2**-7)
    return states


@SINGLE
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_merge(name: str, tmp_path: Path, shelf: Shelf) -> None:
    stage = staged(name, shelf, tmp_path)
    (document,), (original,) = stage.documents, documents_of(name)
    merged = run_mergekit(document, tmp_path / "out", *stage.options)
    states = with_adapters(name, stage, tmp_path)
    expected = expectation(original, states)
    if document["merge_method"] == "metagpt":
        assert_merged(merged, expected)
    else:
        explicit = with_weights(document, expected.lambdas("any"))
        theirs = run_mergekit(explicit, tmp_path / "theirs", *stage.options)
        assert_composed(merged, expected, theirs)


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, tmp_path: Path, shelf: Shelf) -> None:
    """Through the code of mergekit-multi; a later step is checked with earlier ones."""
    stage = staged(name, shelf, tmp_path)
    file = write_yaml(tmp_path / "recipe.yml", *stage.documents)
    assert stage.options[::2] == ["--intermediate-dir", "--out-path"]
    steps, out = (tmp_path / folder for folder in stage.options[1::2])
    arguments = [str(file), "--intermediate-dir", str(steps), "--out-path", str(out)]
    arguments += ["--no-copy-tokenizer", "--quiet"]
    click_command("mergekit-multi").main(arguments, standalone_mode=False)
    states = dict(stage.states)
    for document in documents_of(name):
        step = document.get("name", "")
        merged = read_model(steps / step if step else out)
        assert_merged(merged, expectation(document, states))
        states[step] = merged


def own_file(name: str, stage: Staged, folder: Path) -> Path:
    """What `recipes NAME > own.yml` writes, with nothing but its models replaced."""
    text, count = re.subn(
        r"(?m)^((?:  - |base_)model: )(\S+)$",
        lambda found: f"{found.group(1)}{stage.places[found.group(2)]}",
        shipped_recipes.find(name).text,
    )
    assert count == len(stage.places)
    file = folder / "own.yml"
    file.write_text(text)
    return file


def test_script(tmp_path: Path, shelf: Shelf) -> None:
    """A reader's own file through the script mergekit-yaml."""
    name, out = "starters/two-models", tmp_path / "out"
    stage = staged(name, shelf, tmp_path)
    file = own_file(name, stage, tmp_path)
    command = [script("mergekit-yaml"), file, out, "--no-copy-tokenizer"]
    done = run_process([*command, *stage.options])
    assert_succeeded(done)
    assert done.stderr.count("coefficients of the whole model") == 1
    (document,) = documents_of(name)
    assert_merged(read_model(out), expectation(document, stage.states))


def test_our_own_command(tmp_path: Path, shelf: Shelf, cli: Cli) -> None:
    """The whole job is checked, vocabularies of different sizes too."""
    name, out = "large/mixtral-8x7b", tmp_path / "out"
    stage = staged(name, shelf, tmp_path)
    cli("merge", own_file(name, stage, tmp_path), out, "--quiet")
    (document,) = documents_of(name)
    assert_merged(read_model(out), expectation(document, stage.states))


# ---- the shelf


def test_shelf_holds_every_file() -> None:
    found = shipped_recipes.recipes()
    assert [recipe.name for recipe in found] == sorted(FILES)
    for recipe in found:
        assert recipe.text == FILES[recipe.name].read_text()
        assert recipe.summary == parts_of(recipe.name)["summary"]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(
            (f"{spelling}{ending}", "paper/llama-2-7b")
            for spelling in ("paper/llama-2-7b", "llama-2-7b")
            for ending in ("", ".yml")
        ),
        ("recipes/paper/llama-2-7b.yml", "paper/llama-2-7b"),
        ("lora", "features/lora-adapters"),
    ],
)
def test_find(spelling: str, name: str) -> None:
    assert shipped_recipes.find(spelling).name == name


def test_find_says_what_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one/twin", "two/twin", "two/other", "whole"):
        file = tmp_path / "recipes" / f"{name}.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# About {name}.\nmerge_method: metagpt\n")
    monkeypatch.setattr(shipped_recipes, "_PACKAGE", tmp_path)
    assert shipped_recipes.find("other") == shipped_recipes.Recipe(
        "two/other", "About two/other.", "# About two/other.\nmerge_method: metagpt\n"
    )
    assert shipped_recipes.find("whole").name == "whole"
    assert shipped_recipes.find("hol").name == "whole"
    for wanted, message in {
        "twin": "twin is one/twin or two/twin. Write it in full",
        "two": "two is two/other or two/twin. Write it in full",
        "o": "o is one/twin or two/other or two/twin or whole. Write it in full",
        "zzzzz": "there is no recipe zzzzz; `mergekit-metagpt recipes` lists them all",
        "": "there is no recipe ; `mergekit-metagpt recipes` lists them all",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            shipped_recipes.find(wanted)


def test_an_installation_without_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_recipes, "_PACKAGE", tmp_path / "mergekit_metagpt")
    with pytest.raises(FileNotFoundError, match="holds no recipes"):
        shipped_recipes.recipes()
