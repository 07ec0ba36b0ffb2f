"""Rewrites tables, single figures and pictures of evaluation.md from the results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from figures import FIGURES
from results import Results
from tables import TABLES
from values import value

HERE = Path(__file__).resolve().parent
_TABLE = re.compile(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", re.DOTALL)
_VALUE = re.compile(r"<!-- value: ([^>]+?) -->.*?<!-- end -->", re.DOTALL)


def filled(page: str, found: Results) -> str:
    """Put the results' tables and single figures between the page's markers.

    Args:
        page: text of evaluation.md.
        found: what to write.

    Returns:
        the page, with everything between its markers replaced.

    Raises:
        KeyError: a marker names no table or figure.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n\n{TABLES[name](found)}\n\n<!-- end -->"

    def single(match: re.Match[str]) -> str:
        return f"<!-- value: {match[1]} -->{value(found, match[1])}<!-- end -->"

    return _VALUE.sub(single, _TABLE.sub(table, page))


def write_page(folder: Path) -> None:
    """Rewrite `folder`/evaluation.md and `folder`/experiments/*.png."""
    page = folder / "evaluation.md"
    if not page.exists():
        shutil.copyfile(HERE.parent / "evaluation.md", page)
    found = Results.read(folder / "experiments" / "results.json")
    page.write_text(filled(page.read_text(), found))
    for name, draw in FIGURES.items():
        draw(found, folder / "experiments" / name)
