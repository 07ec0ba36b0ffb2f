"""Brings tables, quoted figures and pictures up to date with results.json."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from figures import FIGURES
from results import Results
from tables import TABLES
from values import value

HERE = Path(__file__).resolve().parent
PAGES = ("evaluation.md", "experiments/tables.md")
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n\n)(?:\|.*\n)*")
_FIGURE = r"[-+]?\d+(?:\.\d+)?(?:%| of \d+)?"


def read_quotes(name: str) -> list[str]:
    """Read the fragments of one of `PAGES` in quotes.txt, keys in place of figures."""
    text = (HERE / "quotes.txt").read_text()
    own = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    return [line for line in own.splitlines() if line and not line.startswith("#")]


def keys_of(quote: str) -> list[str]:
    """List the keys of a quote's figures."""
    return re.findall(r"\{(.+?)\}", quote)


def pattern_of(quote: str) -> re.Pattern[str]:
    """Match a quote, whatever its figures are and wherever its lines break.

    The groups are the words around the figures.
    """
    words = re.split(r"\{.+?\}", quote)
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in words]
    return re.compile(_FIGURE.join(f"({part})" for part in parts))


def with_tables(page: str, results: Results) -> str:
    """Rewrite each table of a page below its marker, `<!-- table: NAME -->`.

    Raises:
        KeyError: there is no table of that name.
    """
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]](results)}\n", page)


def with_figures(page: str, results: Results, quotes: list[str]) -> str:
    """Rewrite the figures of each quote in a page.

    Args:
        page: text of the page.
        results: where the figures come from.
        quotes: fragments of the page, as in quotes.txt.

    Returns:
        the page, with its figures brought up to date.

    Raises:
        ValueError: a quote is not on the page, or more than once.
        KeyError: a quote asks for a figure that does not exist.
    """
    for quote in quotes:
        figures = [value(results, key) for key in keys_of(quote)]

        def current(match: re.Match[str], figures: list[str] = figures) -> str:
            first, *others = match.groups()
            pairs = zip(figures, others, strict=True)
            return first + "".join(figure + words for figure, words in pairs)

        page, count = pattern_of(quote).subn(current, page)
        if count != 1:
            raise ValueError(f"the page has this {count} times, not once: {quote}")
    return page


def up_to_date(name: str, page: str, results: Results) -> str:
    """Bring the text of one of `PAGES` up to date."""
    return with_figures(with_tables(page, results), results, read_quotes(name))


def write_pages(folder: Path) -> None:
    """Rewrite the pages under `folder`, and `folder`/experiments/*.png."""
    results = Results.read(folder / "experiments" / "results.json")
    for name in PAGES:
        page = folder / name
        if not page.exists():
            shutil.copyfile(HERE.parent / name, page)
        page.write_text(up_to_date(name, page.read_text(), results))
    for name, draw in FIGURES.items():
        draw(results, folder / "experiments" / name)
