"""README.md and docs/: code blocks hold, links and names lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin
from unittest import mock

import click
import mergekit
import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.options import MergeOptions

import mergekit_metagpt
from mergekit_metagpt.commands import cli
from mergekit_metagpt.merge_config import checks, converting, jobs, merge_yaml
from mergekit_metagpt.method.composed import COMPOSED
from tests.families import run_mergekit
from tests.oracle import assert_within_bound, naive_lambdas
from tests.stand_ins import (
    ORIGINALS,
    Original,
    StandIn,
    assert_composed,
    assert_merged,
    expectation,
    make_stand_in,
    replaced,
    values_of,
    with_weights,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROOT = Path(__file__).parents[1]
PACKAGE = Path(mergekit_metagpt.__file__).parent
HOST = Path(mergekit.__file__).parent
OPTIONS = ROOT / "docs" / "options.md"
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
EACH = pytest.mark.parametrize("name", PAGES)
OWN_PARAMETERS = ("granularity", "weight", "power", "lambda", "exclude")
METHODS = ("metagpt", *(f"metagpt_{inner}" for inner in COMPOSED))


def page(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


# ---- what a page consists of

FENCE = re.compile(r" *(`{3,}) *([\w+-]*) *")
MARK = re.compile(r"<!-- (file|output|not run|help)(?:: (.+?))? -->")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its fence, counted from 1.
        language: the word behind the fence.
        text: without the fences.
        mark: what the comment directly above asks for, or nothing.
        value: of that comment.
    """

    line: int
    language: str
    text: str
    mark: str = ""
    value: str = ""


def blocks_of(text: str) -> list[Block]:
    found = []
    lines = text.splitlines()
    rows = iter(range(len(lines)))
    for row in rows:
        if not (fence := FENCE.fullmatch(lines[row])):
            continue
        content = []
        for inside in rows:
            if lines[inside].strip() == fence.group(1):
                break
            content.append(lines[inside])
        else:
            raise AssertionError(f"line {row + 1}: the block has no end")
        mark = MARK.fullmatch(lines[row - 1].strip()) if row else None
        code = textwrap.dedent("\n".join(content)) + "\n"
        asked = mark.groups(default="") if mark else ("", "")
        found.append(Block(row + 1, fence.group(2), code, *asked))
    return found


def prose_of(text: str) -> str:
    """A page without its blocks and comments."""
    lines = text.splitlines()
    for block in blocks_of(text):
        end = block.line + len(block.text.splitlines())
        lines[block.line - 1 : end + 1] = [""] * (end - block.line + 2)
    return re.sub(r"<!--.*?-->", "", "\n".join(lines), flags=re.S)


def spans_of(text: str) -> list[str]:
    """What a page sets in code within its lines, each on one line."""
    return [" ".join(code.split()) for _, code in CODE.findall(prose_of(text))]


# ---- commands


def commands_of(script: str) -> tuple[list[list[str]], set[str]]:
    """The simple commands of a shell script, in words, and the functions it defines."""
    found, functions = [], set()
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|"):
                command += [word] if word not in "()" or word == "()" else []
                continue
            if command[1:2] == ["()"]:
                functions.add(command[0])
                command = command[2:]
            while command and command[0] in ("do", "then", "else", "{"):
                command = command[1:]
            if command and command[0] not in ("for", "done", "fi", "}"):
                found.append(command)
            command = []
    return found, functions


def click_command(program: str) -> click.Command:
    from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml

    return {
        "mergekit-metagpt": cli.main,
        "mergekit-multi": multimerge.main,
        "mergekit-pytorch": merge_raw_pytorch.main,
        "mergekit-yaml": run_yaml.main,
    }[program]


CLICK = ("mergekit-metagpt", "mergekit-multi", "mergekit-pytorch", "mergekit-yaml")
# Programs of others: a block may use them, and it is not run.
OTHERS = ("git", "lm_eval", "pip", "pre-commit")


