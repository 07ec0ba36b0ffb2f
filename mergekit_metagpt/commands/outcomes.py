"""Writes a comparison's last line, and comments above the YAML of the best merge."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.report.parts import printable
from mergekit_metagpt.scanning import cache

if TYPE_CHECKING:
    from mergekit_metagpt.report.comparison import Comparison
    from mergekit_metagpt.report.ranking import Ranked


def origin(config: Path, found: Comparison) -> str:
    """Return comments that tell a reader of the best YAML where it comes from."""
    ranked = _ranked(found)
    of = f", as the best of {len(ranked)} merges" if len(ranked) > 1 else ""
    lines = [f"Written by mergekit-metagpt compare {config}{of}."]
    lines.append(f"{ranked[0].name}: {ranked[0].meaning}.")
    for counted, words in ((True, "Measured on"), (False, "Measured, not counted")):
        texts = [text for text in found.texts if (text.model is not None) == counted]
        if texts:
            named = (f"{t.name} ({t.file}, {t.tokens:,} tokens)" for t in texts)
            lines.append(f"{words}: {', '.join(named)}.")
    if found.texts:
        lines.append(
            "ALD, average loss difference: the merge's loss minus that of the model "
            "for a text, on average; lower is better."
        )
    if found.scoring is not None:
        tasks = ", ".join(task.name for task in found.scoring.tasks)
        lines.append(f"Scored on tasks of lm-eval: {tasks}.")
    lines.append(found.verdict)
    return "".join(f"# {line}\n" for line in printable("\n".join(lines)).split("\n"))


def _ranked(found: Comparison) -> Sequence[Ranked]:
    """The ranking that chose the best merge: by losses, or by scores without texts."""
    if not found.candidates and found.scoring is not None:
        return found.scoring.candidates
    return found.candidates


def closing(
    found: Comparison,
    *,
    json: str | None,
    plot: str | None,
    write: str | None,
    keep: str | None,
) -> str:
    """Say in one line what was written to which file, and what to do next."""
    named = (
        (json if json != "-" else None, "all losses and scores"),
        (plot, "the figure"),
        (write, f"the YAML of '{found.best}'"),
        (keep, f"the merge '{found.best}'"),
    )
    said = [f"{place} ({what})" for place, what in named if place is not None]
    line = f"Wrote {', '.join(said)}. " if said else ""
    tied = [row.name for row in _ranked(found)[1:] if not row.beyond_noise]
    if tied and (write is not None or keep is not None):
        line += f"'{found.best}' is best, but '{tied[0]}' is within noise of it. "
    if write is not None and keep is None:
        line += f"Merge it: mergekit-yaml {shlex.quote(write)} ./merged"
    elif write is None and keep is None:
        line += f"For the YAML of '{found.best}', add --write BEST.yml to this command"
        if cache.folder() is not None:
            line += ": what was measured is kept and not measured again"
        line += "."
    return printable(line.rstrip())
