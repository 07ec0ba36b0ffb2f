"""Lays a table of text out for a terminal, in blocks of columns where it is narrow."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.report.parts import printable

GAP = 2  # blanks between columns


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines behind the separators of paths and of names of tensors."""

    wordsep_simple_re = re.compile(r"(?<=[\s/.+-])")


@dataclass(frozen=True)
class _Name:
    """A name; where there is no room for it, its lines end at its separators."""

    text: str

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, cell_len(self.text)).with_maximum(options.max_width)

    def __rich_console__(
        self, _: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        lines = _Wrapper(options.max_width, break_on_hyphens=False).wrap(self.text)
        yield Text("\n".join(lines), overflow="fold")


class Blocks:
    """A table whose numbers never break: what does not fit stands below.

    Where a console is too narrow for all columns, they are divided into blocks. Each
    begins with the first column. Names take a third of the width if need be, on several
    lines.

    Args:
        headings: of the columns.
        names: headings of the columns of names, which are aligned to the left.
    """

    def __init__(self, headings: Sequence[str], *, names: Sequence[str] = ()) -> None:
        self.headings = headings
        self.names = names
        self.rows: list[list[str]] = []

    def add(self, cells: Iterable[str]) -> None:
        """Add a row of text as it is, without markup or control characters."""
        self.rows.append([printable(cell) for cell in cells])

    def __rich_console__(
        self, _: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the blocks as tables of rich."""
        room = options.max_width
        columns = zip(self.headings, *self.rows, strict=True)
        widths = [max(map(cell_len, column)) for column in columns]
        least = [
            min(width, max(room // 3, cell_len(heading)))
            if heading in self.names
            else width
            for heading, width in zip(self.headings, widths, strict=True)
        ]
        # The fewest blocks that fit, in the least room: so they are alike in width.
        ways = [_divided(least, width) for width in range(1, room + 1)]
        fewest = min(ways, key=len)
        for number, block in enumerate(fewest):
            if number:
                yield ""
            table = self._table(block, widths)
            needed = sum(least[at] for at in block) + GAP * (len(block) - 1)
            # A terminal without room for a name and a number breaks the lines itself.
            table.width = needed if needed > room else None
            yield table

    def _table(self, block: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for at in block:
            heading = Text(self.headings[at])
            if self.headings[at] in self.names:
                table.add_column(heading, overflow="fold")
            else:
                width = widths[at]
                table.add_column(heading, justify="right", overflow="fold", width=width)
        for row in self.rows:
            cells = ((row[at], self.headings[at] in self.names) for at in block)
            table.add_row(*(_Name(c) if is_name else Text(c) for c, is_name in cells))
        return table


def _divided(widths: Sequence[int], room: int) -> list[list[int]]:
    """Divide columns into blocks that begin with the first column and fit the room."""
    first, *others = widths
    blocks, left = ([] if others else [[0]]), 0
    for at, width in enumerate(others, 1):
        left -= GAP + width
        if left < 0:
            blocks.append([0])
            left = room - first - GAP - width
        blocks[-1].append(at)
    return blocks