def command_and_words(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that a line calls, and what it passes to it."""
    program, *rest = words
    command = click_command(Path(program).name)
    if command is cli.main and rest and not rest[0].startswith("-"):
        assert rest[0] in cli.main.commands, f"{program} has no command {rest[0]}"
        command = merge_command() if rest[0] == "merge" else cli.main.commands[rest[0]]
        rest = rest[1:]
    return command, rest


@functools.cache
def merge_command() -> click.Command:
    return cli._merge_command()


def options_of(command: click.Command) -> set[str]:
    """All spellings of a command's options."""
    spelt = {"-h", "--help"}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            spelt.update(parameter.opts, parameter.secondary_opts)
    return spelt


def assert_usage(words: Sequence[str]) -> None:
    """Check that a line's command and options exist; its arguments may be any."""
    command, rest = command_and_words(words)
    for word in rest:
        option = word.strip("[].,").partition("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]*", option):
            assert option in options_of(command), f"{words[0]} has no {option}"


def assert_parsed(words: Sequence[str]) -> None:
    """Check that the command's own parser takes a whole line."""
    assert_usage(words)
    command, rest = command_and_words(words)
    try:
        # With a parent, as in use: a command keeps the names of its first --help.
        parent = click.Context(cli.main, **cli.main.context_settings)
        ours = command is not cli.main and words[0] == "mergekit-metagpt"
        command.make_context(words[0], list(rest), parent if ours else None)
    except click.exceptions.Exit:
        pass  # --version
    except click.BadParameter as error:
        if "does not exist" not in error.message:
            raise


def assert_paths_exist(words: Sequence[str]) -> None:
    """Check files of the repository that a command names."""
    for word in words:
        if re.match(r"(recipes|docs|tests|mergekit_metagpt)/", word) or word in (
            ".ci/run",
            "constraints.txt",
        ):
            assert "$" in word or (ROOT / word).exists(), f"there is no {word}"


@contextlib.contextmanager
def captured(*, with_log: bool) -> Iterator[io.StringIO]:
    """Collect stdout and perhaps, as a script shows it, what is logged at WARNING."""
    seen = io.StringIO()
    handler = logging.StreamHandler(seen if with_log else io.StringIO())
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(seen),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield seen
    finally:
        logging.getLogger().removeHandler(handler)


def assert_shown(shown: str, printed: str) -> None:
    """Check what a page shows of an output; `...` stands for anything."""
    parts = [" ".join(part.split()) for part in shown.split("...")]
    assert any(parts), "nothing is shown"
    pattern = ".*".join(map(re.escape, parts))
    output = " ".join(printed.split())
    agree = re.fullmatch(pattern, output, re.S) is not None
    assert agree, f"it printed\n{printed}"


# ---- following a page

Shelf = Callable[[str, int], StandIn]
OWN = Original("Llama", 0)
# What a YAML that shows parameters alone is a part of.
WHOLE = {
    "merge_method": "metagpt",
    "base_model": "./base",
    "models": [{"model": "./math"}, {"model": "./code"}],
    "out_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Stand-ins by the names of models in a page, and their positions in a merge."""
    folder = tmp_path_factory.mktemp("stand-ins")

    @functools.cache
    def made(original: Original, position: int) -> StandIn:
        number = len(list(folder.iterdir()))
        return make_stand_in(folder / f"m{number}", original, position)

    return lambda model, position: made(ORIGINALS.get(model, OWN), position)


def names_of_parameters(document: Mapping[str, Any]) -> set[str]:
    """The parameters that a YAML sets anywhere."""
    return {name for level in values_of(document, "parameters") for name in level}


class Reader:
    """Does what a page says, from its top, in a folder that holds three models."""

    def __init__(self, folder: Path, shelf: Shelf) -> None:
        self.folder = folder
        self.shelf = shelf
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed: str | None = None
        self.done: Counter[str] = Counter()
        for position, name in enumerate(("base", "math", "code")):
            (folder / name).symlink_to(shelf(name, position).folder)

    def follow(self, text: str) -> None:
        """Run or check all blocks.

        Raises:
            AssertionError: one does not hold; the message begins with its line.
        """
        for block in blocks_of(text):
            try:
                self._do(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(
                    f"line {block.line}: {type(error).__name__}: {error}"
                ) from error

    def _do(self, block: Block) -> None:
        if block.mark == "not run":
            assert block.value, "no reason is given"
            if block.language == "python":
                ast.parse(block.text)
            return
        if block.mark == "output":
            assert self.printed is not None, "nothing has run above"
            assert block.language == "text"
            assert_shown(block.text, self.printed)
            self.done["output"] += 1
            return
        steps = {
            "bash": self._shell,
            "json": lambda block: json.loads(block.text),
            "python": self._python,
            "text": self._illustration,
            "yaml": self._yaml,
        }
        assert block.language in steps, f"nobody checks {block.language!r} blocks"
        steps[block.language](block)

    def _illustration(self, block: Block) -> None:
        if block.mark == "help":
            return  # compared by the tests of the command line
        for line in block.text.splitlines():
            if line.split(" ")[0] in CLICK:
                assert_usage(line.split())

    def _python(self, block: Block) -> None:
        with captured(with_log=False) as seen:
            exec(compile(block.text, "page", "exec"), self.names)
        self.printed = seen.getvalue()
        self.done["python"] += 1

    def _yaml(self, block: Block) -> None:
        document = yaml.safe_load(block.text)
        assert isinstance(document, dict), "no mapping"
        if "merge_method" not in document:
            document = {**WHOLE, **document}
        if block.mark == "file":
            (self.folder / block.value).write_text(block.text)
        config = merge_yaml.read(yaml.safe_dump(document))
        checks.check_names(config)
        spec = merge_methods.get(config.merge_method).spec
        unknown = names_of_parameters(document) - {
            known.name for known in spec.parameters
        }
        assert not unknown, f"{config.merge_method} has no {', '.join(unknown)}"
        if config.merge_method in METHODS:
            checks.check_yaml(config)
            self._merge(document)
        self.done["yaml"] += 1

    def _merge(self, document: dict[str, Any]) -> None:
        """Merge stand-ins and compare the result with the formula."""
        models = [*values_of(document, "base_model"), *values_of(document, "model")]
        found = {
            model: self.shelf(model, position)
            for position, model in enumerate(dict.fromkeys(models))
        }
        places = {model: stand_in.folder for model, stand_in in found.items()}
        out, seed = self.folder / f"merge-{self.done['merge']}", ("--random-seed", "0")
        merged = run_mergekit(replaced(document, places), out, *seed)
        self.done["merge"] += 1
        if any(
            isinstance(value, list) for value in values_of(document, *OWN_PARAMETERS)
        ):
            return  # gradients and filters have a test of their own
        states = {model: stand_in.state for model, stand_in in found.items()}
        expected = expectation(document, states)
        if document["merge_method"] == "metagpt":
            assert_merged(merged, expected)
            return
        weighted = with_weights(document, expected.lambdas("any"))
        out = out.with_suffix(".theirs")
        theirs = run_mergekit(replaced(weighted, places), out, *seed)
        assert_composed(merged, expected, theirs)

    def _shell(self, block: Block) -> None:
        commands, functions = commands_of(block.text)
        assert commands, "no command"
        printed = [self._command(command, functions) for command in commands]
        outputs = [output for output in printed if output is not None]
        if outputs:
            self.printed = "".join(outputs)
        self.done["bash"] += 1

    def _command(self, words: list[str], functions: set[str]) -> str | None:
        """Run or check a command; return what it printed if it ran."""
        assert_paths_exist(words)
        variables = {}
        while re.match(r"[A-Z_]+=", words[0]):
            variable, _, value = words[0].partition("=")
            variables[variable] = value
            words = words[1:]
        program, *rest = words
        last = Path(program).name
        if last in CLICK:
            assert_parsed([last, *rest])
            if not self._can_run(last, rest):
                return None
            with mock.patch.dict(os.environ, variables):
                return self._run(last, rest)
        if last == "python":
            return self._interpreter(rest)
        if last == "ls":
            names = sorted(file.name for file in Path(*rest).iterdir())
            assert names
            return "".join(f"{name}\n" for name in names)
        if last == "cat":
            return "".join(Path(file).read_text() for file in rest)
        if program == "export":
            assert all(re.match(r"[A-Z_]+=\S", word) for word in rest)
        elif program == ".":
            assert rest == [".venv/bin/activate"]
        elif program.startswith(".ci/"):
            assert os.access(ROOT / program, os.X_OK)
        else:
            known = program in functions or last in OTHERS
            assert known, f"nobody checks {program}"
            assert rest, f"{program} does nothing by itself"
        return None

    def _can_run(self, program: str, rest: Sequence[str]) -> bool:
        """Whether all that a command reads is here, and it takes seconds at most."""
        if any("$" in word for word in rest):
            return False
        if program == "mergekit-metagpt" and rest[0] in ("--version", "recipes"):
            return True
        configs = [word for word in rest if re.fullmatch(r"[\w./-]+\.ya?ml", word)]
        return bool(configs) and (self.folder / configs[0]).is_file()

    def _run(self, program: str, rest: Sequence[str]) -> str:
        from mergekit.io.tasks import LoaderCache

        LoaderCache.loaders.clear()
        with (
            captured(with_log=True) as seen,
            contextlib.suppress(click.exceptions.Exit),
        ):
            click_command(program).main(
                list(rest), prog_name=program, standalone_mode=False
            )
        self.done["command"] += 1
        return seen.getvalue()

    def _interpreter(self, rest: list[str]) -> str | None:
        option, *arguments = rest
        if option == "-c":
            with captured(with_log=False) as seen:
                exec(compile(arguments[0], "page", "exec"), {})
            return seen.getvalue()
        if option != "-m":
            script = ROOT / option
            assert script.is_file(), f"there is no {option}"
            for word in arguments:
                if word.startswith("--"):
                    assert f'"{word}"' in script.read_text(), f"{option} has no {word}"
            return None
        module, *arguments = arguments
        if module == "pip":
            assert arguments[0] in ("install", "wheel") and len(arguments) > 1
            extras = re.findall(r"\.\[(\w+)\]", " ".join(arguments))
            known = importlib.metadata.metadata("mergekit-metagpt")
            assert {*extras} <= {*known.get_all("Provides-Extra", [])}
        elif module not in ("build", "twine", "venv", "wheel"):
            spec = importlib.util.find_spec(module.replace("NAME", "__init__"))
            assert spec is not None, f"there is no module {module}"
        return None


@pytest.fixture
def reader(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for variable in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "MERGEKIT_METAGPT_QUIET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng(devices=[]):
        yield Reader(folder, shelf)
    # What the page on compatibility adds to.
    if genome := sys.modules.get("mergekit.evo.genome"):
        for method in METHODS:
            genome.METHOD_PARAM_MAPS.pop(method, None)


# What there is to do on a page: a block that is no longer found is noticed.
DONE: dict[str, dict[str, int]] = {
    "docs/CONTRIBUTING.md": {"bash": 2},
    "docs/converting.md": {"yaml": 16, "merge": 8},
    "docs/options.md": {"yaml": 2, "merge": 2},
    "docs/python.md": {"python": 9, "output": 8},
    "docs/quickstart.md": {
        "bash": 7,
        "command": 6,
        "python": 1,
        "yaml": 2,
        "merge": 2,
        "output": 6,
    },
    "docs/releasing.md": {"bash": 6, "command": 4},
}


@EACH
def test_blocks_hold(name: str, reader: Reader) -> None:
    reader.follow(page(name))
    if name in DONE:
        assert reader.done == DONE[name]


def test_pages_are_found() -> None:
    assert {"README.md", "docs/cli.md", "docs/reproduce.md"} <= PAGES.keys()
    assert DONE.keys() < PAGES.keys()
    assert sum(len(blocks_of(page(name))) for name in PAGES) >= 70
    # Each fence of three backticks begins or ends a block that was found.
    for name in PAGES:
        fences = re.findall(r"(?m)^ *```", page(name))
        assert len(fences) == 2 * len(blocks_of(page(name)))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1 / 0)\n```", "ZeroDivisionError"),
        ("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```", "printed"),
        ("<!-- output -->\n```text\n2\n```", "nothing has run"),
        ("<!-- not run -->\n```python\n1\n```", "no reason"),
        ("<!-- not run: long -->\n```python\n1 +\n```", "SyntaxError"),
        ("```\n1\n```", "nobody checks ''"),
        ("```python\n1\n", "no end"),
        ("```yaml\nmerge_method: metagpt\nmodels: []\n```", "ValueError"),
        ("```yaml\nparameters:\n  granularty: layer\n```", "did you mean granularity"),
        ("```yaml\nparameters:\n  normalise: true\n```", "has no normalise"),
        ("```yaml\nparameters:\n  power: high\n```", "power is 'high'"),
        ("```bash\nmergekit-metagpt enquire x.yml\n```", "has no command enquire"),
        ("```bash\nmergekit-metagpt inspect x.yml --loud\n```", "has no --loud"),
        ("```bash\nmergekit-metagpt inspect\n```", "Missing parameter"),
        ("```bash\nmergekit-yaml x.yml ./out --lazy\n```", "has no --lazy"),
        ("```bash\nmergekit-yaml recipes/none.yml ./out\n```", "there is no recipes"),
        ("```bash\nmergekit-metagpt recipes nothing\n```", "there is no recipe"),
        ("```bash\npython -m pytest tests/test_none.py\n```", "there is no tests"),
        ("```bash\npython -m tests.nothing\n```", "there is no module"),
        ("```bash\npython -c 'import nothing'\n```", "No module named 'nothing'"),
        ("```bash\nfrobnicate --all\n```", "nobody checks frobnicate"),
        ("```text\nmergekit-yaml x.yml ./out --lazy\n```", "has no --lazy"),
    ],
)
def test_a_wrong_block_is_noticed(text: str, complaint: str, reader: Reader) -> None:
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        reader.follow(text)


def test_a_command_that_fails_is_noticed(reader: Reader) -> None:
    lines = ["<!-- file: a.yml -->", "```yaml", "merge_method: metagpt"]
    lines += ["base_model: ./base", "models: [{model: ./math}, {model: ./code}]", "```"]
    lines += ["```bash", "mergekit-metagpt inspect a.yml", "```"]
    text = "\n".join(lines)
    reader.follow(text)
    assert reader.printed is not None and "./math" in reader.printed
    (reader.folder / "math").unlink()
    with pytest.raises(AssertionError, match="line 7: "):
        reader.follow(text)


def test_reading_commands() -> None:
    script = """
        each() {  # model
          lm_eval --model "$1,x" \\
            --tasks a
        }
        for model in ./m/*; do
          each "$model" && COLUMNS=9 ls .  # all
        done
    """
    assert commands_of(script) == (
        [
            ["lm_eval", "--model", "$1,x", "--tasks", "a"],
            ["each", "$model"],
            ["COLUMNS=9", "ls", "."],
        ],
        {"each"},
    )


def test_comparing_outputs() -> None:
    printed = "one\n two  three\nfour\n"
    for shown in ("one two three four", "one\n...\nfour", "...\nthree\n...\n", "o...r"):
        assert_shown(shown, printed)
    for shown in ("one two", "...\nthree", "four\n...\none", "...\nfive\n...", ""):
        with pytest.raises(AssertionError):
            assert_shown(shown, printed)


# ---- links


def headings_of(text: str) -> list[str]:
    """The anchors that GitHub gives a page's headings."""
    taken: Counter[str] = Counter()
    found = []
    lines = text.splitlines()
    for block in blocks_of(text):
        end = block.line + len(block.text.splitlines())
        lines[block.line - 1 : end + 1] = [""] * (end - block.line + 2)
    for line in lines:
        if not (heading := re.fullmatch(r"#{1,6} +(.*?)(?: +#+)? *", line)):
            continue
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.group(1))
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(f"{slug}-{taken[slug]}" if taken[slug] else slug)
        taken[slug] += 1
    return found


