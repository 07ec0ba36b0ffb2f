"""A table that fits its terminal: rows of text in, aligned or flowing text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.names import printable

# Between two columns, and the least width of a column whose cells may be folded.
GAP = 3
LEAST = 16


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether its cells are names, which may be folded."""

    heading: str
    names: bool = False


@dataclass
class Sheet:
    """Rows under headings; cells are printed as they are, without markup.

    In a terminal too narrow for all columns each row flows over several lines, every
    cell behind its heading: nothing is cut off.
    """

    columns: Sequence[Column]
    rows: list[Sequence[str]] = field(default_factory=list)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield self._table()
            return
        yield Text()
        for first, *others in self.rows:
            heading, *headings = (column.heading for column in self.columns)
            label = first if self.columns[0].names else f"{heading}{first}"
            cells = [
                f"{heading} {cell}"
                for heading, cell in zip(headings, others, strict=True)
            ]
            line = f"{label}  {', '.join(cells)}"
            yield Padding(Text(printable(line), overflow="fold"), (0, 0, 0, 1))
        yield Text()

    def _least_width(self) -> int:
        width = 2 - GAP
        for at, column in enumerate(self.columns):
            cells = [column.heading, *(row[at] for row in self.rows)]
            natural = max(map(cell_len, cells))
            width += GAP + (min(natural, LEAST) if column.names else natural)
        return width

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(
                Text(column.heading),
                justify="left" if column.names else "right",
                overflow="fold" if column.names else "ellipsis",
                no_wrap=not column.names,
            )
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table
