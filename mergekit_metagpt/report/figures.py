"""Draws what was measured; computes nothing of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from mergekit_metagpt.report import schema
    from mergekit_metagpt.report.comparison import Comparison

BLUE = "#4c72b0"
FORMATS = (".png", ".svg", ".pdf")
# Cosines of more models are shown by their shade alone: a number for each would not fit
# into its cell, and takes minutes to draw.
MOST_NUMBERS = 16


def report_figure(found: schema.Report, file: Path) -> None:
    """Draw the coefficient of every model, the cosines, and how far each layer moved.

    Readable at 1,200 pixels of width and without colour. Under other granularities
    than `model` the layers show coefficients instead.

    Args:
        found: the report of `inspect`.
        file: the picture to write; its ending, one of `FORMATS`, chooses the format.
    """
    from matplotlib.figure import Figure

    heights = [3.6 + 0.5 * len(family.models) for family in found.families]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    for (part,), family in zip(parts, found.families, strict=True):
        _draw_family(part, family)
    figure.savefig(file, dpi=150)


def _draw_family(part: SubFigure, family: schema.Family) -> None:
    count = len(family.models)
    grid = part.add_gridspec(
        2, 2, width_ratios=(1.6, 1), height_ratios=(1 + 0.22 * count, 1 + 0.12 * count)
    )
    _draw_coefficients(
        part.add_subplot(
            grid[0, 0] if count > 1 and family.cosines is not None else grid[0, :]
        ),
        family,
    )
    if family.cosines is not None and count > 1:
        _draw_cosines(part, part.add_subplot(grid[0, 1]), family.cosines)
    _draw_layers(part, part.add_subplot(grid[1, :]), family)
    part.suptitle(f"Task vectors on {short_name(family.base.name, 60)}")


def short_name(name: str, limit: int = 34) -> str:
    """Shorten a model's name in the middle, without the folders before the last two.

    Args:
        name: a path or hub name, perhaps with an adapter after a plus sign.
        limit: characters.

    Returns:
        the label.

    Example:
        >>> short_name("/data/models/math")
        'models/math'
        >>> short_name("a-very-long-name-of-a-model", 11)
        'a-ve...odel'
    """
    parts = ("/".join(p.rstrip("/").split("/")[-2:]) for p in name.split("+"))
    label = "+".join(parts).removeprefix("./")
    if len(label) <= limit:
        return label
    kept = limit - 3
    return f"{label[: (kept + 1) // 2]}...{label[len(label) - kept // 2 :]}"


def _numbered(family: schema.Family) -> list[str]:
    return [f"{n}  {short_name(m.name)}" for n, m in enumerate(family.models, 1)]


def _draw_coefficients(axes: Axes, family: schema.Family) -> None:
    rows = range(len(family.models))
    low = [model.coefficient_range[0] for model in family.models]
    high = [model.coefficient_range[1] for model in family.models]
    one = family.settings.granularity == "model"
    bars = axes.barh(
        rows,
        [h if one else h - b for b, h in zip(low, high, strict=True)],
        left=None if one else low,
        color=BLUE,
        edgecolor="black",
        xerr=_errors(family),
        capsize=3,
    )
    labels = [
        f"{h:.3g}" if one else f"{b:.3g} to {h:.3g}"
        for b, h in zip(low, high, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4)  # beyond an error bar
    axes.set_yticks(rows, _numbered(family))
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *low) * 1.2, max(0.05, *high) * 1.25)
    pools = "" if one else f" by {family.settings.granularity}"
    axes.set_title(rf"scaling coefficient $\lambda_t${pools}")
    axes.spines[["top", "right"]].set_visible(False)


def _errors(family: schema.Family) -> list[float] | None:
    """Standard errors of the coefficients; None where they are exact or many."""
    errors = [model.coefficient_se for model in family.models]
    return [error or 0.0 for error in errors] if any(errors) else None


def _draw_cosines(
    part: SubFigure, axes: Axes, cosines: Sequence[Sequence[float | None]]
) -> None:
    count, nan = len(cosines), float("nan")
    shown = [[nan if value is None else abs(value) for value in row] for row in cosines]
    for row in range(count):
        shown[row][row] = nan
    image = axes.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    size = 10 if count <= 6 else 8
    for row in range(count if count <= MOST_NUMBERS else 0):
        for column in range(count):
            value = cosines[row][column]
            if row != column and value is not None:
                axes.text(
                    column,
                    row,
                    _cosine(value),
                    ha="center",
                    va="center",
                    size=size,
                    color="white" if abs(value) > 0.55 else "black",
                )
    most = 24 // len(str(count))  # numbers that fit beside each other
    at = range(0, count, 1 + (count - 1) // most)
    numbers = [str(number + 1) for number in at]
    axes.set_xticks(at, numbers)
    axes.set_yticks(at, numbers)
    axes.set_title(r"cosine of $\tau_s$ and $\tau_t$")
    part.colorbar(image, ax=axes, label="|cosine|")


def _cosine(value: float) -> str:
    """Write a cosine in as little room as possible."""
    text = f"{value:.2f}".replace("0.", ".")
    return "0" if text in (".00", "-.00") else text


def _draw_layers(part: SubFigure, axes: Axes, family: schema.Family) -> None:
    from matplotlib.colors import LogNorm

    relative = family.settings.granularity == "model"
    values = [
        [
            float("nan") if value is None else value
            for layer in family.layers
            for value in [
                layer.relative_norms[k] if relative else layer.coefficients[k]
            ]
        ]
        for k in range(len(family.models))
    ]
    positive = [value for row in values for value in row if value > 0]
    wide = bool(positive) and max(positive) > 30 * min(positive)
    scale = LogNorm(min(positive), max(positive)) if wide else None
    image = axes.imshow(
        values,
        cmap="cividis",
        aspect="auto",
        interpolation="nearest",
        **({"norm": scale} if scale else {"vmin": 0}),
    )
    axes.set_yticks(
        range(len(values)), [str(number) for number in range(1, len(values) + 1)]
    )
    keys = [layer.key for layer in family.layers]
    step = max(1, len(keys) // 40)
    at = [
        n for n, key in enumerate(keys) if not _is_layer(key) or _index(key) % step == 0
    ]
    axes.set_xticks(at, [_tick(keys[n]) for n in at], rotation=90, size=8)
    what = r"$\|\tau_t\|\;/\;\|\theta_0\|$" if relative else r"$\lambda_t$"
    axes.set_title(f"{what} by layer")
    part.colorbar(image, ax=axes)


def _is_layer(key: str) -> bool:
    return key.rsplit(".", 1)[-1].isdecimal()


def _index(key: str) -> int:
    return int(key.rsplit(".", 1)[-1])


def _tick(key: str) -> str:
    """Label of a pool: a layer's number, else the end of the name."""
    if _is_layer(key):
        return key.rsplit(".", 1)[-1]
    name = key.removesuffix(".weight")
    return short_name(name.rsplit(".", 1)[-1] if "." in name else name, 16)