def links_of(text: str) -> list[str]:
    """The targets of a page's links and figures."""
    prose = CODE.sub("code", prose_of(text))
    return re.findall(r"\[[^][]*\]\(\s*([^()\s]+)\s*\)", prose)


def assert_links_lead_somewhere(text: str, place: Path) -> None:
    """Check targets and anchors of all links of a page that lies at `place`."""
    for target in links_of(text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (place.parent / path).resolve() if path else place
        assert found.is_relative_to(ROOT) and found.exists(), f"{target}: no such file"
        if anchor:
            assert found.suffix == ".md", f"{target}: anchors lead into pages"
            there = text if found == place else found.read_text(encoding="utf-8")
            assert anchor in headings_of(there), f"{target}: no such heading"


@EACH
def test_links(name: str) -> None:
    assert_links_lead_somewhere(page(name), PAGES[name])


def test_links_are_found() -> None:
    assert sum(len(links_of(page(name))) for name in PAGES) >= 50
    text = "[a\nb](x.md#y) `[c](d)` [`e`](<f>) ![g](h.png) [i](https://j.k)"
    assert links_of(text) == ["x.md#y", "<f>", "h.png", "https://j.k"]


@pytest.mark.parametrize(
    ("link", "complaint"),
    [
        ("[x](docs/none.md)", "no such file"),
        ("[x](../outside.md)", "no such file"),
        ("[x](docs/method.md#none)", "no such heading"),
        ("[x](#none)", "no such heading"),
        ("[x](pyproject.toml#project)", "anchors lead into pages"),
    ],
)
def test_a_wrong_link_is_noticed(link: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert_links_lead_somewhere(f"# Page\n{link}\n", ROOT / "README.md")


def test_anchors_are_those_of_github() -> None:
    text = "# `a.b` of C: d_e, (f)\n## [g](h) - i\n## Same\n```bash\n# no\n```\n## Same"
    assert headings_of(text) == ["ab-of-c-d_e-f", "g---i", "same", "same-1"]


def unreachable(pages: Mapping[Path, str], start: Path) -> set[Path]:
    """Pages to which no chain of links leads."""
    reached, waiting = set(), {start}
    while waiting:
        here = waiting.pop()
        reached.add(here)
        for target in links_of(pages[here]):
            there = (here.parent / target.partition("#")[0]).resolve()
            if there in pages and there not in reached:
                waiting.add(there)
    return {*pages} - reached


def test_every_page_can_be_reached_from_the_readme() -> None:
    pages = {place: page(name) for name, place in PAGES.items()}
    missing = unreachable(pages, ROOT / "README.md")
    assert not missing, f"no link leads to {sorted(place.name for place in missing)}"


def test_a_page_without_a_link_to_it_is_noticed() -> None:
    start, middle, end = (ROOT / f"{name}.md" for name in "abc")
    pages = {start: "[b](b.md#x)", middle: "[c](./c.md)", end: "[a](a.md)"}
    assert unreachable(pages, start) == set()
    assert unreachable({**pages, middle: "`[c](c.md)`"}, start) == {end}


# ---- length


def test_the_readme_is_short() -> None:
    assert 80 <= len(page("README.md").splitlines()) <= 100


def test_what_a_user_reads_is_short() -> None:
    """The README and the pages of its line on merging, in words."""
    (line,) = re.findall(r"(?s)\n- Merge your models: (.*?)\n- ", page("README.md"))
    linked = [target for target in links_of(line) if target.endswith(".md")]
    assert len(linked) >= 8
    pages = ["README.md", *linked]
    assert sum(len(page(name).split()) for name in pages) <= 12_000


# ---- names


@functools.cache
def known_options() -> frozenset[str]:
    """Options of all commands of ours and mergekit's."""
    commands = [click_command(program) for program in CLICK]
    commands += [*cli.main.commands.values(), merge_command()]
    return frozenset(option for command in commands for option in options_of(command))


@functools.cache
def other_sources() -> str:
    """Scripts whose options are not known without running them."""
    folders = (ROOT / "docs", ROOT / "tests" / "long", HOST / "scripts")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def package_source() -> str:
    return "\n".join(file.read_text() for file in sorted(PACKAGE.rglob("*.py")))


def assert_is_a_file(name: str, place: Path) -> None:
    """Check a file that a page names, from any folder where one would look for it."""
    folders = (
        *(place.parent, ROOT, PACKAGE, HOST, ROOT / "tests"),
        *(wing for wing in PACKAGE.iterdir() if wing.is_dir()),
        *(ROOT / "docs" / "experiments", ROOT / "docs" / "benchmarks"),
    )
    assert any((folder / name).exists() for folder in folders), f"no file {name}"


def assert_resolves(name: str) -> None:
    """Check that a dotted name is a module, or something in one."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        if part.isupper() and part.isalpha():
            return  # a placeholder
        module = ".".join(parts[:at])
        is_module = hasattr(found, "__path__") and importlib.util.find_spec(module)
        if is_module and not hasattr(found, part):
            found = importlib.import_module(module)
        else:
            assert hasattr(found, part), f"there is no {name}"
            found = getattr(found, part)


def assert_is_known(span: str, place: Path) -> None:
    """Check what a page sets in code: commands, options, variables, files, modules."""
    words = span.split()
    first = words[0] if words else ""
    if first in CLICK and len(words) > 1 and not re.match(r"[A-Z]+$", words[1]):
        assert_usage([word.strip("[]") for word in words])
    elif re.match(r"--?[a-z][\w-]*$", first):
        known = first in known_options() or f'"{first}"' in other_sources()
        known |= first.replace("--no-", "--") in other_sources()
        assert known, f"no command has {first}"
    elif variable := re.match(r"MERGEKIT_METAGPT_\w+", span):
        assert f'"{variable.group()}"' in package_source(), f"no variable {span}"
    elif re.fullmatch(r"(?!\.?/?\.\.)[\w./-]+\.py", span):
        assert_is_a_file(span, place)
    elif re.match(r"(recipes|docs|tests|\.ci)/", span) and not re.search(r"[*<]", span):
        assert_is_a_file(span, place)
    elif dotted := re.match(r"(?:mergekit_metagpt|mergekit|tests)(?:\.\w+)+", span):
        assert_resolves(dotted.group())


@EACH
def test_names(name: str) -> None:
    for span in spans_of(page(name)):
        assert_is_known(span, PAGES[name])


@pytest.mark.parametrize(
    "span",
    [
        "mergekit-metagpt enquire",
        "mergekit-metagpt inspect --loud",
        "mergekit-yaml --lazy",
        "--frobnicate",
        "MERGEKIT_METAGPT_NOTHING=1",
        "nothing.py",
        "tests/test_nothing.py",
        "recipes/nothing/",
        "mergekit_metagpt.nothing",
        "mergekit.merge_methods.nothing.at_all()",
    ],
)
def test_a_wrong_name_is_noticed(span: str) -> None:
    with pytest.raises(AssertionError):
        assert_is_known(span, ROOT / "README.md")


def test_every_variable_is_documented() -> None:
    variables = {*re.findall(r'"(MERGEKIT_METAGPT_[A-Z]+)"', package_source())}
    assert len(variables) == 4
    documented = OPTIONS.read_text().partition("## Environment")[2]
    for variable in {*variables, "TORCH_DEVICE_BACKEND_AUTOLOAD"}:
        assert re.search(rf"(?m)^\| `{variable}=", documented), variable


# ---- docs/options.md


def specs() -> dict[str, Any]:
    return {name: merge_methods.get(name).spec for name in METHODS}


def cell(value: object) -> str:
    if value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def holders(methods: Sequence[str]) -> str:
    """Which methods have a parameter, in few words."""
    if len(methods) == len(METHODS):
        return "all"
    if len(methods) == len(COMPOSED) and "metagpt" not in methods:
        return "all but `metagpt`"
    return ", ".join(f"`{method}`" for method in methods)


def type_of(parameter: Any) -> str:
    """A parameter's type, for readers."""

    def named(kind: Any) -> str:
        parts = get_args(kind)
        if get_origin(kind) is Annotated:  # a number within bounds
            return named(parts[0])
        if get_origin(kind) is Union:
            return " or ".join(map(named, parts))
        return ", ".join(f"`{value}`" for value in parts) or str(kind.__name__)

    return named(parameter.value_type)


def parameters_table() -> str:
    """A row for each parameter of any method."""
    rows = ["| parameter | default | type | scope | methods |", "|---|---|---|---|---|"]
    having: dict[str, dict[str, Any]] = {}
    for method, spec in specs().items():
        for parameter in spec.parameters:
            having.setdefault(parameter.name, {})[method] = parameter
    for name, parameters in having.items():
        first = next(iter(parameters.values()))
        defaults = {cell(parameter.default) for parameter in parameters.values()}
        kinds = {(p.value_type, p.scope.value) for p in parameters.values()}
        assert len(kinds) == 1, f"{name} has several types"
        default = defaults.pop() if len(defaults) == 1 else "see below"
        scope = {"shared": "shared", "non_base": "per model"}[first.scope.value]
        row = (f"`{name}`", default, type_of(first), scope)
        rows.append(f"| {' | '.join(row)} | {holders([*parameters])} |")
    return "\n".join(rows)


def defaults_table() -> str:
    """A row for each composed method, with what not all of them have alike."""
    values = {
        method: {p.name: cell(p.default) for p in spec.parameters}
        for method, spec in specs().items()
        if method != "metagpt"
    }
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    differing = [
        name for name in names if len({row.get(name) for row in values.values()}) > 1
    ]
    heading = " | ".join(f"`{name}`" for name in differing)
    rows = [f"| method | {heading} |", "|---" * (len(differing) + 1) + "|"]
    for method, row in values.items():
        cells = " | ".join(row.get(name, "-") for name in differing)
        rows.append(f"| `{method}` | {cells} |")
    return "\n".join(rows)


def with_current_tables(text: str) -> str:
    """The page of options with its tables made anew from the registered methods."""
    for name, table in (
        ("parameters", parameters_table()),
        ("defaults", defaults_table()),
    ):
        text, count = re.subn(
            rf"(<!-- table: {name} -->\n).*?(<!-- end -->)",
            rf"\g<1>{table}\n\g<2>",
            text,
            flags=re.S,
        )
        assert count == 1, name
    return text


def test_options_are_those_of_the_registered_methods() -> None:
    # To renew them: python -m tests.test_docs
    text = OPTIONS.read_text()
    assert with_current_tables(text) == text


@pytest.mark.parametrize("change", [("| 2.0 |", "| 1.0 |"), ("`gamma`", "`gama`")])
def test_a_wrong_table_of_options_is_noticed(change: tuple[str, str]) -> None:
    text = OPTIONS.read_text()
    changed = text.replace(*change)
    assert changed != text
    assert with_current_tables(changed) != changed


def test_registered_methods_are_all_named() -> None:
    registered = {method.spec.name for method in merge_methods.registered_methods()}
    assert {name for name in registered if name.startswith("metagpt")} == {*METHODS}
    described = OPTIONS.read_text().partition("What they do:")[2]
    described = described.partition("\n## Legal values\n")[0]
    for spec in specs().values():
        for parameter in spec.parameters:
            assert f"**`{parameter.name}`**" in described, parameter.name


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two rows."""
    section = re.split(r"(?m)^## ", text.partition(f"\n## {heading}\n")[2])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]


def test_messages_about_illegal_values(shelf: Shelf) -> None:
    names = ("./base", "./math", "./code")
    places = {name: shelf(name, at).folder for at, name in enumerate(names)}
    rows = rows_of(OPTIONS.read_text(), "Legal values")
    assert len(rows) >= 6
    for setting, message in rows:
        document = {**WHOLE, "parameters": yaml.safe_load(setting.strip("`"))}
        config = merge_yaml.read(yaml.safe_dump(replaced(document, places)))
        with pytest.raises(ValueError) as refused:
            jobs.check(config, MergeOptions())
        assert str(refused.value) == message.strip("`")


def with_parameters(
    places: Sequence[Path], level: str, parameters: dict[str, Any]
) -> dict[str, Any]:
    """A merge by metagpt_ties with parameters at one level of its YAML."""
    sources = [{"model": str(place), "layer_range": [0, 2]} for place in places]
    slices: list[dict[str, Any]] = [{"sources": sources}]
    module: dict[str, Any] = {"slices": slices}
    whole: dict[str, Any] = {"modules": {"default": module}, "dtype": "float32"}
    held: dict[str, dict[str, Any]] = {
        "model": sources[1],
        "slice": slices[0],
        "module": module,
        "whole": whole,
    }
    held[level]["parameters"] = parameters
    return {"merge_method": "metagpt_ties", "base_model": str(places[0]), **whole}


@pytest.mark.parametrize("scope", ["shared", "per model"])
def test_where_a_parameter_may_stand(scope: str, shelf: Shelf, tmp_path: Path) -> None:
    """The page's table against merges: does a parameter at a level change them?"""
    places = [shelf(name, at).folder for at, name in enumerate(("a", "b", "c"))]
    changed = {"shared": {"power": 0.0}, "per model": {"density": 0.2}}[scope]
    unchanged = run_mergekit(with_parameters(places, "whole", {}), tmp_path / "none")
    rows = rows_of(OPTIONS.read_text(), "Where a parameter may stand")
    for level, row in zip(("model", "slice", "module", "whole"), rows, strict=True):
        said = row[1 if scope == "shared" else 2]
        config = with_parameters(places, level, changed)
        merged = run_mergekit(config, tmp_path / level)
        counts = any((merged[name] != unchanged[name]).any() for name in merged)
        assert counts == said.startswith("yes"), (level, said)


def yaml_blocks(name: str) -> list[dict[str, Any]]:
    return [
        yaml.safe_load(block.text)
        for block in blocks_of(page(name))
        if block.language == "yaml"
    ]


def test_gradients_and_filters(shelf: Shelf, tmp_path: Path) -> None:
    """The page's example, tensor by tensor, as its text explains it."""
    _, document = yaml_blocks("docs/options.md")
    names = ["./models/base", "./models/math", "./models/code"]
    found = [shelf(name, position) for position, name in enumerate(names)]
    folders = (stand_in.folder for stand_in in found)
    places = dict(zip(names, folders, strict=True))
    merged = run_mergekit(replaced(document, places), tmp_path / "out")
    base, *models = (stand_in.state for stand_in in found)
    sets = set()
    for name, tensor in merged.items():
        lambdas = naive_lambdas(
            name,
            base,
            models,
            granularity="tensor" if "mlp" in name else "model",
            weight=[2.0 if "layers.1." in name else 1.0, 1.0],
            scale=0.8 if "self_attn" in name else 1.0,
        )
        sets.add(tuple(lambdas.tolist()))
        given = [model[name] for model in models]
        assert_within_bound(tensor, base[name], given, lambdas)
    assert len(sets) == 10


# ---- docs/python.md and docs/converting.md


def test_public_names() -> None:
    """The page's table has them all, called as they can be called."""
    table = page("docs/python.md").partition("\n## ")[0]
    shown = re.findall(r"(?m)^\| `(\w+)(?:\((.*)\))?` \|", table)
    assert sorted(name for name, _ in shown) == mergekit_metagpt.__all__
    for name, arguments in shown:
        function = getattr(mergekit_metagpt, name)
        if inspect.isclass(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        kept = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        called = str(inspect.Signature(kept))[1:-1]
        start = arguments.removesuffix("...")
        if name == "register":
            assert arguments == "" and all(p.default is None for p in parameters)
        else:
            assert called.startswith(start) and (start != arguments or start == called)


def test_table_of_conversions() -> None:
    """From the page's table: the method to write, and the parameters that are kept."""
    found = {}
    for line in page("docs/converting.md").splitlines():
        cells = [re.findall(r"`([\w-]+)`", cell) for cell in line.strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 3 or "metagpt" not in line:
            continue
        before, after, kept = cells
        after = after * len(before) if len(after) == 1 else after
        for old, new in zip(before, after, strict=True):
            found[old] = new, {*kept} - {"--base"}
    assert found.keys() == {*checks.CONVERTIBLE}
    for old, (new, kept) in found.items():
        theirs, ours = (
            {parameter.name for parameter in merge_methods.get(name).spec.parameters}
            for name in (old, new)
        )
        assert new == checks.recipe_for(old)
        assert kept == (theirs & ours) - {"weight"}


def examples() -> list[tuple[str, str]]:
    """The YAMLs of other methods in docs/converting.md, and what each becomes."""
    texts = [
        b.text for b in blocks_of(page("docs/converting.md")) if b.language == "yaml"
    ]
    assert all(text.startswith("# before\n") for text in texts[::2])
    assert all(text.startswith("# after\n") for text in texts[1::2])
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_conversions() -> None:
    pairs = examples()
    assert len(pairs) >= 8
    for before, after in pairs:
        base = None if "base_model" in before else yaml.safe_load(after)["base_model"]
        made = yaml.safe_load(converting.convert(before, base).text)
        assert list(made.items()) == list(yaml.safe_load(after).items())


def test_what_a_conversion_says() -> None:
    """The lines that the page shows are those of its example of DARE."""
    (before,) = (before for before, _ in examples() if "dare_ties" in before)
    made = converting.convert(before)
    said = [*made.changes, *(f"Note: {note}." for note in made.notes)]
    shown = [b for b in blocks_of(page("docs/converting.md")) if "Note:" in b.text]
    assert " ".join(shown[0].text.split()) == " ".join(" ".join(said).split())


def test_methods_to_convert_from_have_an_example() -> None:
    shown = {document["merge_method"] for document in yaml_blocks("docs/converting.md")}
    wanted = {"task_arithmetic", "ties", "dare_ties", "sce", "model_stock", "linear"}
    assert wanted <= shown


if __name__ == "__main__":
    mergekit_metagpt.register()
    OPTIONS.write_text(with_current_tables(OPTIONS.read_text()))
