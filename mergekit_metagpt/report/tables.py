"""Turns a report into terminal tables and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from mergekit_metagpt.method.announcing import estimate
from mergekit_metagpt.report.blocks import Blocks
from mergekit_metagpt.report.parts import printable

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
        norm = "was not read" if base.norm is None else f"{base.norm:.4g}"
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


def keep_of(family: schema.Family) -> str:
    """Say what `lambda: keep` comes to in a family: a number, or the range of pools."""
    values = [pool.keep for pool in family.pools if pool.keep is not None]
    ends = dict.fromkeys(f"{end(values):.4g}" for end in (min, max) if values)
    return " to ".join(ends) or UNDEFINED


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
    return (
        f"The merged task vector{before} has a length of {lengths.merged:.4g}, "
        f"{lengths.merged / lengths.inputs:.2f} of the models' average. "
        f"`lambda: keep` {way} that."
    )


def _precisions(stored: schema.Stored | schema.Header) -> str:
    total = stored.parameters or 1
    if len(stored.precisions) == 1:
        return next(iter(stored.precisions))
    return ", ".join(f"{n} {c / total:.1%}" for n, c in stored.precisions.items())


def _coefficient(model: schema.Model) -> str:
    if model.coefficient is not None:
        return estimate(model.coefficient, model.coefficient_se, _four)
    return " to ".join(map(_four, model.coefficient_range))


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
    for k, model in enumerate(models):
        relative = "-"
        if model.relative_norm is not None:
            relative = estimate(model.relative_norm, model.relative_norm_se, _four)
        row = [str(k + 1), model.name, _coefficient(model)]
        row += [weights[k]] if weights else []
        row += [model.weight_by_hand or "-"] * by_hand
        row += [estimate(model.norm, model.norm_se), relative]
        table.add(row)
    return table


def _cosines(family: schema.Family) -> Blocks:
    table = Blocks(["#", *_numbers(family)])
    errors = family.cosines_se or ((None,) * len(family.models),) * len(family.models)
    rows = zip(_numbers(family), family.cosines or (), errors, strict=True)
    for number, row, of_row in rows:
        cells = map(_cosine, row, of_row)
        table.add([number, *cells])
    return table


def _cosine(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    digits = max(2, -math.floor(math.log10(error))) if error else 2
    # Plus 0.0, which makes -0.0 positive.
    shown = f"{round(value, digits) + 0.0:+.{digits}f}"
    return f"{shown} ± {error:.{digits}f}" if error else shown


def _parts(family: schema.Family) -> Blocks:
    shown = [
        part
        for part in family.models[0].parts
        if any(model.parts[part] for model in family.models)
    ]
    table = Blocks(["#", *shown])
    for number, model in zip(_numbers(family), family.models, strict=True):
        cells = (_share(model, part) for part in shown)
        table.add([number, *cells])
    return table


def _share(model: schema.Model, part: str) -> str:
    shown = f"{model.parts[part]:.1%}"
    error = model.parts_se[part] if model.parts_se else 0.0
    return f"{shown} ± {error:.1%}" if error >= 5e-4 else shown


def _pools(family: schema.Family) -> Blocks:
    granularity = family.settings.granularity
    headings = [f"#{number}" for number in _numbers(family)]
    table = Blocks([granularity, *headings], names=(granularity,))
    for pool in family.pools:
        cells = [
            f"{'-' if value is None else estimate(value, error, _four)} "
            f"({'-' if relative is None else _four(relative)})"
            for value, error, relative in zip(
                pool.coefficients or (None,) * len(family.models),
                pool.coefficients_se or (None,) * len(family.models),
                pool.relative_norms,
                strict=True,
            )
        ]
        table.add([pool.key, *cells])
    return table


def _left_out(family: schema.Family) -> Iterator[str]:
    """Name the tensors that a merge leaves out silently."""
    base = family.base
    for stored in (base, *family.models):
        yield from _some(stored.name, stored.not_written, "mergekit leaves out")
    for model in family.models:
        yield from _some(model.name, model.not_in_base, "the base lacks")
        yield from _some(base.name, model.only_in_base, f"{model.name} lacks")


def _some(
    name: str | None, tensors: schema.Tensors | None, which: str
) -> Iterator[str]:
    """Name the first of some tensors of a model, if there are any."""
    if tensors and tensors.count:
        examples = ", ".join(tensors.examples)
        more = ", ..." if tensors.count > len(tensors.examples) else ""
        share = f", {tensors.share:.2%} of ||tau||^2" if tensors.share else ""
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
