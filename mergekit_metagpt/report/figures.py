"""Draws what was measured, for readers who know nothing of it; computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mergekit_metagpt.method.advice import ORTHOGONAL
from mergekit_metagpt.report import tables
from mergekit_metagpt.report.drawing import (
    BLUE,
    FAINT,
    GAP,
    GREY,
    INK,
    LINE,
    MARGIN,
    SIZE,
    SMALL,
    WIDTH,
    Page,
    Rows,
    fitting,
    labels,
)

if TYPE_CHECKING:
    from mergekit_metagpt.report import schema
    from mergekit_metagpt.report.comparison import Comparison

# A number in each cell of cosines has room up to so many models.
MOST_NUMBERS = 16
# Width of a cell that stands for one tensor beside layers.
ALONE = 0.14
FIGURE_SPACE, MINUS = "\N{FIGURE SPACE}", "\N{MINUS SIGN}"
LIGHTEST = 0.22  # the smallest change is blue enough to tell from none
TEXTS_BESIDE, LONGEST_NAME, LONGEST_TITLE = 5, 26, 20
LONGEST_WEIGHT = 14


def report_figure(found: schema.Report, file: Path) -> None:
    """Draw each model's share of the merge, and how far each of its layers moved.

    Rows are models, in all panels alike. Under granularity `layer` a panel shows the
    shares layer by layer. Cosines get a panel if some are beyond `ORTHOGONAL`, else a
    line. Estimates have one standard error.

    Args:
        found: the report of `inspect`.
        file: the picture to write; its ending, one of `drawing.FORMATS`, chooses the
            format.
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
    count = "1 model" if len(names) == 1 else f"{len(names)} models"
    title = f"Merge of {count} fine-tuned from {base}"
    y = page.paragraph(y, title, size=11, color=INK, bold=True) + GAP / 2
    y = _draw_shares(page, y, rows, family, method) + GAP
    if family.settings.granularity == "layer":
        y = _draw_layers(
            page, y, rows, family, [pool.coefficients for pool in family.pools]
        )
    y = _draw_layers(page, y, rows, family, None)
    if drawn and family.cosines:
        y = _draw_cosines(page, y, rows, family.cosines) + GAP
    for note in _notes(family, drawn=drawn):
        y = page.paragraph(y, note)
    return y


def _percents(
    values: Sequence[float | None], errors: Sequence[float | None], digits: int
) -> list[str]:
    """Percentages of as many digits, or as many as the smallest error has."""
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


def _draw_shares(
    page: Page, y: float, rows: Rows, family: schema.Family, method: str
) -> float:
    models, settings = family.models, family.settings
    ours = method.startswith("metagpt")
    title = "Share of the merge" if ours else "Share of the merge by MetaGPT's weights"
    y = page.paragraph(y, title, size=SIZE, color=INK, bold=True)
    y = page.paragraph(y, _rule(family)) + LINE / 4
    low = [model.coefficient_range[0] for model in models]
    high = [model.coefficient_range[1] for model in models]
    errors = [model.coefficient_se for model in models]
    cells, heading = _percents(high, errors, 1), ""
    if low != high:
        lows = _percents(low, errors, 1)
        cells = [f"{a} to {b}" for a, b in zip(lows, cells, strict=True)]
        heading = "lowest to highest"
    columns = [(cells, heading)]
    by_hand = [model.weight_by_hand for model in models]
    if any(by_hand):
        weights = [_gradient(weight or "-") for weight in by_hand]
        columns.append((weights, "weight in the YAML"))
    elif any(model.weight != 1 for model in models):
        weights = [f"{model.weight:g}" for model in models]
        columns.append((weights, "weight set by hand"))
    right = WIDTH - MARGIN
    if any(heading for _, heading in columns):
        y += LINE
    for cells, heading in reversed(columns):
        rows.column(page, y, right, cells, heading)
        right -= rows.room(page, cells, heading)
    rows.write(page, y)
    most = max(h + (e or 0.0) for h, e in zip(high, errors, strict=True))
    unit = (right - rows.left) / (most or 1.0)
    thick = 0.62 * rows.height
    for a, b, error, at in zip(low, high, errors, rows.middles(y), strict=True):
        start = 0.0 if a == b else a
        x, end = rows.left + unit * start, rows.left + unit * b
        page.box(x, at - thick / 2, max(end - x, 0.01), thick, BLUE)
        if error:
            page.line([end - unit * error, end + unit * error], [at, at], color=INK)
    bottom = rows.bottom(y)
    page.line([rows.left, rows.left], [y, bottom])
    if len(models) > 1 and settings.power and 1 / len(models) < most:
        x = rows.left + unit / len(models)
        page.line([x, x], [y, bottom], color=INK, style=":")
    return bottom


