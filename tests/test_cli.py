"""The command line as such: help, version, streams, exit status, documentation."""

from __future__ import annotations

import errno
import gc
import importlib.metadata
import json
import os
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
from tests.conftest import Cli
from tests.processes import ask_python, run_process, script

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(main.commands)
# Packages that take seconds to import: nobody should wait for them to read help.
HEAVY = ("torch", "transformers", "mergekit", "safetensors", "matplotlib", "rich")

each_command = pytest.mark.parametrize("name", COMMANDS)


def help_of(cli: Cli, *command: str) -> str:
    """What `--help` prints, to stdout alone."""
    printed = cli(*command, "--help")
    assert printed.err == ""
    return printed.out


def test_help_of_the_group(cli: Cli) -> None:
    text = help_of(cli)
    assert text.splitlines()[:3] == [
        "Usage: mergekit-metagpt [OPTIONS] COMMAND [ARGS]...",
        "",
        "  MetaGPT merging for mergekit: no weights to guess, no data, no search.",
    ]
    listed = text.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert {"demo", "export", "inspect", "merge"} <= set(COMMANDS)
    assert cli("-h").out == text
    without_command = cli(status=2)
    assert (without_command.out, without_command.err) == ("", text)


@each_command
def test_help_of_every_command(name: str, cli: Cli) -> None:
    """docs/cli.md has the whole text of each but `merge`."""
    usage, blank, summary, *_ = help_of(cli, name).splitlines()
    assert usage.startswith(f"Usage: mergekit-metagpt {name} [OPTIONS]")
    assert blank == ""
    assert re.match(r"  [A-Z].*\S", summary), summary
    command = main.commands[name]
    assert command.get_short_help_str(limit=200)
    assert not command.hidden and not command.deprecated


def test_help_of_merge_shows_the_options_of_mergekit_and_ours(cli: Cli) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    text = help_of(cli, "merge")
    assert text.startswith("Usage: mergekit-metagpt merge [OPTIONS] CONFIG OUT\n")
    theirs = {
        option
        for parameter in mergekit_yaml.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {"--cuda", "--lazy-unpickle", "--lora-merge-cache", "-j", "-v"} <= theirs
    for option in (*theirs, "--force"):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option


def test_version(cli: Cli) -> None:
    version = importlib.metadata.version("mergekit-metagpt")
    assert mergekit_metagpt.__version__ == version
    loops = "yes" if compiled.built() else "no"
    printed = cli("--version")
    assert printed.err == ""
    expected = f"mergekit-metagpt, version {version}, compiled loops: {loops}\n"
    assert printed.out == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("frobnicate", "No such command 'frobnicate'."),
        ("--frobnicate", "No such option"),
        ("merge", "Missing argument 'CONFIG'."),
        (f"merge {ROOT / 'pyproject.toml'}", "Missing argument 'OUT'."),
        ("verify . --random-seed -1", "Invalid value for '--random-seed'"),
        (f"export . - --lora-merge-cache {__file__}", "Invalid value for '--lora-m"),
        ("merge --frobnicate config.yml out", "No such option"),
        ("demo", "Missing argument 'DIR'."),
        ("demo there and-there", "Got unexpected extra argument"),
        ("inspect", "Missing argument 'CONFIG | MODEL...'."),
        ("inspect merge.yml --granularity block", "Invalid value for '--granularity'"),
        ("inspect merge.yml --power two", "Invalid value for '--power'"),
        ("verify", "Missing argument"),
    ],
)
def test_wrong_usage_is_status_2_and_says_so_on_stderr(
    arguments: str, complaint: str, cli: Cli
) -> None:
    line = cli.refused(*arguments.split())
    command = arguments.split()[0]
    see = ["mergekit-metagpt", *([command] if command in COMMANDS else []), "--help"]
    assert line.startswith(f"Error: {complaint.rstrip('.')}")
    assert line.endswith(f" (see {' '.join(see)})")


@pytest.mark.parametrize("error", [ValueError, OSError, FileExistsError])
def test_demo_chats_on_stderr_and_answers_errors_in_one_line(
    error: type[Exception], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit_metagpt.commands.demo as demo

    def fail(folder: Path, say: Callable[[str], Any]) -> None:
        say("training the base")
        raise error(f"{folder} is\n   not to my taste")

    monkeypatch.setattr(demo, "run", fail)
    printed = cli("demo", "there", status=2)
    assert printed.out == ""
    assert printed.err == "training the base\nError: there is not to my taste\n"


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.commands import printing

    file = tmp_path / "report.json"
    printing.write_text(str(file), "old")
    file.chmod(0o600)
    printing.write_text(str(file), "new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*report\.json'"):
        printing.write_text(str(file), "newer")
    with pytest.raises(OSError, match="No space"), printing.whole(str(file)) as part:
        part.write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert file.read_text() == "new"


def test_paths_with_backslashes_stay_readable(cli: Cli) -> None:
    r"""Python's own message doubles them: `[Errno 2] ...: 'models\\\\merge.yml'`."""
    name = r"C:\models\merge.yml"
    for command in (["inspect", name], ["export", name, "-"], ["convert", name, "-"]):
        said = cli.refused(*command)
        assert said == f"Error: {name} does not exist; expected a merge YAML"
    error = PermissionError(13, "Permission denied", name)
    assert in_one_line(error) == f"{name}: Permission denied"


@pytest.mark.parametrize("command", ["merge", "export", "convert"])
def test_swapped_arguments_and_a_missing_yaml_come_first(
    command: str, tmp_path: Path, cli: Cli
) -> None:
    file, missing = tmp_path / "merge.yml", tmp_path / "new"
    file.write_text("precious")
    said = cli.refused(command, missing, file)
    assert f"{missing} does not exist; expected a merge YAML" in said
    assert "are the two arguments swapped?" in said
    assert file.read_text() == "precious"


def test_verify_asks_for_the_folder_of_nearly_that_name(
    tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "mergee.yml").touch()
    said = cli.refused("verify", tmp_path / "merge")
    assert said.endswith(f"a merged model. Did you mean {tmp_path / 'merged'}?")


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
    done = run_process([script("mergekit-metagpt"), "frobnicate"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: No such command 'frobnicate'")


# That documented commands and options exist is checked by test_docs.py.
def test_the_page_is_what_the_code_says() -> None:
    # To renew it: python -m tests.documents
    page = documents.CLI.read_text()
    assert page == documents.with_current_parts(page)
    shown = re.findall("<!-- help: (.*) -->", page)
    assert sorted([*shown, "merge"]) == COMMANDS and "schema_version" in page
    headings = re.findall("^## `mergekit-metagpt (.*)`$", page, re.M)
    assert sorted(headings) == COMMANDS


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


def test_verify_of_what_is_no_folder(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, what in ((tmp_path / "missing", "does not exist"), (file, "is a file")):
        expected = f"Error: {path} {what}; expected the folder of a merged model"
        assert cli.refused("verify", path) == expected


def test_garbage_is_collected_again_after_imports() -> None:
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
