"""Writes sections of a model card: a report or a comparison in, Markdown out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_metagpt.merge_config.checks import RANDOM_METHODS
from mergekit_metagpt.method import advice
from mergekit_metagpt.report import schema, tables
from mergekit_metagpt.report.comparison import Comparison, loss_in
from mergekit_metagpt.report.parts import printable

PAPER = "https://arxiv.org/abs/2406.11385"


def section(
    report: schema.Report, *, figure: str, plain: str, changes: tuple[str, ...]
) -> str:
    """Write the coefficients, their origin, versions and inputs as Markdown.

    Args:
        report: of `inspect` on the merge's configuration.
        figure: file name of the figure beside the card.
        plain: file name of the plain YAML beside the card.
        changes: what merging the plain YAML changes beyond the last bits.

    Returns:
        Markdown that begins with a heading.
    """
    lines = [
        "## MetaGPT coefficients",
        "",
        f"By [MetaGPT]({PAPER}), from the checkpoints alone: the coefficient lambda_t",
        "of each model theta_t follows from how far it moved from the base theta_0:",
        "",
        _formula(report),
        "",
    ]
    composed = report.method.removeprefix("metagpt").removeprefix("_")
    if composed:
        lines += [
            f"`{composed}` takes the coefficients as its weights; distances are",
            "measured before it changes anything.",
            "",
        ]
    for family in report.families:
        lines += _family(family, composed=bool(composed))
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines += [
        f"![share of each model in the merge, and how far its layers moved]({figure})",
        "",
        f"Made with {versions}. All figures are in `metagpt.json`. `{plain}` is the "
        f"same merge with explicit weights{_seed(report)}, for mergekit without the "
        "plugin" + (f" ({'; '.join(changes)})." if changes else "."),
        "",
    ]
    return "\n".join(lines)


def _seed(report: schema.Report) -> str:
    """Say which seed a merge that draws random numbers needs besides its YAML."""
    if report.method not in RANDOM_METHODS or report.options is None:
        return ""
    seed = report.options.random_seed
    return " but other random numbers" if seed is None else f" and --random-seed {seed}"


def _formula(report: schema.Report) -> str:
    settings = report.families[0].settings
    norm = r"\lVert\theta_t - \theta_0\rVert"
    term = rf"{norm}^{{{settings.power:g}}}"
    weighted = any(family.weights for family in report.families)
    one = rf"w_t\,{term}" if weighted else term
    other = one.replace("_t", "_k")
    return rf"$$\lambda_t = \frac{{{one}}}{{\sum_k {other}}}$$"


def _family(family: schema.Family, *, composed: bool) -> list[str]:
    settings = family.settings
    chosen = [f"Granularity `{settings.granularity}`", f"power {settings.power:g}"]
    if settings.exclude:
        chosen.append(f"not counting `{', '.join(settings.exclude)}`")
    if settings.varying:
        chosen.append(f"{', '.join(settings.varying)} set tensor by tensor")
    if settings.scale != 1:
        scale = tables.scale_of(settings)
        keep = f" ({tables.keep_of(family)})" if settings.keeps_length else ""
        chosen.append(f"the sum of all changes scaled by `lambda: {scale}`{keep}")
    if settings.sample < 1:
        chosen.append(_sample(family))
    lines = [
        f"Base: `{family.base.name}` ({_version(family.base)}). {', '.join(chosen)}.",
        "",
        "| model | coefficient | weight | norm | relative norm | content |",
        "|---|---|---|---|---|---|",
    ]
    weights = family.weights or ["1"] * len(family.models)
    columns = (
        tables.column(family.models, "coefficient", "{:.6g}".format),
        weights,
        tables.column(family.models, "norm", "{:.5g}".format),
        tables.column(family.models, "relative_norm"),
    )
    about = tables.about(family)
    for model, coefficient, *others in zip(family.models, *columns, strict=True):
        low, high = model.coefficient_range
        if model.coefficient is None:
            ends = f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}"
            coefficient = f"{about}{ends}"
        lines.append(
            f"| `{model.name}` | {' | '.join((coefficient, *others))} "
            f"| {_version(model)} |"
        )
    norms = (
        "`norm` is how far a model moved from the base, and `relative norm` the same "
        "divided by the norm of the base. `content` is the revision on the hub, or a "
        "checksum (SHA-256) of samples of the files. A larger coefficient does not "
        "mean a better model."
    )
    said = _lengths(family, composed=composed)
    return [*lines, "", " ".join((norms, *said)), ""]


def _lengths(family: schema.Family, *, composed: bool) -> Iterator[str]:
    """Say how far the models and their sum moved from the base."""
    lengths = family.lengths
    if lengths is None:
        return
    about, ratio = tables.about(family), advice.times(lengths.disparity)
    yield (
        f"The model that moved farthest moved {about}{ratio} times as far as the one "
        "that moved least."
    )
    if lengths.merged is not None and not composed:
        before = "" if family.settings.scale == 1 else ", before `lambda`"
        far = f"{about}{lengths.merged / lengths.inputs:.2f}"
        yield (
            f"The merged model moved {far} times as far as these models did on "
            f"average{before}."
        )


def _sample(family: schema.Family) -> str:
    asked = f"`sample: {family.settings.sample:g}`"
    if family.sample is None:
        return f"{asked}, which was not needed: all figures are exact"
    read, stored = family.sample.bytes_read, family.sample.bytes_stored
    return (
        f"estimated from {read / 1e6:,.1f} of {stored / 1e6:,.1f} MB ({asked}; ± is "
        "one standard error)"
    )


def _version(stored: schema.Stored) -> str:
    source = stored.source
    if source.revision:
        return f"revision `{source.revision}`"
    return f"checksum `{source.digest[:16]}`"


def measured(found: Comparison) -> str:
    """Write what `compare` measured of the best merge and of the others.

    Args:
        found: the comparison.

    Returns:
        Markdown that begins with a heading.
    """
    lines = ["## Compared with other merges", ""]
    if found.texts:
        losses = {
            row.name: [
                str(row.by),
                *(f"{loss_in(loss, found.unit):.4f}" for loss in row.losses),
            ]
            for row in (*found.models, *found.candidates)
        }
        lines += [
            f"Mean loss on each text, nats per {found.unit}; lower is better. ALD,",
            "average loss difference: the loss minus that of the model for a text, on",
            "average, with its standard error.",
            "",
            *_table(["ALD", *(text.name for text in found.texts)], losses, found.best),
        ]
    if (scoring := found.scoring) is not None:
        tasks = scoring.tasks
        scores = {
            row.name: [
                str(scored[task.metric])
                for task, scored in zip(tasks, row.scores, strict=True)
            ]
            for row in (*scoring.models, *scoring.candidates)
        }
        lines += [
            f"Scores on tasks of lm-eval {scoring.lm_eval}, with standard errors.",
            "",
            *_table([f"{t.name}, {t.metric}" for t in tasks], scores, found.best),
        ]
    return "\n".join(lines)


def _table(
    headings: Sequence[str], rows: Mapping[str, Sequence[str]], best: str
) -> Iterator[str]:
    yield f"| model | {' | '.join(map(printable, headings))} |"
    yield "|---" * (len(headings) + 1) + "|"
    for name, cells in rows.items():
        shown = f"**{name}** (this merge)" if name == best else name
        yield f"| {printable(shown)} | {' | '.join(cells)} |"
    yield ""
