"""Draws a cell for each model and layer: its share, or how far it moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

from mergekit_metagpt.report.drawing import (
    FAINT,
    GAP,
    GREY,
    LINE,
    MARGIN,
    RIGHT,
    SMALL,
    Page,
    Rows,
    labels,
    percents,
)

if TYPE_CHECKING:
    from mergekit_metagpt.report import schema

# Width of the cell of a tensor that is in no layer.
ALONE = 0.14
PAD = 0.06  # from a name to the edge of its cell
LIGHTEST = 0.22  # blue enough to tell the smallest change from none


def draw(
    y: float,
    rows: Rows,
    family: schema.Family,
    shares: Sequence[Sequence[float]] | None,
) -> float:
    """Shade a cell for each model and layer, with a scale above and names below.

    Args:
        y: top of the panel.
        rows: a row for each model.
        family: of a report.
        shares: by pool and model; None draws how far each layer moved.

    Returns:
        the bottom of the panel; `y` if there is nothing to show.
    """
    page, pools = rows.page, family.layers if shares is None else family.pools
    if shares is None:
        title = "How far each layer moved, relative to the base"
        values: Sequence[Sequence[float | None]] = [p.relative_norms for p in pools]
        nothing, of_what = "did not move", " of its size in the base"
    else:
        title, values = "Share of the merge, layer by layer", shares
        nothing, of_what = "none", ""
    if all(value is None for row in values for value in row):
        return y
    y = page.heading(y, title)
    positive = [value for row in values for value in row if value]
    low, high = (min(positive), max(positive)) if positive else (0.0, 1.0)
    # A final norm that hardly moved is no reason to leave the linear scale.
    wide = shares is None and bool(positive) and high > 30 * median(positive)
    low = max(low, high / 1000) if wide else 0.0

    def shade(value: float | None) -> float:
        if not value:
            return math.nan
        if not wide:
            return value / high
        return max(0.0, math.log(value / low) / math.log(high / low))

    most = f"{_percent(high)}{of_what}{' (log scale)' if wide else ''}"
    end = _draw_scale(page, y, _percent(low), most, values, nothing)
    y += 1.25 * LINE
    whole = [model.relative_norm for model in family.models]
    known = [value for value in whole if value]
    digits = 1 - math.floor(math.log10(100 * min(known))) if known else 1
    errors = [model.relative_norm_se for model in family.models]
    cells = percents(whole, errors, min(max(digits, 1), 3), most=3)
    right = RIGHT
    if end > right - page.width("whole model", SMALL):
        y += 0.75 * LINE
    if shares is None:
        rows.column(y, right, cells, "whole model")
    right -= rows.room(cells, "whole model")
    rows.write(y)
    xs = _edges([pool.key for pool in pools], rows.left, right)
    bottom = rows.bottom(y)
    ys = [y + rows.height * row for row in range(len(rows.labels) + 1)]
    table = list(zip(*values, strict=True))
    for row, own in enumerate(table):
        for column, value in enumerate(own):
            if not value:
                wide_cell = xs[column + 1] - xs[column]
                _draw_unshaded(page, xs[column], ys[row], wide_cell, rows.height, value)
    shades = [[shade(value) for value in row] for row in table]
    page.cells(xs, ys, shades, lightest=LIGHTEST, lined=xs[-1] - xs[-2] > 0.06)
    page.box(rows.left, y, right - rows.left, bottom - y, "none", GREY)
    return _draw_keys(page, bottom, xs, [pool.key for pool in pools]) + GAP


def _draw_unshaded(
    page: Page, x: float, y: float, width: float, height: float, value: float | None
) -> None:
    """Hatch a cell whose value is 0, and fill one whose value is unknown."""
    if value is None:
        page.box(x, y, width, height, FAINT, "white")
    else:
        page.box(x, y, width, height, "white", FAINT, hatched=True)


def _draw_scale(
    page: Page,
    y: float,
    least: str,
    most: str,
    values: Sequence[Sequence[float | None]],
    nothing: str,
) -> float:
    """Explain the shades in a line, and return its right end."""
    at, tall = y + LINE / 2, 0.1
    x = MARGIN

    def word(words: str) -> None:
        nonlocal x
        page.text(x, at, words, size=SMALL, color=GREY)
        x += page.width(words, SMALL) + 0.06

    def patch(value: float | None) -> None:
        nonlocal x
        x += 0.12
        _draw_unshaded(page, x, at - tall / 2, 0.2, tall, value)
        x += 0.26

    word(least)
    steps, long = 24, 1.1
    page.cells(
        [x + long * step / steps for step in range(steps + 1)],
        [at - tall / 2, at + tall / 2],
        [[step / (steps - 1) for step in range(steps)]],
        lightest=LIGHTEST,
    )
    x += long + 0.06
    word(most)
    if any(value == 0 for row in values for value in row):
        patch(0.0)
        word(nothing)
    if any(value is None for row in values for value in row):
        patch(None)
        word("not comparable")
    return x


def _percent(value: float) -> str:
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:,.0f}%"


def _prefix(key: str) -> str:
    """The key of a layer without its number; empty for a tensor in no layer."""
    prefix, _, number = key.rpartition(".")
    return prefix if number.isdecimal() else ""


def _edges(keys: Sequence[str], left: float, right: float) -> list[float]:
    """Edges of the cells; those of tensors in no layer stay wide enough to be seen."""
    room, alone = right - left, sum(not _prefix(key) for key in keys)
    unit = (room - alone * ALONE) / max(1, len(keys) - alone)
    wide = ALONE
    if alone == len(keys) or unit > ALONE or unit < 0.03:
        unit = wide = room / len(keys)
    xs = [left]
    for key in keys:
        xs.append(xs[-1] + (unit if _prefix(key) else wide))
    return xs


def _draw_keys(page: Page, y: float, xs: Sequence[float], keys: Sequence[str]) -> float:
    """Number the layers below their cells, and name what the cells stand for."""
    size, last, at = 7.5, 0.0, 0
    towers = {_prefix(key) for key in keys} - {""}
    prefixes = dict(zip(sorted(towers), _towers(sorted(towers)), strict=True))
    names: list[tuple[float, str]] = []
    for prefix, group in groupby(keys, _prefix):
        run = list(group)
        edges = xs[at : at + len(run) + 1]
        at += len(run)
        shown = [prefixes[prefix]] if prefix else _alone(run)
        cuts = edges[:: len(run) // len(shown)]
        for left, right, name in zip(cuts, cuts[1:], shown, strict=False):
            page.line([left + 0.02, right - 0.02], [y + 0.2] * 2, color=FAINT)
            wide = page.width(name, SMALL)
            x = (left + right - wide) / 2
            if shown[1:]:  # two stand beside each other, even if cells are narrow
                first = name == shown[0]
                x = min(x, right - PAD - wide) if first else max(x, left + PAD)
            names.append((x, name))
        if not prefix:
            continue
        cell = edges[1] - edges[0]
        steps = (n for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100) if n * cell >= 0.26)
        step = next(steps, 1000)
        for left, key in zip(edges, run, strict=False):
            number = key.rpartition(".")[2]
            middle, half = left + cell / 2, page.width(number, size) / 2
            if int(number) % step == 0 and middle - half > last:
                page.text(middle, y + 0.1, number, size=size, align="center")
                last = middle + half + 0.04
    # Names stand on one line if they fit beside each other, else on several.
    ends: list[float] = []
    for x, name in names:
        wide = page.width(name, SMALL)
        x = min(max(x, MARGIN), RIGHT - wide)
        line = next((n for n, end in enumerate(ends) if end < x), len(ends))
        ends[line : line + 1] = [x + wide + 0.1]
        page.text(x, y + 0.3 + 0.16 * line, name, size=SMALL, color=GREY)
    return y + 0.24 + 0.16 * len(ends)


def _towers(prefixes: Sequence[str]) -> list[str]:
    return labels(prefixes, 30) if len(prefixes) > 1 else ["layers"] * len(prefixes)


def _alone(keys: Sequence[str]) -> list[str]:
    """Name one or two tensors that are in no layer; count more than that."""
    if len(keys) > 2:
        return [f"{len(keys)} other tensors"]
    return labels([key.removesuffix(".weight").rpartition(".")[2] for key in keys], 24)
