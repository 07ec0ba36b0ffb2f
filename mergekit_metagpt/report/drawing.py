"""A page to draw on, in inches from its upper left corner; knows nothing of merges."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_metagpt.method.announcing import estimates

FORMATS = (".png", ".svg", ".pdf")
# Inches, but for fonts and widths of lines, which are in points. A model card shows a
# page about 700 pixels wide: a point is 1.4 pixels there.
WIDTH, MARGIN, DPI = 7.0, 0.12, 200
RIGHT = WIDTH - MARGIN
MINUS = "\N{MINUS SIGN}"
SIZE, SMALL = 9.0, 8.0
INK, GREY, FAINT = "#1a1a1a", "#5f5f5f", "#c4c4c4"
BLUE = "#4c72b0"
LONGEST_LABEL = 40
GAP, LINE = 0.12, 0.2


class Page:
    """A white page as wide as a model card; its height is known when it is saved.

    The caller measures texts and places them: matplotlib's layout engine and ticks
    would take most of the time of a figure.
    """

    def __init__(self) -> None:
        # pyplot would keep every figure in memory, and set up windows.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor="white")
        canvas: Any = FigureCanvasAgg(self.figure)
        self._renderer = canvas.get_renderer()
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_autoscale_on(False)
        self._widths: dict[tuple[str, float, bool], float] = {}

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = SIZE,
        align: str = "left",
        color: str = INK,
        bold: bool = False,
    ) -> None:
        """Write a line of text.

        Args:
            x: its left end, right end or center, as `align` says.
            y: the middle of its capitals.
            words: plain text.
            size: of the font.
            align: `left`, `right` or `center`.
            color: of the text.
            bold: whether the font is bold.
        """
        self._axes.text(
            x,
            y + 0.365 * size / 72,
            words,
            size=size,
            ha=align,
            va="baseline",
            color=color,
            weight="bold" if bold else "normal",
            parse_math=False,  # a name may have dollar signs
        )

    def width(self, words: str, size: float = SIZE, *, bold: bool = False) -> float:
        """Return the width of a line of text."""
        from matplotlib.font_manager import FontProperties

        key = words, size, bold
        if key not in self._widths:
            font = FontProperties(size=size, weight="bold" if bold else "normal")
            found = self._renderer.get_text_width_height_descent(words, font, False)
            self._widths[key] = found[0] / DPI
        return self._widths[key]

    def paragraph(
        self,
        y: float,
        words: str,
        *,
        size: float = SMALL,
        color: str = GREY,
        bold: bool = False,
    ) -> float:
        """Write text from margin to margin.

        Args:
            y: its upper end.
            words: plain text; lines break between words.
            size: of the font.
            color: of the text.
            bold: whether the font is bold.

        Returns:
            its lower end.
        """
        step, space = 1.4 * size / 72, self.width(" ", size, bold=bold)
        lines, end = [""], WIDTH
        for word in words.split():
            wide = self.width(word, size, bold=bold)
            if end + space + wide > RIGHT - MARGIN and lines[-1]:
                lines.append("")
            if lines[-1]:
                lines[-1] += f" {word}"
                end += space + wide
            else:
                lines[-1], end = word, wide
        for line in lines:
            self.text(MARGIN, y + step / 2, line, size=size, color=color, bold=bold)
            y += step
        return y

    def heading(self, y: float, words: str, size: float = SIZE) -> float:
        """Write a heading from margin to margin, and return its lower end."""
        return self.paragraph(y, words, size=size, color=INK, bold=True)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        color: str,
        edge: str = "none",
        *,
        hatched: bool = False,
    ) -> None:
        """Draw a rectangle.

        Args:
            x: its left side.
            y: its top.
            width: of the rectangle.
            height: of the rectangle.
            color: of the inside.
            edge: color of the border.
            hatched: whether to fill it with oblique lines of the border's color.
        """
        from matplotlib.patches import Rectangle

        look: dict[str, Any] = {"facecolor": color, "edgecolor": edge, "lw": 0.6}
        if hatched:
            look["hatch"] = "/////"
        self._axes.add_artist(Rectangle((x, y), width, height, **look))

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        color: str = GREY,
        width: float = 0.8,
        style: str = "-",
    ) -> None:
        """Draw a line through points, in a line style of matplotlib."""
        from matplotlib.lines import Line2D

        self._axes.add_artist(
            Line2D(xs, ys, color=color, lw=width, ls=style, solid_capstyle="butt")
        )

    def mark(self, x: float, y: float, shape: str, color: str, inside: str) -> None:
        """Draw a marker of matplotlib, with a border and an inside of two colors."""
        from matplotlib.lines import Line2D

        self._axes.add_artist(
            Line2D([x], [y], marker=shape, ms=5.5, mec=color, mfc=inside, mew=1, ls="")
        )

    def cells(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        shades: Sequence[Sequence[float]],
        *,
        colors: str = "Blues",
        lightest: float = 0.0,
        lined: bool = False,
    ) -> None:
        """Shade a grid of cells.

        Args:
            xs: edges of the C columns, `C + 1`.
            ys: edges of the R rows, `R + 1`.
            shades: from 0 to 1, R rows of C; NaN leaves a cell as it is.
            colors: a color map of matplotlib.
            lightest: place of shade 0 in the color map, from 0 to 1.
            lined: whether white lines separate the cells.
        """
        from matplotlib import colormaps

        self._axes.pcolormesh(
            xs,
            ys,
            [[lightest + (1 - lightest) * shade for shade in row] for row in shades],
            cmap=colormaps[colors],
            vmin=0,
            vmax=1,
            edgecolors="white" if lined else "none",
            linewidth=0.6 if lined else 0,
        )

    def save(self, file: Path, height: float) -> None:
        """Write the page, of a given height, in the format of the file's ending."""
        self.figure.set_size_inches(WIDTH, height)
        self._axes.set_xlim(0, WIDTH)
        self._axes.set_ylim(height, 0)
        self.figure.savefig(file, dpi=DPI)


