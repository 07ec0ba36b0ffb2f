"""The command line as such: help, version, streams, exit status, documentation."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import mergekit_metagpt
from mergekit_metagpt.arithmetic import compiled
from mergekit_metagpt.commands.cli import main
from mergekit_metagpt.commands.errors import in_one_line
from mergekit_metagpt.commands.options import quick_imports
from tests import documents
from tests.families import run_command
from tests.processes import ask_python, assert_succeeded, run_process, script

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(main.commands)
# Packages that take seconds to import: nobody should wait for them to read help.
HEAVY = ("torch", "transformers", "mergekit", "safetensors", "matplotlib", "rich")

each_command = pytest.mark.parametrize("name", COMMANDS)


def run(*arguments: str) -> int:
    """Run `mergekit-metagpt` in this process; return its exit status."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(arguments), prog_name="mergekit-metagpt")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What `--help` prints; checks that it goes to stdout alone, with status 0."""
    assert run(*command, "--help") == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def assert_begins(text: str, *lines: str) -> None:
    """Check the first lines of a text."""
    assert text.splitlines()[: len(lines)] == list(lines)


def test_help_of_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    assert_begins(
        text,
        "Usage: mergekit-metagpt [OPTIONS] COMMAND [ARGS]...",
        "",
        "  MetaGPT merging for mergekit: no weights to guess, no data, no search.",
    )
    listed = text.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert {"demo", "export", "inspect", "merge"} <= set(COMMANDS)


HELP = {
    "demo": (
        "Usage: mergekit-metagpt demo [OPTIONS] DIR",
        "",
        "  Train a tiny base and three specialists in DIR, merge and compare them.",
    ),
    "convert": (
        "Usage: mergekit-metagpt convert [OPTIONS] OLD.yml NEW.yml",
        "",
        "  Turn OLD.yml, a merge by another method, into a metagpt recipe.",
    ),
    "export": (
        "Usage: mergekit-metagpt export [OPTIONS] CONFIG OUT.yml",
        "",
        "  Write the metagpt merge CONFIG as plain mergekit YAML with fixed weights.",
    ),
    "inspect": (
        "Usage: mergekit-metagpt inspect [OPTIONS] CONFIG | MODEL...",
        "",
        "  Measure the models of CONFIG, or MODEL... against --base, without merging.",
    ),
    "cache": (
        "Usage: mergekit-metagpt cache [OPTIONS]",
        "",
        "  Show, or with --clear remove, what is remembered of earlier scans.",
    ),
    "compare": (
        "Usage: mergekit-metagpt compare [OPTIONS] CONFIG",
        "",
        "  Merge by several weights and measure each merge on your own text or tasks.",
    ),
    "recipes": (
        "Usage: mergekit-metagpt recipes [OPTIONS] [NAME]",
        "",
        "  List the recipes that ship, or print NAME.",
    ),
    "merge": (
        "Usage: mergekit-metagpt merge [OPTIONS] CONFIG OUT",
        "",
        "  Merge CONFIG into OUT as mergekit-yaml does, for metagpt configurations.",
    ),
}


