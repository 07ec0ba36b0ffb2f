"""Merges tiny models of many architectures, and says which weights a result lacks.

`python -m tests.long.zoo [NAME...]` makes a base and two models of every architecture
of `zoo_models.py` (or of those named), in each layout in which it is found. It runs
`mergekit-metagpt inspect` and `merge`, and mergekit's own `task_arithmetic`, and loads
what they wrote. It prints a table in Markdown, then the details of what is not whole.
The exit status is 1 if `merge` lost weights, or got them wrong, and did not refuse.

Tensors are counted as the model's class has them. One is lost if the class finds
nothing to load it from; one that the class ignores, such as a layer that predicts a
further token, if no file has its name. Buffers that the class can do without are not
counted.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.architecture import arch_info_for_config
from mergekit.architecture.auto import infer_architecture_info
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.commands import cli
from tests.families import State, merge_config, read_model, run_mergekit
from tests.long.zoo_models import ANIMALS, Family, families, floating
from tests.merges import task_arithmetic

WHOLE = "merged whole"
# How far bfloat16 may be off, for elements of about 0.1 that differ by about 0.01.
RTOL, ATOL = 2**-6, 1e-3


@dataclass(frozen=True)
class Ran:
    """What came of a command.

    Attributes:
        verdict: for the table.
        status: its exit status.
        line: the last that it said on stderr, or more about the verdict.
        names: the tensors that the verdict is about.
    """

    verdict: str
    status: int = 0
    line: str = ""
    names: tuple[str, ...] = ()


def in_short(said: str) -> str:
    """A message in one line, without configurations that it quotes, and folders."""
    line = re.sub(r"\{.*?\} has", "{...} has", " ".join(said.split()))
    return re.sub(r"\S*/metagpt-zoo-[^/]*/(\S+)", r"\1", line)


def up_to(length: int, line: str) -> str:
    """The line, or as much of it."""
    return line if len(line) <= length else f"{line[:length]}..."


def refused(status: int, said: str) -> Ran:
    """What came of a command that refuses."""
    line = in_short(said)
    reason = re.sub("^(Error|RuntimeError): (mergekit: )?", "", line)
    return Ran(f"refuses: {up_to(90, reason)}", status, line)


def loaded(folder: Path) -> State:
    """What the class that config.json names loads, without what it has to make up."""
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    made_up = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return {n: t for n, t in model.state_dict().items() if n not in made_up}


def judge(family: Family, out: Path, coefficients: Sequence[float]) -> Ran:
    """Compare a merged model with base + sum of coefficient * (model - base)."""
    base, *models = family.states
    stored = read_model(out)
    try:
        found = loaded(out) if stored else {}
    except Exception as error:
        return Ran("does not load", line=in_short(str(error)))
    found |= {name: stored[name] for name in family.ignored & stored.keys()}
    unread = family.ignored - stored.keys()
    lost = tuple(name for name in base if name not in found and name not in unread)
    if lost:
        had = floating(read_model(family.folders[0]))
        gone = len(had.keys() - stored.keys())
        line = f"{gone} of {len(had)} stored names are not written"
        return Ran(f"loses {len(lost)} of {len(base)} tensors", line=line, names=lost)
    wrong = []
    for name, tensor in base.items():
        if name in unread:
            continue
        expected = tensor.float()
        for factor, state in zip(coefficients, models, strict=True):
            expected = expected + factor * (state[name].float() - tensor.float())
        if not torch.allclose(found[name].float(), expected, rtol=RTOL, atol=ATOL):
            wrong.append(name)
    if wrong:
        verdict = f"gets {len(wrong)} of {len(base)} tensors wrong"
        return Ran(verdict, names=tuple(wrong))
    return Ran(WHOLE + (f", but for {len(unread)} tensors" if unread else ""))


def ours(*arguments: str | Path) -> Ran | None:
    """Run `mergekit-metagpt` as in a new process; None if it ends well."""
    LoaderCache.loaders.clear()
    infer_architecture_info.cache_clear()
    done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if not done.exit_code:
        return None
    if not isinstance(done.exception, SystemExit):
        return refused(1, f"{type(done.exception).__name__}: {done.exception}")
    return refused(done.exit_code, done.stderr[done.stderr.rfind("\nError: ") + 1 :])


def inspect(config: Path, folder: Path) -> Ran:
    """What `mergekit-metagpt inspect` says of a merge."""
    file = folder / "inspect.json"
    if bad := ours("inspect", config, "--json", file, "--force"):
        return bad
    report = json.loads(file.read_text())
    (found,) = report["families"]
    if report["refused"]:
        line = in_short(report["refused"])
        return Ran(f"warns: {up_to(60, line)}", line=line)
    line = in_short(" ".join(found["warnings"]))
    left_out = found["base"]["not_written"]
    if left_out and left_out["count"]:
        return Ran(f"warns: leaves out {left_out['count']} tensors", line=line)
    return Ran(f"warns: {up_to(60, line)}" if line else "ok", line=line)


def merge(family: Family, config: Path, out: Path) -> Ran:
    """What `mergekit-metagpt merge` makes of it."""
    if bad := ours("merge", config, out, "--no-copy-tokenizer", "--quiet"):
        return bad
    (found,) = json.loads((out / "metagpt.json").read_text())["families"]
    return judge(family, out, [model["coefficient"] for model in found["models"]])


def theirs(family: Family, config: Mapping[str, Any], out: Path) -> Ran:
    """What `mergekit-yaml` makes of the same models, with weights."""
    infer_architecture_info.cache_clear()
    try:
        run_mergekit(task_arithmetic(config), out)
    except Exception as error:
        return refused(1, f"{type(error).__name__}: {error}")
    return judge(family, out, [0.5, 0.5])


HEAD = "architecture", "layout", "definition in mergekit"
COMMANDS = "`mergekit-yaml`", "`mergekit-metagpt merge`", "`inspect`"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    layout: str
    defined: bool
    theirs: Ran
    merge: Ran
    inspect: Ran

    @property
    def ran(self) -> tuple[Ran, ...]:
        """What came of each command."""
        return self.theirs, self.merge, self.inspect

    @property
    def defective(self) -> bool:
        """Whether `merge` wrote something else than the whole result."""
        return not self.merge.status and not self.merge.verdict.startswith(WHOLE)

    def cell(self) -> str:
        """The row in the table of the page."""
        if self.theirs.status and self.merge.status:
            return "refused by both"
        if self.theirs.verdict == self.merge.verdict:
            return self.merge.verdict.removeprefix("merged ")
        merge = "refused" if self.merge.status else self.merge.verdict
        return f"{merge}; `mergekit-yaml` {self.theirs.verdict}"

    def markdown(self) -> str:
        """The line."""
        cells = [self.name, self.layout, "yes" if self.defined else "no"]
        cells += [ran.verdict.replace("|", "/") for ran in self.ran]
        return f"| {' | '.join(cells)} |"

    def details(self) -> Iterator[str]:
        """What the table has no room for, a line for each command."""
        for command, ran in zip(COMMANDS, self.ran, strict=True):
            last = f"exit status {ran.status}: {up_to(300, ran.line)}"
            said = [last] if ran.line else []
            if ran.names:
                said.append(", ".join(ran.names[:3]) + ", ..." * (len(ran.names) > 3))
            if said:
                yield f"- {self.name}, {self.layout}, {command}: {'; '.join(said)}"


def rows(name: str) -> Iterator[Row]:
    """Run everything on one architecture, in each of its layouts."""
    with tempfile.TemporaryDirectory(prefix="metagpt-zoo-") as place:
        for family in families(ANIMALS[name], Path(place)):
            base, *models = family.folders
            found = judge(family, base, [0.0, 0.0])
            assert found.verdict == WHOLE, f"{base} itself does not load: {found}"
            folder = Path(place) / f"merged-{family.layout}"
            folder.mkdir()
            config = merge_config(base, models)
            file = folder / "merge.yml"
            file.write_text(yaml.safe_dump(config))
            known = arch_info_for_config(transformers.AutoConfig.from_pretrained(base))
            yield Row(
                name,
                family.layout,
                known is not None,
                theirs(family, config, folder / "theirs"),
                merge(family, file, folder / "ours"),
                inspect(file, folder),
            )


LAYOUTS = {
    "saved": "as `save_pretrained` writes",
    "loaded": "with `save_original_format=False`",
    "hub": "as on the hub",
}


def summary(found: Sequence[Row]) -> Iterator[str]:
    """What docs/layouts.md has: which are whole, and a line for each other one."""
    cells = {
        name: {row.layout: row.cell() for row in found if row.name == name}
        for name in dict.fromkeys(row.name for row in found)
    }
    whole = [name for name, of in cells.items() if {*of.values()} == {"whole"}]
    yield from (f"Whole in every layout that was tried: {'; '.join(whole)}.", "")
    yield f"| architecture | {' | '.join(LAYOUTS.values())} |"
    yield "|---" * (1 + len(LAYOUTS)) + "|"
    for name, of in cells.items():
        if name not in whole:
            yield f"| {' | '.join([name, *(of.get(key, '') for key in LAYOUTS)])} |"


def main(names: Sequence[str]) -> int:
    """Print the tables and the details, and return the exit status."""
    if unknown := sorted({*names} - ANIMALS.keys()):
        print(f"no {', '.join(unknown)}; expected some of {', '.join(ANIMALS)}")
        return 2
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.monotonic()
    found = []
    print(f"| {' | '.join((*HEAD, *COMMANDS))} |", "|---" * 6 + "|", sep="\n")
    for name in names or ANIMALS:
        for row in rows(name):
            print(row.markdown(), flush=True)
            found.append(row)
    print("", *(line for row in found for line in row.details()), "", sep="\n")
    print(*summary(found), "", sep="\n")
    bad = sum(row.defective for row in found)
    seconds = time.monotonic() - started
    print(f"{len(found)} rows in {seconds:.0f} s; `merge` lost weights in {bad}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