def _gradient(weight: str) -> str:
    """As much of a long gradient as a column has room for."""
    return weight if len(weight) <= LONGEST_WEIGHT else f"{weight[:9]}..."


def _rule(family: schema.Family) -> str:
    """Say in words by which rule the shares were set."""
    settings = family.settings
    of_what = "" if settings.granularity == "model" else f", {settings.granularity} by "
    by = f"{of_what}{settings.granularity}" if of_what else ""
    weighted = any(model.weight != 1 for model in family.models)
    times = ", times its weight" if weighted else ""
    if settings.power == 0:
        return f"The same for all models{times}{by}."
    powers = {2.0: "squared distance", 1.0: "distance"}
    distance = powers.get(
        settings.power, f"distance to the power of {settings.power:g}"
    )
    equal = " Dotted: equal shares." if len(family.models) > 1 else ""
    return (
        f"Each model's {distance} from the base{times}, divided by the sum of all{by}"
        f" (MetaGPT).{equal}"
    )


def _draw_layers(
    page: Page,
    y: float,
    rows: Rows,
    family: schema.Family,
    shares: Sequence[Sequence[float]] | None,
) -> float:
    """Shade a cell for each model and layer: its share, or how far it moved."""
    pools = family.layers if shares is None else family.pools
    if not pools:
        return y
    if shares is None:
        title = "How far each layer moved, relative to the base"
        values: Sequence[Sequence[float | None]] = [p.relative_norms for p in pools]
        nothing, of_what = "did not move", " of its size in the base"
    else:
        title, values = "Share of the merge, layer by layer", shares
        nothing, of_what = "none", ""
    y = page.paragraph(y, title, size=SIZE, color=INK, bold=True)
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

    end = _draw_scale(page, y, low, high, values, nothing, of_what, wide=wide)
    y += 1.25 * LINE
    whole = [model.relative_norm for model in family.models]
    known = [value for value in whole if value]
    digits = 1 - math.floor(math.log10(100 * min(known))) if known else 1
    errors = [model.relative_norm_se for model in family.models]
    cells = _percents(whole, errors, min(max(digits, 1), 3))
    right = WIDTH - MARGIN
    if end > right - page.width("whole model", SMALL):
        y += 0.75 * LINE
    if shares is None:
        rows.column(page, y, right, cells, "whole model")
    right -= rows.room(page, cells, "whole model")
    rows.write(page, y)
    xs = _edges([pool.key for pool in pools], rows.left, right)
    bottom = rows.bottom(y)
    ys = [y + rows.height * row for row in range(len(rows.labels) + 1)]
    table = list(zip(*values, strict=True))
    for row, own in enumerate(table):
        for column, value in enumerate(own):
            if value is None:
                page.box(
                    xs[column], ys[row], xs[column + 1] - xs[column], rows.height, FAINT
                )
    shades = [[shade(value) for value in row] for row in table]
    page.cells(xs, ys, shades, lightest=LIGHTEST, lined=xs[-1] - xs[-2] > 0.06)
    page.box(rows.left, y, right - rows.left, bottom - y, "none", FAINT)
    return _draw_keys(page, bottom, xs, [pool.key for pool in pools]) + GAP


def _draw_scale(
    page: Page,
    y: float,
    low: float,
    high: float,
    values: Sequence[Sequence[float | None]],
    nothing: str,
    of_what: str,
    *,
    wide: bool,
) -> float:
    """Explain the shades in a line, and return its right end."""
    at, tall = y + LINE / 2, 0.1
    x = MARGIN

    def word(words: str) -> None:
        nonlocal x
        page.text(x, at, words, size=SMALL, color=GREY)
        x += page.width(words, SMALL) + 0.06

    def patch(color: str) -> None:
        nonlocal x
        x += 0.12
        page.box(x, at - tall / 2, 0.2, tall, color, FAINT)
        x += 0.26

    word(_percent(low))
    steps, long = 24, 1.1
    page.cells(
        [x + long * step / steps for step in range(steps + 1)],
        [at - tall / 2, at + tall / 2],
        [[step / (steps - 1) for step in range(steps)]],
        lightest=LIGHTEST,
    )
    x += long + 0.06
    word(f"{_percent(high)}{of_what}{' (log scale)' if wide else ''}")
    if any(value == 0 for row in values for value in row):
        patch("white")
        word(nothing)
    if any(value is None for row in values for value in row):
        patch(FAINT)
        word("not comparable")
    return x