@pytest.mark.parametrize("name", HELP)
def test_help_begins_with(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_begins(help_of(capsys, name), *HELP[name])


@each_command
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage, blank, summary, *_ = help_of(capsys, name).splitlines()
    assert usage.startswith(f"Usage: mergekit-metagpt {name} [OPTIONS]")
    assert blank == ""
    assert re.match(r"  [A-Z].*\S", summary), summary


@each_command
def test_every_command_fits_the_list_of_commands(name: str) -> None:
    command = main.commands[name]
    assert command.get_short_help_str(limit=200)
    assert not command.hidden and not command.deprecated


def test_short_help_option(capsys: pytest.CaptureFixture[str]) -> None:
    long = help_of(capsys)
    assert run("-h") == 0
    assert capsys.readouterr().out == long


def test_help_of_merge_shows_the_options_of_mergekit_and_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    text = help_of(capsys, "merge")
    theirs = {
        option
        for parameter in mergekit_yaml.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {"--cuda", "--lazy-unpickle", "--lora-merge-cache", "-j", "-v"} <= theirs
    for option in (*theirs, "--force"):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    said = capsys.readouterr()
    loops = "yes" if compiled.built() else "no"
    version = mergekit_metagpt.__version__
    assert said.out == (
        f"mergekit-metagpt, version {version}, compiled loops: {loops}\n"
    )
    assert said.err == ""
    installed = importlib.metadata.version("mergekit-metagpt")
    assert installed == mergekit_metagpt.__version__


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["frobnicate"], "No such command 'frobnicate'."),
        (["--frobnicate"], "No such option"),
        (["merge"], "Missing argument 'CONFIG'."),
        (["merge", str(ROOT / "pyproject.toml")], "Missing argument 'OUT'."),
        (["merge", "--frobnicate", "config.yml", "out"], "No such option"),
        (["demo"], "Missing argument 'DIR'."),
        (["demo", "there", "and-there"], "Got unexpected extra argument"),
    ],
)
def test_wrong_usage_is_status_2_and_says_so_on_stderr(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    command = arguments[0] if arguments[0] in COMMANDS else ""
    see = f" (see {' '.join(['mergekit-metagpt', command]).strip()} --help)"
    assert line.startswith(f"Error: {complaint.rstrip('.')}") and line.endswith(see)


def test_group_without_a_command_shows_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(capsys)
    assert run() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == text


@pytest.mark.parametrize("error", [ValueError, OSError, FileExistsError])
def test_demo_chats_on_stderr_and_answers_errors_in_one_line(
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mergekit_metagpt.commands.demo as demo

    def fail(folder: Path, say: Callable[[str], Any]) -> None:
        say("training the base")
        raise error(f"{folder} is\n   not to my taste")

    monkeypatch.setattr(demo, "run", fail)
    folder = tmp_path / "demo"
    assert run("demo", str(folder)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"training the base\nError: {folder} is not to my taste\n"


def test_paths_with_backslashes_stay_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    r"""Python's own message doubles them: `[Errno 2] ...: 'models\\\\merge.yml'`."""
    monkeypatch.chdir(tmp_path)
    name = r"C:\models\merge.yml"
    for command in (["inspect", name], ["export", name, "-"], ["convert", name, "-"]):
        assert run(*command) == 2
        said = capsys.readouterr().err
        assert said == f"Error: {name} does not exist; expected a merge YAML\n"
    error = PermissionError(13, "Permission denied", name)
    assert in_one_line(error) == f"{name}: Permission denied"


def test_only_mergekit_is_to_be_installed_where_mergekit_is_missing() -> None:
    other = ImportError("This modeling file requires flash_attn")
    assert in_one_line(other) == str(other)
    ours = ModuleNotFoundError("No module named 'mergekit.io'", name="mergekit.io")
    assert "Install mergekit" in in_one_line(ours)


# --- fresh processes ------------------------------------------------------------------

IMPORTED = f"""
import contextlib, io, sys
from mergekit_metagpt.commands.cli import main

with contextlib.redirect_stdout(io.StringIO()) as said:
    try:
        main(ARGUMENTS, prog_name="mergekit-metagpt")
    except SystemExit as ended:
        assert ended.code == 0, ended.code
assert said.getvalue()
answer(sorted(set(sys.modules) & set({HEAVY!r})))
"""


def imported_by(*arguments: str) -> list[str]:
    """Which heavy packages a fresh process has imported after printing help."""
    found = ask_python(IMPORTED.replace("ARGUMENTS", json.dumps(arguments)))
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["demo", "--help"], ["inspect", "--help"], ["recipes"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments) == []


def test_the_check_of_imports_can_fail() -> None:
    # The options are mergekit's: its help cannot do without.
    assert {"torch", "transformers", "mergekit"} <= set(imported_by("merge", "--help"))


def test_console_script() -> None:
    done = run_process([script("mergekit-metagpt"), "--version"])
    assert_succeeded(done)
    assert done.stdout.startswith(
        f"mergekit-metagpt, version {mergekit_metagpt.__version__}"
    )
    assert done.stderr == ""

    done = run_process([script("mergekit-metagpt"), "frobnicate"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: No such command 'frobnicate'")


# --- documentation --------------------------------------------------------------------


def documentation() -> str:
    """README.md and, where it exists, docs/cli.md."""
    pages = [ROOT / "README.md", ROOT / "docs" / "cli.md"]
    return "\n".join(page.read_text() for page in pages if page.exists())


def test_the_page_is_what_the_code_says() -> None:
    # To renew it: python -m tests.documents
    page = documents.CLI.read_text()
    assert page == documents.with_current_parts(page)
    assert page.count("<!-- help: ") == len(COMMANDS) - 1 and "schema_version" in page


@each_command
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"`?mergekit-metagpt {name}\b", documentation())


def test_every_documented_command_exists() -> None:
    named = set(re.findall(r"`mergekit-metagpt ([a-z]+)", documentation()))
    assert named and named <= set(COMMANDS), named - set(COMMANDS)


def test_every_documented_option_of_merge_exists(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(capsys, "merge")
    lines = re.findall(r"mergekit-(?:metagpt merge|yaml) [^`\n]*", documentation())
    assert lines
    for line in lines:
        for option in re.findall(r"(?<!\S)--[a-z-]+", line):
            assert option in text, (option, line)


def test_a_misspelt_folder_above_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.checkpoints.nearby import nearest

    monkeypatch.chdir(tmp_path)
    Path("models/logs").mkdir(parents=True)
    assert nearest(Path("./modles/logs"), folders=True) == "./models/logs"
    assert nearest(Path("./modles/lgos"), folders=True) == "./models/logs"
    assert nearest(Path("./models/far/logs"), folders=True) is None
    assert nearest(tmp_path / "modles/logs") == str(tmp_path / "models/logs")


def test_a_yaml_is_mistaken_for_a_yaml_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.checkpoints.nearby import nearest

    monkeypatch.chdir(tmp_path)
    for name in ("merge1.yaml", "arithmetic1.txt", "notes"):
        Path(name).touch()
    for name in ("arithmetic", "archived", "merge1.yml.d"):
        Path(name).mkdir()
    assert nearest(Path("merge1.yml")) == "./merge1.yaml"
    assert nearest(Path("archived.yml")) is None
    assert nearest(Path("arithmetic.txt")) == "./arithmetic1.txt"
    assert nearest(Path("archivd")) == "./archived"
    assert nearest(Path("note")) == "./notes"


def test_verify_of_what_is_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, what in ((tmp_path / "missing", "does not exist"), (file, "is a file")):
        assert run_command("verify", path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"Error: {path} {what}; expected the folder of a merged model"


def test_merge_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "merge.yml"
    file.write_text("merge_method: metagpt\nmodels: [{model: ./m}]\n")
    assert run_command("merge", file, file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {file} is a file; expected a folder")


def test_garbage_is_collected_again_after_imports() -> None:
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
