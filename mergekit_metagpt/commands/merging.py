"""Merges a YAML as mergekit-yaml does: the whole job checked first, all or nothing."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.merge_config import (
    checks,
    families,
    jobs,
    merge_yaml,
    plain_yaml,
    plan,
    tokenizer_checks,
)
from mergekit_metagpt.report import card, inspecting, schema
from mergekit_metagpt.report.figures import report_figure
from mergekit_metagpt.scanning import once, ranks

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")

# Files beside the merged model.
REPORT = "metagpt.json"
FIGURE = "metagpt.png"
PLAIN = "mergekit_config.plain.yml"
# Where an old model lies, in the hidden folder, while the new one takes its place.
ASIDE = "replaced"


@dataclass(frozen=True)
class Prepared:
    """A merge by one of our methods that was checked and measured.

    Attributes:
        text: the YAML.
        job: headers and plan.
        report: what was measured.
        exported: the merge as plain YAML.
        warned: whether all warnings on the coefficients were logged.
    """

    text: str
    job: jobs.Job
    report: schema.Report
    exported: plain_yaml.Exported
    warned: bool

    def write_beside(self, folder: Path) -> str:
        """Write the files that lie beside the model.

        Args:
            folder: a new one.

        Returns:
            the section of the model card that refers to them.
        """
        folder.mkdir()
        (folder / REPORT).write_text(schema.as_json(self.report), encoding="ascii")
        (folder / PLAIN).write_text(self.exported.text, encoding="utf-8")
        report_figure(self.report, folder / FIGURE)
        changes = self.exported.changes
        return card.section(self.report, figure=FIGURE, plain=PLAIN, changes=changes)

    def complete(
        self, made: Path, beside: Path, about: str, options: MergeOptions
    ) -> None:
        """Put into a merged model what belongs to it, and check that it is complete.

        Args:
            made: the model.
            beside: the folder of `write_beside`, which is emptied.
            about: the section of the model card.
            options: mergekit's own.

        Raises:
            ValueError: mergekit did not write a tensor.
            OSError: an input has changed, or a file cannot be written.
        """
        for checkpoint in self.job.opened.values():
            checkpoint.verify_unchanged()
        for path in beside.iterdir():
            path.rename(made / path.name)
        if names := unwritten(made, self.job):
            raise ValueError(
                f"mergekit did not write {', '.join(names[:3])} ({len(names)} tensors "
                "in all), as it had planned: a defect of mergekit or of this package"
            )
        if options.write_model_card:
            with (made / "README.md").open("a", encoding="utf-8") as stream:
                stream.write(f"\n{about}")


def prepare(
    text: str, config: MergeConfiguration, options: MergeOptions, file: Path
) -> Prepared:
    """Check a whole merge by one of our methods, and measure its models.

    Args:
        text: the YAML.
        config: the same as mergekit's configuration.
        options: mergekit's own.
        file: that of the YAML, for messages.

    Returns:
        the merge.

    Raises:
        ValueError: the configuration or a model is refused.
        OSError: a file cannot be read.
    """
    with ranks.leader_first():
        job = jobs.check(config, options, file)
    tokenizer_checks.check_copied_tokenizer(config, options)
    merged = families.of_config(config)
    # Without inner products, unless an earlier `inspect` left them in the cache.
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
    exported = plain_yaml.export(job, found)
    for family in report.families:
        if family.note:
            LOG.warning("%s", family.note)
    # Parameters that vary by tensor may need warnings that the report does not have.
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
    return Prepared(text, job, report, exported, warned)


def merge(
    config_file: Path, out: Path, options: MergeOptions, *, force: bool = False
) -> None:
    """Merge with `metagpt` through mergekit; `out` appears only once it is complete.

    Checks the YAML, the headers of all models and all weights before mergekit starts,
    which then needs no scan of its own. Writes beside the model the report, its
    figure, and the merge as plain YAML; the model card refers to them.

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
    check_place(out, config_file, config, force=force)
    options.apply_global_options()
    prepared = prepare(text, config, options, config_file)
    with workplace(out) as parent:
        # Write these first: they should fail before hours of merging, not after.
        beside = parent / "beside"
        about = prepared.write_beside(beside)
        # mergekit makes the folder's name the title of the model card.
        made = parent / "made" / out.name
        try:
            with once.again(estimated=prepared.report.estimated):
                plan.run(
                    config, str(made), options, source=text, warned=prepared.warned
                )
        except (ValueError, OSError) as late:
            if unwritten(made, prepared.job):
                raise
            for checkpoint in prepared.job.opened.values():
                checkpoint.verify_unchanged()
            for path in beside.iterdir():
                path.rename(made / path.name)
            raise ValueError(_keep(made, out, late)) from late
        prepared.complete(made, beside, about, options)
        put(made, out, aside=parent / ASIDE)


