"""Turns a report into terminal tables and CSV."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.method.announcing import estimates
from mergekit_metagpt.report.blocks import Blocks
from mergekit_metagpt.report.drawing import percents
from mergekit_metagpt.report.parts import PARTS, printable

if TYPE_CHECKING:
    from mergekit_metagpt.report import schema
    from mergekit_metagpt.scanning.cache import Remembered

# Columns of models that fit a terminal, at most.
MOST_COLUMNS = 16
# What `lambda: keep` comes to where the merged task vector is zero.
UNDEFINED = "undefined"


def lay_out(found: schema.Report, then: str = "") -> Iterator[str | Blocks]:
    """Lay out what `inspect` found, family by family.

    Args:
        found: the report.
        then: what to do next, if there is advice on weights.

    Yields:
        tables, and paragraphs.
    """
    if found.refused:
        yield f"Can be measured, but not merged as it is: {found.refused}\n"
    if found.headers:
        yield from _headers(found.headers)
    for number, family in enumerate(found.families):
        if number or found.headers:
            yield ""
        if len(found.families) > 1:
            yield f"Merged with each other: {', '.join(family.places)}"
        yield from _family(family, found.method)
    if then and any(family.advice for family in found.families):
        yield then


def _headers(headers: Sequence[schema.Header]) -> Iterator[str | Blocks]:
    """Tabulate headers; say below what does not fit, and which tensors differ."""
    total = {header.name: header.download for header in headers}
    yield f"Headers ({sum(total.values()) / 1e9:,.2f} GB to download in all)\n"
    names = ("model", "commit", "stored", "quantised", "head", "fits")
    headings = ["model", "commit", "parameters", "stored", "GB to download"]
    table = Blocks([*headings, "quantised", "vocabulary", "head", "fits"], names=names)
    for header in headers:
        fits = "no" if header.misfit else "yes"
        table.add(
            [
                header.name,
                (header.commit or "a folder")[:8],
                f"{header.parameters:,}",
                _precisions(header),
                f"{header.download / 1e9:,.2f}",
                "yes" if header.quantised else "no",
                "-" if header.vocabulary is None else f"{header.vocabulary:,}",
                {None: "-", True: "the embeddings", False: "its own"}[header.tied],
                "the base" if header.base is None else fits,
            ],
        )
    yield table
    yield ""
    for header in headers:
        if header.misfit:
            yield f"{header.name} does not fit: {header.misfit}"
        yield from _some(header.name, header.not_written, "mergekit leaves out")
        yield from _some(header.name, header.not_in_base, "the base lacks")
        yield from _some(header.base, header.only_in_base, f"{header.name} lacks")


def _family(family: schema.Family, method: str) -> Iterator[str | Blocks]:
    base, models = family.base, family.models
    if base.parameters:
        others = [model for model in models if model.precisions != base.precisions]
        as_all = "" if others else " (as all models)"
        norm = (
            "was not read" if base.norm is None else f"{about(family)}{base.norm:.4g}"
        )
        yield f"Base {base.name}: {_stored(base)}{as_all}, ||theta_0|| {norm}"
    else:
        others = list(models)
        yield f"Base {base.name}: not opened; adapters are measured from their factors"
    for model in others:
        yield f"{model.name}: {_stored(model)}"
    if sample := family.sample:
        yield (
            f"Estimated from {sample.bytes_read / 1e6:,.1f} of "
            f"{sample.bytes_stored / 1e6:,.1f} MB ({sample.share:.3g} of each large "
            "tensor); ± is one standard error"
        )
    how = _settings(family.settings)
    yield f"\nTask vectors ({how}); relative: ||tau|| / ||theta_0||\n"
    yield _task_vectors(family)
    if lengths := _lengths(family, method):
        yield f"\n{lengths}"
    wide = len(models) > MOST_COLUMNS
    if len(models) > 1:
        if family.cosines is not None and not wide:
            yield "\nCosines between task vectors\n"
            yield _cosines(family)
        yield f"\n{family.reading}"
    if any(model.sq_norm for model in models):
        yield "\nShare of each part in ||tau||^2\n"
        yield _parts(family)
    if family.settings.granularity != "model" and not wide:
        of_what = family.settings.granularity
        yield f"\nCoefficients by {of_what}, and in brackets ||tau|| / ||theta_0||\n"
        yield _pools(family)
    if wide:
        yield f"\n{len(models)} models are too many for a table: use --json or --csv"
    lines = [*_left_out(family), *(f"Warning: {w}" for w in family.warnings)]
    if family.note:
        lines.insert(0, f"{family.note}.")
    if family.advice:
        lines.append(family.advice)
    if lines:
        yield "\n" + "\n".join(lines)


def _stored(stored: schema.Stored) -> str:
    return f"{stored.parameters:,} parameters, {_precisions(stored)}"


def scale_of(settings: schema.Settings) -> str:
    """Return `lambda` as it stands in a YAML."""
    return settings.scale if isinstance(settings.scale, str) else f"{settings.scale:g}"


def about(family: schema.Family) -> str:
    """Return what stands before a number of unknown error: nothing if it is exact."""
    return "about " if family.sample else ""


def keep_of(family: schema.Family) -> str:
    """Say what `lambda: keep` comes to in a family: a number, or the range of pools."""
    values = [pool.keep for pool in family.pools if pool.keep is not None]
    ends = dict.fromkeys(f"{end(values):.4g}" for end in (min, max) if values)
    if not ends and family.settings.varying:
        return "differs by tensor"
    return about(family) + " to ".join(ends) if ends else UNDEFINED


def _lengths(family: schema.Family, method: str) -> str | None:
    """Say how long the merged task vector is, where that was measured."""
    lengths = family.lengths
    if lengths is None or lengths.merged is None:
        return None
    keep = keep_of(family)
    way = "multiplies" if family.settings.keeps_length else "would multiply"
    way += f" it by {keep} to make up for"
    if keep == UNDEFINED:
        way = "cannot make up for"
    composed = method.removeprefix("metagpt_")
    before = f", before `{composed}` drops elements," if composed != method else ""
    of_average = lengths.merged / lengths.inputs
    return (
        f"The merged task vector{before} has a length of {about(family)}"
        f"{lengths.merged:.4g}, {about(family)}{of_average:.2f} of the models' "
        f"average. `lambda: keep` {way} that."
    )


def _precisions(stored: schema.Stored | schema.Header) -> str:
    total = stored.parameters or 1
    if len(stored.precisions) == 1:
        return next(iter(stored.precisions))
    return ", ".join(f"{n} {c / total:.1%}" for n, c in stored.precisions.items())


def column(
    models: Sequence[schema.Model],
    field: str,
    exact: Callable[[float], str] = "{:.4g}".format,
) -> list[str]:
    """Write a field of each model, with the standard errors in the field `..._se`."""
    values = [getattr(model, field) for model in models]
    errors = [getattr(model, f"{field}_se") for model in models]
    return estimates(values, errors, exact)


def _at(values: Any, key: int | str) -> float | None:
    return None if values is None else values[key]


def _four(value: float) -> str:
    """Write four decimals, or two digits of a value that has few in four decimals."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"