def comparison_figure(found: Comparison, file: Path) -> None:
    """Draw the average loss difference of every candidate, and its loss on each text.

    Error bars are standard errors; those of the differences between candidates are
    paired, and smaller.

    Args:
        found: the comparison.
        file: the picture to write; its ending, one of `FORMATS`, chooses the format.
    """
    from matplotlib.figure import Figure

    rows, count = found.candidates, len(found.texts)
    at, unit = range(len(rows)), found.unit
    height = -(-(count + 1) // 3) * (1.2 + 0.4 * len(rows))
    figure = Figure(figsize=(12, height), layout="constrained")
    shape = -(-(count + 1) // 3), min(3, count + 1)
    axes = list(figure.subplots(*shape, squeeze=False).flat)
    panels = [("ALD", [(row.ald, row.ald_error) for row in rows])]
    for k, text in enumerate(found.texts):
        losses = [row.losses[k] for row in rows]
        pairs = [
            (loss.per_token, loss.per_token_error)
            if unit == "token"
            else (loss.per_byte, loss.per_byte_error)
            for loss in losses
        ]
        panels.append((f"loss on {short_name(text.name)}", pairs))
    for panel, (title, pairs) in zip(axes, panels, strict=False):
        values, errors = zip(*pairs, strict=True)
        marks = [BLUE if row.name == found.best else "black" for row in rows]
        panel.errorbar(values, at, xerr=errors, fmt="none", ecolor="#9aa6b2", capsize=3)
        panel.scatter(values, at, c=marks, zorder=3)
        panel.set_yticks(at, [short_name(row.name, 24) for row in rows])
        panel.invert_yaxis()
        panel.set_title(title)
        panel.set_xlabel(f"nats per {unit}")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.savefig(file, dpi=150)