def _coefficients(planned: Sequence[plan.Planned]) -> list[plan.Coefficients]:
    """The coefficients of every output tensor; ranks share what must be read."""
    group = ranks.group()
    if group is None or group.size == 1:
        return plan.coefficients(planned)
    with ranks.sharing(None):
        mine = plan.coefficients(planned[group.rank :: group.size])
    parts = group.gather([(dict(at.shares), at.scale, at.error) for at in mine])
    return [
        plan.Coefficients(tensor, *parts[at % group.size][at // group.size])
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
    config: MergeConfiguration, source: str, out: Path, options: MergeOptions
) -> None:
    """Merge by any method of mergekit; `out` appears only once it is complete.

    Args:
        config: mergekit's configuration, checked.
        source: the YAML.
        out: folder for the merged model, checked by `check_place`; it is replaced.
        options: mergekit's own.

    Raises:
        ValueError: mergekit refuses the merge.
        OSError: a file cannot be read or written.
    """
    out = out.resolve()
    options.apply_global_options()
    with workplace(out) as parent:
        made = parent / "made" / out.name
        plan.run(config, str(made), options, source=source, warned=False)
        put(made, out, aside=parent / ASIDE)


def unwritten(made: Path, job: jobs.Job) -> list[str]:
    """Planned tensors that the files of a merged model do not hold."""
    from mergekit.io import ShardedTensorIndex

    try:
        written = ShardedTensorIndex.from_disk(str(made)).tensor_paths.keys()
    except (OSError, RuntimeError, ValueError):  # not even an index
        written = set()
    return [name for name in job.expected if name not in written]


def _keep(made: Path, out: Path, late: Exception) -> str:
    """Keep weights that took hours where only what belongs to them failed."""
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
    return (
        f"{late}. All merged weights are written and kept in {kept}"
        + (f", without {' and '.join(missing)}" if missing else "")
        + ". Copy the files that are missing from the base, and rename the folder"
    )


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Make a hidden folder to work in; remove it in the end, also after Ctrl-C.

    It is named before it is made, and removed twice: there is no moment at which a
    single interrupt leaves it behind.

    Args:
        out: where the result is to go: the folder is made beside it.

    Yields:
        the folder.
    """
    folder = home(out) / f".{out.name}.{secrets.token_urlsafe(6)}"
    try:
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            remove(folder, out)
    finally:
        remove(folder, out)


def remove(folder: Path, out: Path) -> None:
    """Remove a workplace; an old model that lies in it goes back to its place first."""
    if (folder / ASIDE).exists() and not out.exists():
        (folder / ASIDE).rename(out)
    if folder.exists():
        shutil.rmtree(folder)


def home(out: Path) -> Path:
    """Where to work: a folder from which the model can be moved to its place."""
    if out.is_dir() and not any(out.iterdir()):
        return out  # it may be a disk of its own, into which nothing can be moved
    return next(folder for folder in out.parents if folder.is_dir())


def check_place(
    out: Path,
    config_file: Path,
    config: MergeConfiguration,
    *,
    force: bool,
    unfinished: str | None = None,
) -> None:
    """Refuse an output folder that is taken, or that holds what is to be merged.

    Args:
        out: the folder, resolved.
        config_file: the merge YAML.
        config: the same as mergekit's configuration.
        force: whether the folder may exist.
        unfinished: name of a folder in it that does not count.

    Raises:
        ValueError: it is taken, or holds an input.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; expected a folder for the merged model")
    paths = [
        Path(part.path)
        for model in merge_yaml.models(config)
        for part in (model.model, model.lora)
        if part is not None
    ]
    for path in (config_file, *paths):
        if path.resolve().is_relative_to(out):
            raise ValueError(
                f"{out} holds {path}, which this merge reads; choose another folder"
            )
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not force and names - {unfinished}:
        raise ValueError(f"{out} exists and is not empty; choose another, or --force")


def put(made: Path, out: Path, aside: Path) -> None:
    """Move a finished model to its place; on failure all is as it was."""
    if made.is_relative_to(out):
        # The folder itself stays: it may be where somebody stands. Last comes what
        # makes it a model, and goes first.
        names = sorted((p.name for p in made.iterdir()), key="config.json".__eq__)
        try:
            for name in names:
                (made / name).rename(out / name)
        except BaseException:
            for name in reversed(names):
                if (out / name).exists():
                    (out / name).rename(made / name)
            raise
        return
    above = [folder for folder in out.parents if not folder.exists()]
    try:
        if out.exists():
            out.rename(aside)
        out.parent.mkdir(parents=True, exist_ok=True)
        made.rename(out)
    except BaseException:
        if made.exists():  # else it is in its place
            if aside.exists():
                aside.rename(out)
            for folder in filter(Path.exists, above):
                folder.rmdir()
        raise