def _settings(settings: schema.Settings) -> str:
    chosen = [f"granularity {settings.granularity}", f"power {settings.power:g}"]
    if settings.exclude:
        chosen.append(f"without {', '.join(settings.exclude)}")
    if settings.scale != 1:
        chosen.append(f"the sum scaled by lambda {scale_of(settings)}")
    return ", ".join(chosen)


def _numbers(family: schema.Family) -> list[str]:
    return [str(number) for number in range(1, len(family.models) + 1)]


def _task_vectors(family: schema.Family) -> Blocks:
    """Tabulate coefficients, weights and norms, in this order."""
    models = family.models
    weights = family.weights
    by_hand = any(model.weight_by_hand for model in models)
    by_hand = by_hand and "weight" not in family.settings.varying
    headings = ["#", "model", "coefficient"]
    headings += ["weight"] * bool(weights) + ["YAML weight"] * by_hand
    headings += ["||tau||", "relative"]
    table = Blocks(headings, names=("model",))
    coefficients = column(models, "coefficient", _four)
    norms, relative = column(models, "norm"), column(models, "relative_norm", _four)
    for k, (number, model) in enumerate(zip(_numbers(family), models, strict=True)):
        coefficient = coefficients[k]
        if model.coefficient is None:
            span = " to ".join(dict.fromkeys(map(_four, model.coefficient_range)))
            coefficient = about(family) + span
        row = [number, model.name, coefficient]
        row += [weights[k]] if weights else []
        row += [model.weight_by_hand or "-"] * by_hand
        table.add([*row, norms[k], relative[k]])
    return table


def _cosines(family: schema.Family) -> Blocks:
    table = Blocks(["#", *_numbers(family)])
    rows = family.cosines or ()
    errors = family.cosines_se or ((None,) * len(rows),) * len(rows)
    cells = iter(
        estimates(
            [value for row in rows for value in row],
            [error for row in errors for error in row],
            lambda value: f"{round(value, 2) + 0.0:+.2f}",
            least=2,
            sign="+",
        )
    )
    for number in _numbers(family):
        table.add([number, *(next(cells) for _ in rows)])
    return table


