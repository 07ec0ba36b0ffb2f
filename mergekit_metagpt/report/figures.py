"""Draws a report for readers who have not heard of MetaGPT; computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.method.advice import ORTHOGONAL, SLIGHT
from mergekit_metagpt.report import layer_panel, tables
from mergekit_metagpt.report.drawing import (
    BLUE,
    GAP,
    GREY,
    INK,
    LINE,
    MARGIN,
    MINUS,
    RIGHT,
    Page,
    Rows,
    fitting,
    percents,
)

if TYPE_CHECKING:
    from mergekit_metagpt.report import schema

# Models up to which each cell of cosines has room for its number.
MOST_NUMBERS = 16
FIGURE_SPACE = "\N{FIGURE SPACE}"
LONGEST_WEIGHT = 14
TRACK = "#e9edf4"


def report_figure(found: schema.Report, file: Path) -> None:
    """Draw each model's share of the merge, and how far each of its layers moved.

    Every panel has a row for each model. Granularity `layer` adds a panel with the
    shares of each layer, and three or more models one with their cosines, if one is
    beyond `SLIGHT`; otherwise a sentence gives them. Error bars are one standard error.

    Args:
        found: the report of `inspect`.
        file: the picture to write, with an ending of `drawing.FORMATS`.
    """
    page, y = Page(), MARGIN
    for family in found.families:
        y = _draw_family(page, y, family, found.method) + GAP
    page.save(file, y)


def _draw_family(page: Page, y: float, family: schema.Family, method: str) -> float:
    names = fitting(page, [model.name for model in family.models])
    drawn = _has_angles(family)
    if drawn:
        digits = len(str(len(names)))
        names = [
            # A figure space is as wide as a digit.
            f"{str(number).rjust(digits, FIGURE_SPACE)}  {name}"
            for number, name in enumerate(names, 1)
        ]
    rows = Rows.of(page, names)
    base = fitting(page, [family.base.name], 4.5)[0]
    count, plural = len(names), "" if len(names) == 1 else "s"
    title = f"Merge of {count} model{plural} fine-tuned from {base}"
    if not family.base.parameters:  # only the adapters were opened
        title = f"Merge of {count} adapter{plural} of one base"
    y = page.heading(y, title, 11) + GAP / 2
    y = _draw_shares(y, rows, family, method) + GAP
    shares = [pool.coefficients for pool in family.pools if pool.coefficients]
    if family.settings.granularity == "layer" and len(shares) == len(family.pools):
        y = layer_panel.draw(y, rows, family, shares)
    y = layer_panel.draw(y, rows, family, None)
    if drawn and family.cosines:
        y = _draw_cosines(y, rows, family.cosines) + GAP
    for note in _notes(family, drawn=drawn):
        y = page.paragraph(y, note)
    return y


def _draw_shares(y: float, rows: Rows, family: schema.Family, method: str) -> float:
    page, models = rows.page, family.models
    ours = method.startswith("metagpt")
    title = "Share of the merge" if ours else "Share of the merge by MetaGPT's weights"
    y = page.heading(y, title)
    y = page.paragraph(y, f"{_rule(family)} Larger does not mean better.")
    y += LINE / 4
    low = [model.coefficient_range[0] for model in models]
    high = [model.coefficient_range[1] for model in models]
    errors = [model.coefficient_se for model in models]
    cells, heading = percents(high, errors, 1, most=3), ""
    if low != high:
        lows = percents(low, errors, 1, most=3)
        cells = [f"{a} to {b}" for a, b in zip(lows, cells, strict=True)]
        heading = "lowest to highest"
    columns = [(cells, heading)]
    by_hand = [model.weight_by_hand for model in models]
    if weights := family.weights:
        columns.append(([_gradient(weight) for weight in weights], "weight"))
    elif any(by_hand):
        weights = [_gradient(weight or "-") for weight in by_hand]
        columns.append((weights, "weight in the YAML"))
    right = RIGHT
    if any(heading for _, heading in columns):
        y += LINE
    for cells, heading in reversed(columns):
        right = rows.column(y, right, cells, heading)
    rows.write(y)
    unit = right - rows.left  # all of the merge
    thick = 0.62 * rows.height
    for a, b, error, at in zip(low, high, errors, rows.middles(y), strict=True):
        start = 0.0 if a == b else a
        x, end = rows.left + unit * start, rows.left + unit * b
        page.box(rows.left, at - thick / 2, unit, thick, TRACK)
        page.box(x, at - thick / 2, max(end - x, 0.01), thick, BLUE)
        if error:
            ends = [max(b - error, 0.0), min(b + error, 1.0)]
            page.line([rows.left + unit * e for e in ends], [at, at], color=INK)
    bottom = rows.bottom(y)
    page.line([rows.left, rows.left], [y, bottom])
    equal = 1 / len(models) if len(models) > 1 and family.settings.power else None
    if equal is not None:
        x = rows.left + unit * equal
        page.line([x, x], [y, bottom], color=INK, style=":")
    return _draw_axis(page, bottom, rows.left, right, equal)


def _draw_axis(
    page: Page, y: float, left: float, right: float, equal: float | None
) -> float:
    """Label the ends of the bars' axis, and the line of equal shares."""
    at, size = y + 0.1, 7.5
    page.text(left, at, "0%", size=size, color=GREY)
    page.text(right, at, "100%", size=size, align="right", color=GREY)
    if equal is not None:
        words = f"equal shares: {percents([equal], [None], 1)[0]}"
        wide = page.width(words, size)
        least = left + page.width("0%", size) + GAP
        most = right - page.width("100%", size) - GAP - wide
        x = left + (right - left) * equal - wide / 2
        if least <= most:
            page.text(min(max(x, least), most), at, words, size=size)
    return y + LINE


