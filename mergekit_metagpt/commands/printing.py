"""Prints reports, and writes what a command was asked to write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

# Table width when stdout is not a terminal, so that rows are not wrapped.
PIPE_WIDTH = 240


def show(parts: Iterable[str | Table]) -> None:
    """Print tables, and text whose lines are not broken, to stdout."""
    from rich.console import Console

    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if fixed else PIPE_WIDTH
    console = Console(width=width, highlight=False, emoji=False)
    for part in parts:
        text = printable(part) if isinstance(part, str) else part
        console.print(text, soft_wrap=isinstance(part, str), markup=False)


def write_text(file: str, text: str) -> None:
    """Write to a file, or to stdout for -."""
    with click.open_file(file, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(file: str | None, found: BaseModel) -> None:
    """Write a report as JSON to a file, or to stdout for -; nothing without a file."""
    if file is not None:
        write_text(file, found.model_dump_json(indent=2) + "\n")


def write_yaml(out: str, text: str, *, then: str) -> None:
    """Write a YAML all or nothing; say on stderr what is where, and what to do next."""
    with click.open_file(out, "w", encoding="utf-8", atomic=True) as stream:
        stream.write(text)
    place = "stdout" if out == "-" else out
    size = len(text.encode("utf-8"))
    click.echo(printable(f"Wrote {place} ({size:,} bytes). {then}"), err=True)