def _percent(value: float) -> str:
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:,.0f}%"


def _prefix(key: str) -> str:
    """What a layer's key has before its number; nothing for a tensor of its own."""
    prefix, _, number = key.rpartition(".")
    return prefix if number.isdecimal() else ""


def _edges(keys: Sequence[str], left: float, right: float) -> list[float]:
    """Edges of the cells: tensors of their own are wide enough to be seen."""
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
    names: list[tuple[float, float, str]] = []
    for prefix, group in groupby(keys, _prefix):
        run = list(group)
        edges = xs[at : at + len(run) + 1]
        at += len(run)
        page.line([edges[0] + 0.02, edges[-1] - 0.02], [y + 0.2] * 2, color=FAINT)
        names.append((edges[0], edges[-1], prefixes.get(prefix) or _alone(run)))
        if not prefix:
            continue
        step = next(
            n
            for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000)
            if n * (edges[1] - edges[0]) >= 0.26 or n == 1000
        )
        for left, key in zip(edges, run, strict=False):
            number = key.rpartition(".")[2]
            middle, half = left + (edges[1] - edges[0]) / 2, page.width(number, size)
            if int(number) % step == 0 and middle - half / 2 > last:
                page.text(middle, y + 0.1, number, size=size, align="center")
                last = middle + half / 2 + 0.04
    # One line where the names have room beside each other, else as many as it takes.
    ends: list[float] = []
    for left, right, name in names:
        wide = page.width(name, SMALL)
        x = min(max((left + right - wide) / 2, MARGIN), WIDTH - MARGIN - wide)
        line = next((n for n, end in enumerate(ends) if end < x), len(ends))
        ends[line : line + 1] = [x + wide + 0.1]
        page.text(x, y + 0.3 + 0.16 * line, name, size=SMALL, color=GREY)
    return y + 0.24 + 0.16 * len(ends)


def _towers(prefixes: Sequence[str]) -> list[str]:
    return labels(prefixes, 30) if len(prefixes) > 1 else ["layers"] * len(prefixes)


def _alone(keys: Sequence[str]) -> str:
    """Name tensors that are in no layer, or count them."""
    if len(keys) > 2:
        return f"{len(keys)} other tensors"
    names = [key.removesuffix(".weight").rpartition(".")[2] for key in keys]
    return ", ".join(labels(names, 24))


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
        abs(value) > ORTHOGONAL for value in _angles(family)
    )


def _draw_cosines(
    page: Page, y: float, rows: Rows, cosines: Sequence[Sequence[float | None]]
) -> float:
    title = "Do the models change the base in the same direction?"
    y = page.paragraph(y, title, size=SIZE, color=INK, bold=True)
    words = f"Cosine: 1 the same direction, 0 unrelated, {MINUS}1 the opposite."
    y = page.paragraph(y, words) + LINE / 4
    rows.write(page, y)
    count = len(cosines)
    cell = min(0.4, (WIDTH - MARGIN - rows.left) / count)
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
        way = "opposite" if value < 0 else "the same"
        way = "nearly unrelated" if abs(value) <= ORTHOGONAL else f"partly {way}"
        yield (
            f"The models changed the base in {way} directions: cosine {low}"
            + ("" if low == high else f" to {high}")
            + f" on a scale of {MINUS}1 to 1."
        )
    if settings.scale != 1:
        scale = tables.scale_of(settings)
        if settings.keeps_length:
            scale = f"{tables.keep_of(family)}, which keeps the models' mean length"
        yield f"The merged change is then multiplied by {scale} (lambda)."
    if settings.exclude:
        yield f"Not counted in the distance: {', '.join(settings.exclude)}."
    if settings.varying:
        yield f"Set tensor by tensor: {', '.join(settings.varying)}."
    if sample := family.sample:
        yield (
            f"Estimated from {sample.share:.2g} of each large tensor; ± is one "
            "standard error."
        )