def _gradient(weight: str) -> str:
    """Cut a long gradient to the width of a column."""
    return weight if len(weight) <= LONGEST_WEIGHT else f"{weight[:9]}..."


def _rule(family: schema.Family) -> str:
    """Say in words by which rule the shares were set."""
    granularity, power = family.settings.granularity, family.settings.power
    by = "" if granularity == "model" else f", {granularity} by {granularity}"
    times = ", times its weight" if family.weights else ""
    if power == 0:
        return f"The same for all models{times}{by}."
    distance = (
        "squared distance from the base" if power == 2 else "distance from the base"
    )
    exponent = "" if power in (1, 2) else f" to the power of {power:g}"
    return (
        f"Each model's {distance}{exponent}{times}, divided by the sum of all{by} "
        "(MetaGPT)."
    )


def _angles(family: schema.Family) -> list[float]:
    """Cosines between different models."""
    return [
        value
        for row, line in enumerate(family.cosines or ())
        for value in line[:row]
        if value is not None
    ]


def _cosine(value: float) -> str:
    """Two decimals, without a sign where they are zero."""
    text = f"{value:.2f}"
    return "0" if float(text) == 0 else text.replace("-", MINUS)


def _has_angles(family: schema.Family) -> bool:
    """Whether the cosines are worth a picture."""
    return len(family.models) > 2 and any(
        abs(value) > SLIGHT for value in _angles(family)
    )


def _draw_cosines(
    y: float, rows: Rows, cosines: Sequence[Sequence[float | None]]
) -> float:
    page = rows.page
    title = "Do the models change the base in the same direction?"
    y = page.heading(y, title)
    words = f"Cosine: 1 the same direction, 0 unrelated, {MINUS}1 the opposite."
    y = page.paragraph(y, words) + LINE / 4
    rows.write(y)
    count = len(cosines)
    cell = min(0.4, (RIGHT - rows.left) / count)
    shades = [
        [
            math.nan if value is None or column >= row else (1 + value) / 2
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(cosines)
    ]
    xs = [rows.left + cell * column for column in range(count + 1)]
    ys = [y + rows.height * row for row in range(count + 1)]
    page.cells(xs, ys, shades, colors="RdBu", lined=True)
    size = min(rows.size, 8.0)
    for row, middle in enumerate(rows.middles(y)):
        for column in range(row if count <= MOST_NUMBERS else 0):
            if (value := cosines[row][column]) is not None:
                page.text(
                    xs[column] + cell / 2,
                    middle,
                    _cosine(value).replace("0.", "."),
                    size=size,
                    align="center",
                    color="white" if abs(value) > 0.6 else INK,
                )
    bottom = rows.bottom(y)
    step = math.ceil((page.width(str(count), size) + 0.06) / cell)
    for column in range(0, count - 1, step):
        page.text(
            xs[column] + cell / 2,
            bottom + 0.08,
            str(column + 1),
            size=size,
            align="center",
        )
    return bottom + LINE


def _notes(family: schema.Family, *, drawn: bool) -> Iterator[str]:
    settings, angles = family.settings, _angles(family)
    if angles and not drawn:
        low, high = (_cosine(value) for value in (min(angles), max(angles)))
        value = max(angles, key=abs)
        if abs(value) <= ORTHOGONAL:
            way = "nearly unrelated"
        elif abs(value) <= SLIGHT:
            way = f"only slightly {'opposite' if value < 0 else 'similar'}"
        else:
            way = f"partly {'opposite' if value < 0 else 'the same'}"
        yield (
            f"The models changed the base in {way} directions: cosine {low}"
            + ("" if low == high else f" to {high}")
            + f" on a scale of {MINUS}1 to 1."
        )
    if settings.scale != 1:
        scale = f"multiplied by {tables.scale_of(settings)} (lambda)"
        if settings.keeps_length:
            keep = tables.keep_of(family)
            scale = f"scaled to the models' mean length (lambda: keep, {keep})"
        yield f"The merged change is then {scale}."
    if settings.exclude:
        yield f"Not counted in the distance: {', '.join(settings.exclude)}."
    if settings.varying:
        yield f"Set tensor by tensor: {', '.join(settings.varying)}."
    if sample := family.sample:
        yield (
            f"Estimated from {sample.share:.2g} of each large tensor; ± is one "
            "standard error."
        )