def _parts(family: schema.Family) -> Blocks:
    models = family.models
    shown = [part for part in PARTS if any(model.parts[part] for model in models)]
    columns = [
        percents(
            [model.parts[part] for model in models],
            [_at(model.parts_se, part) for model in models],
            1,
        )
        for part in shown
    ]
    table = Blocks(["#", *shown])
    for row in zip(_numbers(family), *columns, strict=True):
        table.add(row)
    return table


def _pools(family: schema.Family) -> Blocks:
    granularity, pools = family.settings.granularity, family.pools
    table = Blocks(
        [granularity, *(f"#{number}" for number in _numbers(family))],
        names=(granularity,),
    )
    columns = []
    for k in range(len(family.models)):
        shares = estimates(
            [_at(pool.coefficients, k) for pool in pools],
            [_at(pool.coefficients_se, k) for pool in pools],
            _four,
        )
        norms = estimates(
            [pool.relative_norms[k] for pool in pools],
            [_at(pool.relative_norms_se, k) for pool in pools],
            _four,
        )
        columns.append([f"{a} ({b})" for a, b in zip(shares, norms, strict=True)])
    for pool, *cells in zip(pools, *columns, strict=True):
        table.add([pool.key, *cells])
    return table


def _left_out(family: schema.Family) -> Iterator[str]:
    """Name the tensors that a merge leaves out silently."""
    base, some = family.base, functools.partial(_some, about=about(family))
    for stored in (base, *family.models):
        yield from some(stored.name, stored.not_written, "mergekit leaves out")
    for model in family.models:
        yield from some(model.name, model.not_in_base, "the base lacks")
        yield from some(base.name, model.only_in_base, f"{model.name} lacks")


def _some(
    name: str | None, tensors: schema.Tensors | None, which: str, about: str = ""
) -> Iterator[str]:
    """Name the first of some tensors of a model, if there are any."""
    if tensors and tensors.count:
        examples = ", ".join(tensors.examples)
        more = ", ..." if tensors.count > len(tensors.examples) else ""
        share = f", {about}{tensors.share:.2%} of ||tau||^2" if tensors.share else ""
        plural = "s" if tensors.count > 1 else ""
        yield (
            f"{name}: {tensors.count} tensor{plural} ({examples}{more}; "
            f"{tensors.bytes / 1e6:,.1f} MB{share}) that {which}"
        )


COLUMNS = (
    "base",
    "model",
    "pool",
    "sq_norm",
    "norm",
    "relative_norm",
    "coefficient",
    "weight",
    "sq_norm_se",
    "coefficient_se",
)


def as_csv(found: schema.Report) -> str:
    """Return CSV of one row per model and pool, with the header line `COLUMNS`."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    for family in found.families:
        by_tensor = "weight" in family.settings.varying
        for pool in family.pools:
            for k, model in enumerate(family.models):
                errors = [
                    "" if of_models is None else of_models[k]
                    for of_models in (pool.sq_norms_se, pool.coefficients_se)
                ]
                share = pool.coefficients[k] if pool.coefficients else ""
                rows.writerow(
                    [
                        family.base.name,
                        model.name,
                        pool.key,
                        pool.sq_norms[k],
                        pool.sq_norms[k] ** 0.5,
                        pool.relative_norms[k],
                        share,
                        model.weight_by_hand if by_tensor else model.weight,
                        *errors,
                    ]
                )
    return stream.getvalue()


def remembered(entries: Sequence[Remembered]) -> Blocks:
    """Tabulate what the cache holds, an entry in each row."""
    names = ("written", "holds", "base", "models")
    table = Blocks([*names, "kB"], names=names)
    kinds = {
        "pair": "squared norms",
        "gram": "inner products",
        "sample": "estimates from a sample",
        "losses": "losses",
        "scores": "scores on a task",
    }
    for entry in entries:
        table.add(
            [
                datetime.fromtimestamp(entry.written).isoformat(" ", "minutes"),
                kinds.get(entry.kind, "not readable"),
                entry.base,
                ", ".join(entry.models),
                f"{entry.bytes / 1e3:,.1f}",
            ],
        )
    return table


def verified(found: schema.Verification) -> Iterator[str]:
    """Say in a line what each check of a merged model found."""
    for check in found.checks:
        yield f"{check.name:<15}{check.verdict:<15}{printable(check.details)}"
    if found.verdict == "verified":
        yield f"{'not compared':<30}what config.json says, tokenizer, model card"
