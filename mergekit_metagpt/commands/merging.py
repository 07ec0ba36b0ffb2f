"""Merges a YAML as mergekit-yaml does, checked as a whole first; all or nothing."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.commands import placing, shards
from mergekit_metagpt.commands.options import lora_flags
from mergekit_metagpt.merge_config import (
    checks,
    families,
    jobs,
    merge_yaml,
    plain_yaml,
    plan,
    running,
    tensor_coefficients,
    tokenizer_checks,
)
from mergekit_metagpt.report import card, inspecting, schema
from mergekit_metagpt.report.figures import report_figure
from mergekit_metagpt.report.parts import printable
from mergekit_metagpt.scanning import once, sharing

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")

# Files beside the merged model.
REPORT = "metagpt.json"
FIGURE = "metagpt.png"
PLAIN = "mergekit_config.plain.yml"


@dataclass(frozen=True)
class Prepared:
    """A merge by one of our methods that was checked and measured.

    Attributes:
        job: headers and plan.
        report: what was measured.
        exported: the merge as plain YAML.
        warned: whether all warnings on the coefficients were logged.
    """

    job: jobs.Job
    report: schema.Report
    exported: plain_yaml.Exported
    warned: bool

    def write_beside(self, folder: Path) -> str:
        """Write report, figure and plain YAML; return a section of the model card."""
        folder.mkdir()
        (folder / REPORT).write_text(schema.as_json(self.report), encoding="ascii")
        (folder / PLAIN).write_text(self.exported.text, encoding="utf-8")
        report_figure(self.report, folder / FIGURE)
        changes = self.exported.changes
        return card.section(self.report, figure=FIGURE, plain=PLAIN, changes=changes)

    def move_beside(self, beside: Path, made: Path) -> None:
        """Move what `write_beside` wrote to the model, if no input has changed."""
        for checkpoint in self.job.opened.values():
            checkpoint.verify_unchanged()
        for path in beside.iterdir():
            path.rename(made / path.name)

    def complete(
        self, made: Path, beside: Path, about: str, options: MergeOptions
    ) -> None:
        """Add our files to a merged model; ValueError if it lacks a tensor."""
        self.move_beside(beside, made)
        if names := unwritten(made, self.job):
            raise ValueError(
                f"mergekit did not write {', '.join(names[:3])} ({len(names)} tensors "
                "in all), as it had planned: a defect of mergekit or of this package"
            )
        if options.write_model_card:
            with (made / "README.md").open("a", encoding="utf-8") as stream:
                stream.write(f"\n{about}")


def prepare(job: jobs.Job, options: MergeOptions) -> Prepared:
    """Measure the models of a merge by one of our methods; the last of its checks."""
    config = job.config
    tokenizer_checks.check_copied_tokenizer(config, options)
    merged = families.of_config(config)
    # Inner products are only taken from the cache, where `inspect` may have left them.
    report = inspecting.inspect(
        merged,
        job.opened,
        method=config.merge_method,
        planned=job.planned,
        gram=None,
    )
    if not options.allow_crimes:
        inspecting.require_near(report)
    with once.again(estimated=report.estimated):
        found = _coefficients(job.planned)
    report = inspecting.with_ranges(report, merged, found)
    report = report.model_copy(update={"options": _recorded(options)})
    exported = plain_yaml.export(job, options, found)
    for family in report.families:
        if family.note:
            LOG.warning("%s", family.note)
        if [model.coefficient_range for model in family.models] == [(1, 1)]:
            LOG.warning(
                "%s is the only model beside the base %s: its coefficient is 1",
                family.models[0].name,
                family.base.name,
            )
    # If parameters vary by tensor, the merge itself may find more to warn of.
    warned = not any(family.settings.varying for family in report.families)
    if warned:
        warnings = (line for family in report.families for line in family.warnings)
        for line in dict.fromkeys(warnings):
            LOG.warning("%s", line)
    if config.merge_method in checks.RANDOM_METHODS and options.random_seed is None:
        LOG.warning(
            "%s draws random numbers: give --random-seed N, or nobody can repeat or "
            "verify this merge",
            config.merge_method,
        )
    return Prepared(job, report, exported, warned)


def merge(
    config_file: Path, out: Path, options: MergeOptions, *, force: bool = False
) -> None:
    """Merge with `metagpt` through mergekit; `out` appears only once it is complete.

    Checks the YAML, the headers of all models and all weights before mergekit starts,
    which then needs no scan of its own. The model card refers to the report, its figure
    and the plain YAML, which lie beside the weights.

    Args:
        config_file: the merge YAML.
        out: folder for the merged model.
        options: mergekit's own; with `allow_crimes`, models may be far from their base.
        force: replace `out` if it exists.

    Raises:
        ValueError: the configuration or a model is refused; `out` is not empty.
        OSError: a file cannot be read or written.
    """
    text, config = merge_yaml.read_file(config_file)
    out = out.resolve()
    shards.require_none(placing.parts(out))
    placing.require_free(out, config_file, config, force=force)
    options.apply_global_options()
    job = jobs.check(config, options, config_file)
    placing.require_space(out, job)
    prepared = prepare(job, options)
    with placing.workplace(out) as parent:
        # Write these first: they should fail before hours of merging, not after.
        beside = parent / "beside"
        about = prepared.write_beside(beside)
        # mergekit makes the folder's name the title of the model card.
        made = parent / "made" / out.name
        try:
            with once.again(estimated=prepared.report.estimated):
                running.run(
                    config, str(made), options, source=text, warned=prepared.warned
                )
        except (ValueError, OSError) as late:
            if unwritten(made, prepared.job):
                raise
            prepared.move_beside(beside, made)
            raise ValueError(_keep(made, out, late)) from late
        prepared.complete(made, beside, about, options)
        _put(made, out, parent, force=force)


def after_interrupt(out: str) -> Callable[[], str]:
    """Return what tells, after Ctrl-C, what a merge that starts now has left."""
    place = Path(out).resolve()

    def version() -> tuple[int, int] | None:
        config = place / "config.json"  # comes last
        if not config.exists():
            return None
        status = config.stat()
        return status.st_ino, status.st_mtime_ns

    before = version()

    def told() -> str:
        if version() not in (None, before):
            return printable(f" {out} is complete all the same.")
        if finished := shards.finished(folder := placing.parts(place)):
            return printable(
                f" Finished files for {out}: {len(finished)}, in {folder}. The same "
                "command with --resume goes on from them."
            )
        return printable(f" Nothing was written to {out}.")

    return told


def closing(out: str, options: MergeOptions) -> str:
    """Say in one line what was written, and how to look at and check it later."""
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    wrote = f"Wrote {out} ({size / 1e6:,.1f} MB)."
    if not (Path(out) / REPORT).exists():  # ranks merge by any method
        return wrote
    report = schema.Report.model_validate_json((Path(out) / REPORT).read_bytes())
    folder, flags = options.lora_merge_cache, ""
    if folder:
        flags = lora_flags(shlex.quote(folder), options.lora_merge_dtype)
    copy = shlex.quote(str(Path(out) / "mergekit_config.yml"))
    line = (
        f"{wrote} Its coefficients are in {REPORT} there. From this folder, "
        f"`mergekit-metagpt inspect {copy}{flags}` shows them again"
    )
    if report.method in checks.RANDOM_METHODS and options.random_seed is None:
        return f"{line}. Without a seed, nobody can verify the merge"
    return (
        f"{line}, and `mergekit-metagpt verify {shlex.quote(out)}{flags}` checks that "
        f"{out} is this merge"
    )


def _coefficients(
    planned: Sequence[plan.Planned],
) -> list[tensor_coefficients.Coefficients]:
    """The coefficients of every output tensor; ranks share the reading."""
    group = sharing.group()
    if group is None or group.size == 1:
        return tensor_coefficients.of_plan(planned)
    with sharing.among(None):
        mine = tensor_coefficients.of_plan(planned[group.rank :: group.size])
    parts = group.gather([(dict(at.shares), at.scale, at.errors) for at in mine])
    return [
        tensor_coefficients.Coefficients(
            tensor, *parts[at % group.size][at // group.size]
        )
        for at, tensor in enumerate(planned)
    ]


def _recorded(options: MergeOptions) -> schema.Options:
    """The options that `verify` needs to make the same bits again."""
    return schema.Options(
        device="cuda" if options.multi_gpu else str(options.device),
        multi_gpu=options.multi_gpu,
        threads=torch.get_num_threads(),
        random_seed=options.random_seed,
        lora_merge_dtype=options.lora_merge_dtype,
        unsafe_truncate_embeddings=options.unsafe_truncate_embeddings,
        allow_crimes=options.allow_crimes,
    )


def merge_other(
    config: MergeConfiguration,
    source: str,
    out: Path,
    options: MergeOptions,
    *,
    force: bool,
) -> None:
    """Merge by any method of mergekit into a folder that `require_free` checked."""
    out = out.resolve()
    options.apply_global_options()
    with placing.workplace(out) as parent:
        made = parent / "made" / out.name
        running.run(config, str(made), options, source=source, warned=False)
        _put(made, out, parent, force=force)


def _put(made: Path, out: Path, workplace: Path, *, force: bool) -> None:
    """Move a model to its place; keep it elsewhere if the place was taken meanwhile."""
    try:
        placing.put(made, out, workplace, force=force)
    except placing.Taken as taken:
        raise ValueError(_keep(made, out, taken)) from taken


def unwritten(made: Path, job: jobs.Job) -> list[str]:
    """Planned tensors that the files of a merged model do not hold."""
    from mergekit.io import ShardedTensorIndex

    try:
        written = ShardedTensorIndex.from_disk(str(made)).tensor_paths.keys()
    except (OSError, RuntimeError, ValueError):  # not even an index
        written = set()
    return [name for name in job.expected if name not in written]


def _keep(made: Path, out: Path, late: Exception) -> str:
    """Keep all weights if only something after them failed."""
    kept = out.with_name(f"{out.name}.unfinished")
    number = 1
    while kept.exists():
        number += 1
        kept = out.with_name(f"{out.name}.unfinished-{number}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, kept)
    files = {path.name for path in kept.iterdir()}
    missing = [
        name for name in ("config.json", "tokenizer_config.json") if name not in files
    ]
    lacks = ""
    if missing:
        lacks = f", without {' and '.join(missing)}. Copy what is missing from the base"
    return (
        f"{late}. All merged weights are written and kept in {kept}{lacks}. Other "
        "files there may be cut short. To use it, rename the folder"
    )
