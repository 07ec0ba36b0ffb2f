"""A page to draw on, in inches from its upper left corner; knows nothing of merges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")
# A model card shows a page some 700 pixels wide: a point of a font is 1.4 pixels there.
WIDTH, MARGIN, DPI = 7.0, 0.12, 200
MINUS = "\N{MINUS SIGN}"
SIZE, SMALL = 9.0, 8.0
INK, GREY, FAINT = "#1a1a1a", "#5f5f5f", "#c4c4c4"
BLUE = "#4c72b0"
LONGEST_LABEL = 40
GAP, LINE = 0.12, 0.2


class Page:
    """A white page as wide as a model card; its height is known when it is saved.

    Texts are measured, and placed by the caller: the layout engine and the ticks of
    matplotlib are most of what a figure costs.
    """

    def __init__(self) -> None:
        # pyplot would keep every figure, and set up windows.
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
        """Write a line whose capitals are centred on a height.

        Args:
            x: of the end that `align` names.
            y: of the middle.
            words: plain text.
            size: of the font, in points.
            align: left, right or center.
            color: of the text.
            bold: whether it is.
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
        """Measure a line.

        Args:
            words: plain text.
            size: of the font, in points.
            bold: whether it is.

        Returns:
            its width in inches.
        """
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
        """Write lines from margin to margin.

        Args:
            y: upper end.
            words: plain text.
            size: of the font, in points.
            color: of the text.
            bold: whether it is.

        Returns:
            the lower end.
        """
        step, space = 1.4 * size / 72, self.width(" ", size, bold=bold)
        lines, end = [""], WIDTH
        for word in words.split():
            wide = self.width(word, size, bold=bold)
            if end + space + wide > WIDTH - 2 * MARGIN and lines[-1]:
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
        """Draw a rectangle from its upper left corner.

        Args:
            x: left.
            y: top.
            width: to the right.
            height: downwards.
            color: of the inside.
            edge: color of the border.
            hatched: whether oblique lines of the same color fill it.
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
        """Draw a line through points.

        Args:
            xs: of the points.
            ys: of the points.
            color: of the line.
            width: in points.
            style: of matplotlib.
        """
        from matplotlib.lines import Line2D

        self._axes.add_artist(
            Line2D(xs, ys, color=color, lw=width, ls=style, solid_capstyle="butt")
        )

    def mark(self, x: float, y: float, shape: str, color: str, inside: str) -> None:
        """Draw a mark.

        Args:
            x: of its middle.
            y: of its middle.
            shape: of matplotlib.
            color: of its border.
            inside: color of its inside.
        """
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
            xs: edges of the columns.
            ys: edges of the rows.
            shades: from 0 to 1 by row and column; NaN leaves a cell as it is.
            colors: a color map of matplotlib.
            lightest: where in the map shade 0 is.
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
        """Write the page.

        Args:
            file: the picture; its ending, one of `FORMATS`, chooses the format.
            height: of the page.
        """
        self.figure.set_size_inches(WIDTH, height)
        self._axes.set_xlim(0, WIDTH)
        self._axes.set_ylim(height, 0)
        self.figure.savefig(file, dpi=DPI)


@dataclass(frozen=True)
class Rows:
    """A row for each model: its label, and where what is shown of it begins.

    Attributes:
        labels: one for each row.
        left: right end of the labels, and a gap.
        height: of a row.
        size: of the font, in points.
    """

    labels: Sequence[str]
    left: float
    height: float
    size: float

    @classmethod
    def of(cls, page: Page, names: Sequence[str], least: float = 0.13) -> Rows:
        """Measure labels; many rows are low.

        Args:
            page: to be drawn on.
            names: one for each row.
            least: height of a row.

        Returns:
            the rows.
        """
        height = max(least, min(0.24, 2.4 / len(names)))
        size = min(SIZE, 0.7 * 72 * height)
        widest = max(page.width(name, size) for name in names)
        return cls(names, MARGIN + widest + GAP, height, size)

    def bottom(self, y: float) -> float:
        """Return where rows end that begin at `y`.

        Args:
            y: top of the first row.

        Returns:
            the bottom of the last.
        """
        return y + self.height * len(self.labels)

    def middles(self, y: float) -> Iterator[float]:
        """Iterate over the middles of rows that begin at `y`.

        Args:
            y: top of the first row.

        Returns:
            a height for each row.
        """
        return (y + self.height * (row + 0.5) for row in range(len(self.labels)))

    def write(self, page: Page, y: float) -> None:
        """Write the labels.

        Args:
            page: to be drawn on.
            y: top of the first row.
        """
        for label, at in zip(self.labels, self.middles(y), strict=True):
            page.text(MARGIN, at, label, size=self.size)

    def room(self, page: Page, cells: Sequence[str], heading: str) -> float:
        """Return how wide a column is, with a gap.

        Args:
            page: to be drawn on.
            cells: one for each row.
            heading: over them.

        Returns:
            the width.
        """
        widths = [page.width(cell, self.size) for cell in cells]
        return max(*widths, page.width(heading, SMALL)) + GAP

    def column(
        self, page: Page, y: float, right: float, cells: Sequence[str], heading: str
    ) -> None:
        """Write a column of cells, flush right.

        Args:
            page: to be drawn on.
            y: top of the first row.
            right: end of the cells.
            cells: one for each row.
            heading: over them.
        """
        for cell, at in zip(cells, self.middles(y), strict=True):
            page.text(right, at, cell, size=self.size, align="right")
        page.text(right, y - LINE / 2, heading, size=SMALL, align="right", color=GREY)


def labels(names: Sequence[str], limit: int = LONGEST_LABEL) -> list[str]:
    """Shorten names so that no two models get the same label.

    Folders above the last are left out where the others tell the models apart, and the
    middle of what is still too long.

    Args:
        names: paths or hub names, perhaps with an adapter after a plus sign.
        limit: characters of a label.

    Returns:
        a label for each name; numbers tell apart what cannot be otherwise.

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
    values: Sequence[float | None], errors: Sequence[float | None], digits: int
) -> list[str]:
    """Write shares as percentages of as many digits.

    Args:
        values: shares; None is a dash.
        errors: their standard errors; None or 0 where they are exact.
        digits: after the point; more where the smallest error has more.

    Returns:
        a text for each value.
    """
    known = [error for error in errors if error]
    if known:
        digits = min(max(digits, -math.floor(math.log10(100 * min(known)))), 3)
    least = 10.0**-digits
    cells = []
    for value, error in zip(values, errors, strict=True):
        if value is None:
            cells.append("-")
            continue
        if error:
            cells.append(f"{100 * value:.{digits}f} ± {100 * error:.{digits}f}%")
        elif 0 < 100 * value < least / 2:
            cells.append(f"< {least:.{digits}f}%")
        else:
            cells.append(f"{100 * value:.{digits}f}%")
    return cells


def fitting(page: Page, names: Sequence[str], room: float = 3.2) -> list[str]:
    """Shorten names to labels that leave enough of a page.

    Args:
        page: to be drawn on.
        names: as in `labels`.
        room: for the labels, in inches.

    Returns:
        a label for each name.
    """
    for limit in range(LONGEST_LABEL, 12, -4):
        found = labels(names, limit)
        if max(page.width(label) for label in found) <= room:
            break
    return found


def _tail(name: str, parts: int) -> str:
    """The last parts of a path; hub names keep their owner."""
    hub = re.fullmatch(r"[^./~\\][^/]*/[^/]+", name)
    return "/".join(name.rstrip("/").split("/")[-max(parts, 2 if hub else 1) :])


def _shortened(label: str, head: int, tail: int) -> str:
    if len(label) <= head + tail + 3:
        return label
    return f"{label[:head]}...{label[len(label) - tail :]}"
