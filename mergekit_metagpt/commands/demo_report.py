"""Shows what the demo found: tables, a figure, and commands that go on from it."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.table import Table

from mergekit_metagpt.commands.demo import SPECIALTIES, WINDOW, DemoResult
from mergekit_metagpt.report.drawing import BLUE


def task_vectors(result: DemoResult) -> Table:
    """Tabulate squared norm, coefficient and cosines of each specialist."""
    names = list(result.family.specialists)
    table = Table(title="Task vectors, and the coefficients that follow from them")
    table.add_column("specialist")
    for heading in ("||tau||^2", "coefficient", *(f"cos {name}" for name in names)):
        table.add_column(heading, justify="right")
    for row, name in enumerate(names):
        cosines = [f"{value:+.3f}" for value in result.cosines[row].tolist()]
        table.add_row(
            name,
            f"{float(result.sq_norms[row]):.4g}",
            f"{float(result.lambdas[row]):.4f}",
            *cosines,
        )
    return table


def losses(result: DemoResult) -> Table:
    """Tabulate held-out losses of all models, and each merge's loss difference."""
    domains = list(next(iter(result.losses.values())))
    table = Table(
        title="Held-out loss, nats per byte (lower is better)",
        caption="ALD: mean over the specialists' domains of the merge's loss minus "
        "the specialist's. task_arithmetic: weight 0.3 each",
    )
    table.add_column("model")
    for heading in (*domains, "ALD"):
        table.add_column(heading, justify="right")
    sections = (["base"], list(result.family.specialists), list(result.merges))
    for names in sections:
        for name in names:
            cells = [f"{result.losses[name][domain]:.3f}" for domain in domains]
            difference = f"{result.ald[name]:.3f}" if name in result.merges else ""
            table.add_row(name, *cells, difference)
        table.add_section()
    return table


def draw(result: DemoResult, file: Path) -> None:
    """Draw the coefficients, and how far base and merges are above the specialists."""
    from matplotlib.figure import Figure

    names = list(result.family.specialists)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))

    bars = left.barh(names, result.lambdas.tolist(), color=BLUE)
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.set_xlim(0, 1)
    left.invert_yaxis()
    left.set_title("MetaGPT's coefficients")
    left.set_xlabel("coefficient")

    shown = ["base", *result.merges]
    width = 0.8 / len(shown)
    colors = ("#222222", BLUE, "#dd8452", "#9aa6b2")
    for number, (model, color) in enumerate(zip(shown, colors, strict=True)):
        at = [
            row + (number - (len(shown) - 1) / 2) * width for row in range(len(names))
        ]
        excess = [result.losses[model][n] - result.losses[n][n] for n in names]
        label = f"{model} (ALD {result.ald[model]:.3f})" if number else model
        right.bar(at, excess, width, label=label, color=color, edgecolor="black")
    right.set_xticks(range(len(names)), names)
    right.set_ylabel("loss above the specialist's (nats per byte)")
    right.set_title("What merging costs in each domain")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def by_hand(folder: Path) -> list[str]:
    """Return shell commands for a merge by mergekit itself, and for a comparison."""
    texts = " ".join(f"--text {name}={name}.txt" for name in SPECIALTIES)
    commands = (
        "mergekit-yaml metagpt.yml ./merged-by-hand",
        # In chunks of the demo's own length, so that losses are the same.
        f"mergekit-metagpt compare metagpt.yml {texts} --context {WINDOW}",
    )
    return [f"(cd {shlex.quote(str(folder))} && {command})" for command in commands]
