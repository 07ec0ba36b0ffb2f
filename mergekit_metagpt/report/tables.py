"""Turns a report into terminal tables and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    from mergekit_metagpt.report import schema
    from mergekit_metagpt.scanning.cache import Remembered


def report(found: schema.Report) -> Iterator[str | Sheet]:
    """Lay out what `inspect` found, family by family.

    Args:
        found: the report.

    Yields:
        tables, and lines of text to be printed without wrapping.
    """
    for family in found.families:
        if len(found.families) > 1:
            yield f"Merged with each other: {', '.join(family.places)}"
        yield from _family(family)


def _family(family: schema.Family) -> Iterator[str | Sheet]:
    base, models = family.base, family.models
    yield (
        f"Base {base.name}: {base.parameters:,} parameters, {_precisions(base)}, "
        f"||theta_0|| {base.norm:.4g}"
    )
    yield f"\nTask vectors ({_settings(family.settings)})"
    yield _task_vectors(family)
    if len(models) > 1:
        yield "Cosines between task vectors"
        yield _cosines(family)
        yield f"{family.reading}\n"
    yield "Share of each part in ||tau||^2"
    yield _parts(family)
    if family.settings.granularity != "model":
        of_what = family.settings.granularity
        yield f"lambda by {of_what}, and in brackets ||tau|| / ||theta_0||"
        yield _pools(family)
    yield from _left_out(family)
    for warning in family.warnings:
        yield f"Warning: {warning}"


def _precisions(stored: schema.Stored) -> str:
    total = stored.parameters or 1
    if len(stored.precisions) == 1:
        return next(iter(stored.precisions))
    return ", ".join(f"{n} {c / total:.1%}" for n, c in stored.precisions.items())


def _lambda(model: schema.Model) -> str:
    if model.coefficient is not None:
        return _four(model.coefficient)
    return " to ".join(map(_four, model.coefficient_range))


def _four(value: float) -> str:
    """Four decimals, or two digits of what would be next to nothing in them."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"


def _settings(settings: schema.Settings) -> str:
    chosen = [f"granularity {settings.granularity}", f"power {settings.power:g}"]
    if settings.exclude:
        chosen.append(f"without {', '.join(settings.exclude)}")
    if settings.scale != 1:
        chosen.append(f"times lambda {settings.scale:g}")
    return ", ".join(chosen)


def _task_vectors(family: schema.Family) -> Sheet:
    models = family.models
    columns = [
        Column("#"),
        Column("model", names=True),
        Column("parameters"),
        Column("stored", names=True),
        *map(Column, ("||tau||", "/ ||theta_0||", "lambda")),
    ]
    weighted = any(model.weight != 1 for model in models)
    by_hand = any(model.weight_by_hand for model in models)
    rounded = any(model.rounding for model in models)
    columns += [Column("weight")] * weighted
    columns += [Column("weight in YAML", names=True)] * by_hand
    columns += [Column("||rounding||")] * rounded
    sheet = Sheet(columns)
    for number, model in enumerate(models, 1):
        relative = model.relative_norm
        row = [
            str(number),
            model.name,
            f"{model.parameters:,}",
            _precisions(model),
            f"{model.norm:.4g}",
            "-" if relative is None else _four(relative),
            _lambda(model),
        ]
        row += [f"{model.weight:g}"] * weighted
        row += [model.weight_by_hand or "-"] * by_hand
        row += [f"{model.rounding:.3g}"] * rounded
        sheet.rows.append(row)
    return sheet


def _cosines(family: schema.Family) -> Sheet:
    numbers = (str(number) for number in range(1, len(family.models) + 1))
    sheet = Sheet([Column("#"), *map(Column, numbers)])
    for number, row in enumerate(family.cosines, 1):
        # Plus 0.0, which makes -0.0 positive.
        rounded = (None if value is None else round(value, 2) + 0.0 for value in row)
        cells = ("-" if value is None else f"{value:+.2f}" for value in rounded)
        sheet.rows.append([str(number), *cells])
    return sheet


def _parts(family: schema.Family) -> Sheet:
    shown = [
        part
        for part in family.models[0].parts
        if any(model.parts[part] for model in family.models)
    ]
    sheet = Sheet([Column("#"), *map(Column, shown)])
    for number, model in enumerate(family.models, 1):
        shares = (f"{model.parts[part]:.1%}" for part in shown)
        sheet.rows.append([str(number), *shares])
    return sheet


def _pools(family: schema.Family) -> Sheet:
    numbers = (f"#{number}" for number in range(1, len(family.models) + 1))
    first = Column(family.settings.granularity, names=True)
    sheet = Sheet([first, *map(Column, numbers)])
    for pool in family.pools:
        cells = [
            f"{_four(value)} ({'-' if relative is None else _four(relative)})"
            for value, relative in zip(
                pool.coefficients, pool.relative_norms, strict=True
            )
        ]
        sheet.rows.append([pool.key, *cells])
    return sheet


def _left_out(family: schema.Family) -> Iterator[str]:
    """Lines on tensors that a merge leaves out without a word."""
    base = family.base
    if base.not_written is None:
        yield (
            "mergekit has no definition of this architecture: it merges the tensors "
            "that all inputs have."
        )
    for stored in (base, *family.models):
        if stored.not_written is not None and stored.not_written.count:
            yield f"{stored.name}: {_tensors(stored.not_written)} mergekit leaves out"
    for model in family.models:
        if model.not_in_base.count:
            yield f"{model.name}: {_tensors(model.not_in_base)} the base lacks"
        if model.only_in_base.count:
            yield f"{base.name}: {_tensors(model.only_in_base)} {model.name} lacks"


def _tensors(some: schema.Tensors) -> str:
    examples = ", ".join(some.examples)
    more = ", ..." if some.count > len(some.examples) else ""
    share = f", {some.share:.2%} of ||tau||^2" if some.share else ""
    return (
        f"{some.count} tensors ({examples}{more}; {some.bytes / 1e6:,.1f} MB{share}) "
        "that"
    )


COLUMNS = (
    "base",
    "model",
    "pool",
    "sq_norm",
    "norm",
    "relative_norm",
    "coefficient",
)


def as_csv(found: schema.Report) -> str:
    """Write one row per model and pool, at the granularity of the report.

    Args:
        found: the report.

    Returns:
        CSV with a header line, `COLUMNS`.
    """
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    for family in found.families:
        for pool in family.pools:
            for k, model in enumerate(family.models):
                rows.writerow(
                    [
                        family.base.name,
                        model.name,
                        pool.key,
                        pool.sq_norms[k],
                        pool.sq_norms[k] ** 0.5,
                        pool.relative_norms[k],
                        pool.coefficients[k],
                    ]
                )
    return stream.getvalue()


def remembered(entries: Sequence[Remembered]) -> Sheet:
    """Tabulate what the cache holds.

    Args:
        entries: of the cache.

    Returns:
        a table of a row for each.
    """
    headings = ("written", "holds", "base", "models")
    sheet = Sheet([*(Column(name, names=True) for name in headings), Column("kB")])
    kinds = {"pair": "squared norms", "details": "inner products"}
    for entry in entries:
        sheet.rows.append(
            [
                datetime.fromtimestamp(entry.written).isoformat(" ", "minutes"),
                kinds.get(entry.kind, "not readable"),
                entry.base,
                ", ".join(entry.models),
                f"{entry.bytes / 1e3:,.1f}",
            ]
        )
    return sheet


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