def comparison_figure(found: Comparison, file: Path) -> None:
    """Draw the average loss difference of every candidate, and its loss on each text.

    Error bars are two standard errors of the difference from the best candidate, which
    are paired; a hollow mark is no difference beyond noise. Base and specialists stand
    below the candidates.

    Args:
        found: the comparison.
        file: the picture to write; its ending, one of `drawing.FORMATS`, chooses the
            format.
    """
    page = Page()
    title = "Which weights are best on these texts?"
    y = page.paragraph(MARGIN, title, size=11, color=INK, bold=True)
    y = page.paragraph(y, found.verdict, color=INK) + GAP
    everyone = [row.name for row in (*found.candidates, *found.models)]
    names = labels(everyone, LONGEST_NAME)
    base = len(found.candidates)
    if names[base] != "base":
        names[base] += " (base)"
    rows = Rows.of(page, names, least=0.19)
    y = _draw_differences(page, y, rows, found) + GAP
    title = f"Loss on each text, nats per {found.unit} (left is better)"
    y = page.paragraph(y, title, size=SIZE, color=INK, bold=True)
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
    room = WIDTH - MARGIN - rows.left + GAP
    beside = max(1, min(TEXTS_BESIDE, int(room / max(widest + GAP, 0.8))))
    for first in range(0, len(titles), beside):
        numbers = range(len(titles))[first : first + beside]
        y = _draw_losses(page, y, rows, found, titles, numbers) + GAP
    page.save(file, y)


def _draw_differences(page: Page, y: float, rows: Rows, found: Comparison) -> float:
    title = f"Average loss difference (ALD), nats per {found.unit} (left is better)"
    y = page.paragraph(y, title, size=SIZE, color=INK, bold=True)
    words = (
        "How much higher a merge's loss is than that of the specialist for each text, "
        "on average. Bars: two standard errors of the difference from the best; "
        "hollow: no difference beyond noise."
    )
    y = page.paragraph(y, words) + LINE
    best = found.candidates[0]
    everyone = [*found.candidates, *found.models]
    gaps = [
        ""
        if row.above_best is None or row.above_best_error is None
        else "best"
        if row is best
        else f"+{row.above_best:.4f} ± {row.above_best_error:.4f}"
        for row in everyone
    ]
    right = WIDTH - MARGIN
    for cells, heading in (
        (gaps, "above the best"),
        ([f"{row.ald:.4f}" for row in everyone], "difference"),
    ):
        rows.column(page, y, right, cells, heading)
        right -= rows.room(page, cells, heading)
    bars = [2 * (row.above_best_error or 0.0) for row in found.candidates]
    ends = [
        row.ald + side * bar
        for row, bar in zip(found.candidates, bars, strict=True)
        for side in (-1, 1)
    ]
    axis = _Axis.over(ends, rows.left, right)
    rows.write(page, y)
    _draw_marks(page, y, rows, axis, found, [row.ald for row in everyone], bars)
    at = axis.at(best.ald)
    page.line([at, at], [y, rows.bottom(y)], color=BLUE, style=":")
    return axis.draw(page, rows.bottom(y))


@dataclass(frozen=True)
class _Axis:
    """Values from left to right."""

    low: float
    high: float
    left: float
    right: float

    @classmethod
    def over(cls, values: Sequence[float], left: float, right: float) -> _Axis:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        more = (high - low) / 20 or abs(high) / 20 or 1.0
        return cls(low - more, high + more, left, right)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)

    def draw(self, page: Page, y: float) -> float:
        """Draw the axis at the bottom, with the numbers of its ends."""
        digits = max(0, 2 - math.floor(math.log10(self.high - self.low)))
        page.line([self.left, self.right], [y, y], color=FAINT)
        for x, value, align in (
            (self.left, self.low, "left"),
            (self.right, self.high, "right"),
        ):
            number = f"{value:.{digits}f}".replace("-", MINUS)
            page.text(x, y + 0.1, number, size=7.5, align=align, color=GREY)
        return y + LINE


def _draw_marks(
    page: Page,
    y: float,
    rows: Rows,
    axis: _Axis,
    found: Comparison,
    values: Sequence[float],
    bars: Sequence[float] = (),
) -> None:
    """Mark a value in each row; what is beyond the end gets an arrow."""
    candidates = len(found.candidates)
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
    page: Page,
    y: float,
    rows: Rows,
    found: Comparison,
    titles: Sequence[str],
    numbers: range,
) -> float:
    everyone = [*found.candidates, *found.models]
    wide = (WIDTH - MARGIN - rows.left + GAP) / len(numbers)
    y += LINE
    rows.write(page, y)
    for place, k in enumerate(numbers):
        text = found.texts[k]
        losses = [
            row.losses[k].per_token if found.unit == "token" else row.losses[k].per_byte
            for row in everyone
        ]
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
        _draw_marks(page, y, rows, axis, found, losses)
        bottom = rows.bottom(y)
        for style, value in lines.items():
            page.line([axis.at(value)] * 2, [y, bottom], style=style)
        axis.draw(page, bottom)
    return rows.bottom(y) + LINE
