"""Draws a comparison: each merge's average loss difference, and all losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_metagpt.report.comparison import Comparison, loss_in
from mergekit_metagpt.report.drawing import (
    BLUE,
    FAINT,
    GAP,
    GREY,
    INK,
    LINE,
    MARGIN,
    MINUS,
    RIGHT,
    SMALL,
    Page,
    Rows,
    labels,
)
from mergekit_metagpt.report.ranking import NOISE

TEXTS_BESIDE, LONGEST_NAME, LONGEST_TITLE = 5, 26, 20


def comparison_figure(found: Comparison, file: Path) -> None:
    """Draw the average loss difference of every candidate, and its loss on each text.

    Error bars are two paired standard errors of the difference from the best candidate;
    a hollow mark means no difference beyond noise. Base and specialists stand below the
    candidates.

    Args:
        found: the comparison.
        file: the picture to write, with an ending of `drawing.FORMATS`.
    """
    page = Page()
    title = "Which weights are best on these texts?"
    y = page.heading(MARGIN, title, 11)
    y = page.paragraph(y, found.verdict, color=INK) + GAP
    everyone = [row.name for row in (*found.candidates, *found.models)]
    names = labels(everyone, LONGEST_NAME)
    base = len(found.candidates)
    if names[base] != "base":
        names[base] += " (base)"
    rows = Rows.of(page, names, least=0.19)
    y = _draw_differences(y, rows, found) + GAP
    title = f"Loss on each text, nats per {found.unit} (left is better)"
    y = page.heading(y, title)
    words = (
        "Line: the specialist for the text. Dotted: the base. Arrow: beyond the end."
    )
    y = page.paragraph(y, words)
    titles = [
        title if text.model else f"{title} (not counted)"
        for title, text in zip(
            labels([text.name for text in found.texts], LONGEST_TITLE),
            found.texts,
            strict=True,
        )
    ]
    widest = max(page.width(title, SMALL, bold=True) for title in titles)
    room = RIGHT - rows.left + GAP
    beside = max(1, min(TEXTS_BESIDE, int(room / max(widest + GAP, 0.8))))
    for first in range(0, len(titles), beside):
        numbers = range(len(titles))[first : first + beside]
        y = _draw_losses(y, rows, found, titles, numbers) + GAP
    page.save(file, _draw_meanings(page, y, found) + GAP)


def _draw_differences(y: float, rows: Rows, found: Comparison) -> float:
    page = rows.page
    title = f"Average loss difference (ALD), nats per {found.unit} (left is better)"
    y = page.heading(y, title)
    words = (
        "How much higher a merge's loss is than that of the specialist for each text, "
        "on average. Bars: two standard errors of the ALD above the best; hollow: "
        f"{NOISE}. Arrow: beyond the end."
    )
    y = page.paragraph(y, words) + LINE
    best = found.candidates[0]
    everyone = [*found.candidates, *found.models]
    gaps = ["best", *(f"+{row.gap}" for row in found.candidates[1:])]
    gaps += [""] * len(found.models)
    right = RIGHT
    for cells, heading in (
        (gaps, "above the best"),
        ([f"{row.ald:.4f}" for row in everyone], "ALD"),
    ):
        right = rows.column(y, right, cells, heading)
    bars = [2 * row.gap.error for row in found.candidates]
    ends = [
        row.ald + side * bar
        for row, bar in zip(found.candidates, bars, strict=True)
        for side in (-1, 1)
    ]
    axis = _Axis.over(ends, rows.left, right)
    rows.write(y)
    _draw_marks(y, rows, axis, found, [row.ald for row in everyone], bars)
    at = axis.at(best.ald)
    page.line([at, at], [y, rows.bottom(y)], color=BLUE, style=":")
    return axis.draw(page, rows.bottom(y))


def _draw_meanings(page: Page, y: float, found: Comparison) -> float:
    """Say below the panels what each candidate is."""
    if any(row.meaning for row in found.candidates):
        y = page.heading(y, "The merges")
    for row in found.candidates:
        if row.meaning:
            names = " = ".join(row.names)
            y = page.paragraph(y, f"{names}: {row.meaning}")
    return y


@dataclass(frozen=True)
class _Axis:
    """An axis between two round numbers, in steps of one digit."""

    low: float
    high: float
    step: float
    left: float
    right: float

    @classmethod
    def over(cls, values: Sequence[float], left: float, right: float) -> _Axis:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        more = (high - low) / 20 or abs(high) / 20 or 1.0
        low, high = low - more, high + more
        unit = 10.0 ** math.floor(math.log10((high - low) / 3))
        step = next(unit * n for n in (1, 2, 5, 10) if (high - low) / (unit * n) <= 4)
        ends = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(*ends, step, left, right)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)

    def draw(self, page: Page, y: float) -> float:
        """Draw the axis at the bottom, with as many numbers as it has room for."""
        size, digits = 7.5, max(0, -math.floor(math.log10(self.step * 1.001)))
        count = round((self.high - self.low) / self.step)
        values = [self.low + self.step * n for n in range(count + 1)]
        numbers = [f"{value:.{digits}f}".replace("-", MINUS) for value in values]
        room = 1.5 * max(page.width(number, size) for number in numbers) + 0.08
        crowded = (self.right - self.left) / count < room
        page.line([self.left, self.right], [y, y])
        for n, (value, number) in enumerate(zip(values, numbers, strict=True)):
            x = self.at(value)
            page.line([x, x], [y, y + 0.03])
            # Numbers at the ends stay clear of the next panel's.
            align = {0: "left", count: "right"}.get(n, "center")
            if align != "center" or not crowded:
                page.text(x, y + 0.11, number, size=size, align=align, color=GREY)
        return y + LINE


def _draw_marks(
    y: float,
    rows: Rows,
    axis: _Axis,
    found: Comparison,
    values: Sequence[float],
    bars: Sequence[float] = (),
) -> None:
    """Mark a value in each row; a value beyond the axis gets an arrow at its end."""
    page, candidates = rows.page, len(found.candidates)
    for row, (value, at) in enumerate(zip(values, rows.middles(y), strict=True)):
        page.line([axis.left, axis.right], [at, at], color="#ececec")
        if bars and row < candidates and bars[row]:
            ends = [axis.at(value - bars[row]), axis.at(value + bars[row])]
            page.line(ends, [at, at], color=INK)
        shape, color, inside = "D", GREY, "white"
        if row < candidates:
            near = not found.candidates[row].beyond_noise
            shape, color = "o", BLUE if near else INK
            inside = "white" if near and row else color
        x = axis.at(value)
        if x < axis.left:
            x, shape, inside = axis.left + 0.04, "<", color
        elif not x <= axis.right:  # NaN too
            x, shape, inside = axis.right - 0.04, ">", color
        page.mark(x, at, shape, color, inside)
    between = y + rows.height * candidates
    page.line([MARGIN, axis.right], [between, between], color=FAINT)


def _draw_losses(
    y: float,
    rows: Rows,
    found: Comparison,
    titles: Sequence[str],
    numbers: range,
) -> float:
    page, everyone = rows.page, [*found.candidates, *found.models]
    wide = (RIGHT - rows.left + GAP) / len(numbers)
    y += LINE
    rows.write(y)
    for place, k in enumerate(numbers):
        text = found.texts[k]
        losses = [loss_in(row.losses[k], found.unit) for row in everyone]
        known = {row.name: loss for row, loss in zip(everyone, losses, strict=True)}
        lines = {
            style: known[name]
            for name, style in ((text.model, "-"), (found.models[0].name, ":"))
            if name is not None
        }
        ends = [*losses[: len(found.candidates)], *lines.values()]
        left = rows.left + wide * place
        axis = _Axis.over(ends, left, left + wide - GAP)
        page.text(left, y - LINE / 2, titles[k], bold=True, size=SMALL)
        _draw_marks(y, rows, axis, found, losses)
        bottom = rows.bottom(y)
        for style, value in lines.items():
            page.line([axis.at(value)] * 2, [y, bottom], style=style)
        axis.draw(page, bottom)
    return rows.bottom(y) + LINE
