"""Prints tables and prose, and writes the files that a command was asked for."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

# Table width when stdout is not a terminal, so that rows are not wrapped.
PIPE_WIDTH = 240
# Blanks at the end of a line, which may stand among codes for colours.
_END = re.compile(r"(?: |\x1b\[[\d;]*m)+$")


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and prose to stdout.

    Prose is wrapped between words, at the width of the terminal or that of COLUMNS. In
    a pipe, a paragraph is one line, and no line ends in blanks.
    """
    from rich.console import Console

    piped = not sys.stdout.isatty()
    wide = piped and "COLUMNS" not in os.environ
    width = PIPE_WIDTH if wide else None
    console = Console(width=width, highlight=False, emoji=False)
    for part in parts:
        if isinstance(part, str):
            text = printable(part)
            lines = text.split("\n")
            if not wide:
                lines = [piece for line in lines for piece in _wrapped(line, console)]
        elif piped:
            with console.capture() as captured:
                console.print(part, crop=False)
            lines = [
                _END.sub(lambda end: end[0].replace(" ", ""), line)
                for line in captured.get().splitlines()
            ]
        else:
            console.print(part, crop=False)
            continue
        click.echo("\n".join(lines))


def _wrapped(line: str, console: Console) -> list[str]:
    """Break a line between words, so that names and paths stay whole."""
    return textwrap.wrap(
        line, console.width, break_long_words=False, break_on_hyphens=False
    ) or [line]


def write_text(file: str, text: str) -> None:
    """Write to a file, all or nothing, or to stdout for -."""
    if file == "-" or (Path(file).exists() and not Path(file).is_file()):  # a pipe
        with click.open_file(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole(file: str) -> Iterator[Path]:
    """Yield a hidden file to write, which takes the place of `file` at the end.

    It has the same ending. If it cannot be written, the OSError names `file`, which
    stays as it was.
    """
    place = Path(os.path.realpath(file))
    part = place.with_name(f".{secrets.token_urlsafe(6)}{place.suffix}")
    try:
        yield part
        if place.exists():
            shutil.copymode(place, part)
        part.replace(place)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file) from error
    finally:
        part.unlink(missing_ok=True)


def write_json(file: str | None, found: BaseModel) -> None:
    """Write a report as JSON to a file, if one is given; to stdout for -."""
    if file is not None:
        from mergekit_metagpt.report.schema import as_json

        write_text(file, as_json(found))


def tell_written(*files: str | None) -> None:
    """Say on stderr which files were written, if any; stdout is none."""
    from mergekit_metagpt.report.ranking import listed

    named = [file for file in files if file and file != "-"]
    if named:
        click.echo(printable(f"Wrote {listed(named)}"), err=True)


def write_yaml(out: str, text: str, *, then: str) -> None:
    """Write a YAML, all or nothing; say on stderr in which file, and what is next."""
    write_text(out, text)
    size = len(text.encode("utf-8"))
    wrote = "" if out == "-" else f"Wrote {out} ({size:,} bytes). "
    click.echo(printable(f"{wrote}{then}"), err=True)