@dataclass(frozen=True)
class Rows:
    """A row of a page for each model: its label, and on its right what is shown of it.

    Attributes:
        page: on which to draw.
        labels: one for each row.
        left: where the room to the right of the labels begins.
        height: of a row.
        size: of the font.
    """

    page: Page
    labels: Sequence[str]
    left: float
    height: float
    size: float

    @classmethod
    def of(cls, page: Page, labels: Sequence[str], least: float = 0.13) -> Rows:
        """Make rows, lower ones the more there are, and at least `least` high."""
        height = max(least, min(0.24, 2.4 / len(labels)))
        size = min(SIZE, 0.7 * 72 * height)
        widest = max(page.width(label, size) for label in labels)
        return cls(page, labels, MARGIN + widest + GAP, height, size)

    def bottom(self, y: float) -> float:
        """Return where rows end that begin at `y`."""
        return y + self.height * len(self.labels)

    def middles(self, y: float) -> Iterator[float]:
        """Iterate over the middles of rows that begin at `y`."""
        return (y + self.height * (row + 0.5) for row in range(len(self.labels)))

    def write(self, y: float) -> None:
        """Write the labels of rows that begin at `y`."""
        for label, at in zip(self.labels, self.middles(y), strict=True):
            self.page.text(MARGIN, at, label, size=self.size)

    def room(self, cells: Sequence[str], heading: str) -> float:
        """Return how wide a column of a cell for each row is, with a gap."""
        widths = [self.page.width(cell, self.size) for cell in cells]
        return max(*widths, self.page.width(heading, SMALL)) + GAP

    def column(
        self, y: float, right: float, cells: Sequence[str], heading: str
    ) -> float:
        """Write a column, flush right, and return where the room left of it ends.

        Args:
            y: top of the first row; the heading stands above it.
            right: right end of the cells.
            cells: one for each row.
            heading: of the column.

        Returns:
            its left end, and a gap.
        """
        for cell, at in zip(cells, self.middles(y), strict=True):
            self.page.text(right, at, cell, size=self.size, align="right")
        self.page.text(
            right, y - LINE / 2, heading, size=SMALL, align="right", color=GREY
        )
        return right - self.room(cells, heading)


def labels(names: Sequence[str], limit: int = LONGEST_LABEL) -> list[str]:
    """Shorten names so that no two models get the same label.

    Of a path, only as many of the last folders are kept as tell the models apart. What
    is still too long loses its middle.

    Args:
        names: paths or hub names, perhaps with an adapter after a plus sign.
        limit: characters of a label, at most.

    Returns:
        a label for each name, numbered if shortening makes two labels the same.

    Example:
        >>> labels(["/data/models/math", "./code", "owner/chat"])
        ['math', 'code', 'owner/chat']
        >>> labels(["/data/a/final", "/data/b/final"])
        ['a/final', 'b/final']
        >>> labels(["a-model-of-some-length-1", "a-model-of-some-length-2"], 12)
        ['a-mod...th-1', 'a-mod...th-2']
    """
    different = len(set(names))
    most = max(name.count("/") + 1 for name in names)
    for parts in range(1, most + 1):
        tails = ["+".join(_tail(p, parts) for p in n.split("+")) for n in names]
        if len(set(tails)) == different:
            break
    room = max(limit - 3, 2)
    middle = (room + 1) // 2
    # Leave out what the names have in common, else what is in the middle.
    heads = sorted(
        range(room + 1),
        key=lambda head: (
            len({tail[head : head - room or None] for tail in tails}),
            abs(head - middle),
        ),
    )
    for head in heads:
        short = [_shortened(tail, head, room - head) for tail in tails]
        if len(set(short)) == different:
            return short
    short = [_shortened(tail, middle - 2, room - middle - 2) for tail in tails]
    return [f"{number} {label}" for number, label in enumerate(short, 1)]


def percents(
    values: Sequence[float | None],
    errors: Sequence[float | None],
    digits: int,
    most: int = 99,
) -> list[str]:
    """Write shares as percentages, all with the same number of decimals.

    Args:
        values: shares; None becomes a dash.
        errors: their standard errors; None or 0 where they are exact.
        digits: decimals, at least; more where errors need them.
        most: decimals of estimates, at most.

    Returns:
        a text for each value.
    """

    def exact(value: float) -> str:
        least = 10.0**-digits
        return (
            f"< {least:.{digits}f}" if 0 < value < least / 2 else f"{value:.{digits}f}"
        )

    hundredths = [None if value is None else 100 * value for value in values]
    of_these = [None if error is None else 100 * error for error in errors]
    cells = estimates(hundredths, of_these, exact, least=digits, most=most)
    return [cell if cell == "-" else f"{cell}%" for cell in cells]


def fitting(page: Page, names: Sequence[str], room: float = 3.2) -> list[str]:
    """Shorten names to labels, as `labels` does, that are no wider than `room`."""
    for limit in range(LONGEST_LABEL, 12, -4):
        short = labels(names, limit)
        if max(map(page.width, short)) <= room:
            break
    return short


def _tail(name: str, parts: int) -> str:
    """The last parts of a path; hub names keep their owner."""
    hub = re.fullmatch(r"[^./~\\][^/]*/[^/]+", name)
    return "/".join(name.rstrip("/").split("/")[-max(parts, 2 if hub else 1) :])


def _shortened(label: str, head: int, tail: int) -> str:
    if len(label) <= head + tail + 3:
        return label
    return f"{label[:head]}...{label[len(label) - tail :]}"
