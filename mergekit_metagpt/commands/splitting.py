"""Merges a YAML by all ranks of a job; OUT appears only once all have finished."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.commands import merging, placing, shards
from mergekit_metagpt.commands.errors import in_one_line
from mergekit_metagpt.merge_config import (
    checks,
    dividing,
    jobs,
    merge_yaml,
    replaying,
    running,
)
from mergekit_metagpt.scanning import dealing, once, ranks, sharing

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")


@dataclass(frozen=True)
class _Checked:
    """A checked merge by any method; `prepared` if the method is one of ours."""

    text: str
    job: jobs.Job
    prepared: merging.Prepared | None


def merge(
    config_file: Path,
    out: Path,
    options: MergeOptions,
    group: ranks.Group,
    *,
    force: bool = False,
    resume: bool = False,
) -> bool:
    """Merge by all ranks, as `merging.merge`; False if `out` was already complete."""
    text, config = merge_yaml.read_file(config_file)
    checks.check_method(config)
    dividing.check_shared(config, options)
    out = out.resolve()
    folder = group.share(placing.parts(out))
    done = group.leads and resume and not force and _is_complete(out, text, folder)
    if group.share(done):
        return False
    if group.leads:
        inside = folder.name if folder.parent == out else None
        placing.require_free(out, config_file, config, force=force, ignoring=inside)
        if not resume:
            shards.require_none(folder)
    options.apply_global_options()
    ours = config.merge_method in checks.METHODS
    with sharing.leader_first():
        if ours:
            job = jobs.check(config, options, config_file)
        else:
            job = jobs.check_any(config, options)
    if group.leads:
        finished = sum(file.bytes for file in shards.finished(folder).values())
        placing.require_space(out, job, finished)
    checked = _Checked(text, job, merging.prepare(job, options) if ours else None)
    digest = dividing.digest(config, options, job.opened)
    group.require_same(digest, "models, options, threads or versions of packages")
    with _announced(checked):
        parts = dividing.parts_of(config, options, job.planned, job.opened)
    owners = dealing.owners([part.read + part.written for part in parts], group.size)
    dealt = list(dividing.shards_of(parts, owners, options.out_shard_size, digest))
    token, about = secrets.token_hex(16), ""
    try:
        if group.leads:
            about = _set_up(folder, out, token, checked)
        token = group.share(token)
        shards.await_token(folder, token, group)
        group.gather(None)  # wait until all see it before hours of merging
        reused = group.share(shards.finished(folder) if group.leads else {})
        mine = [shard for shard in dealt if shard.rank == group.rank]
        estimated = bool(checked.prepared and checked.prepared.report.estimated)
        with sharing.among(None), once.again(estimated=estimated):
            manifests = shards.write(
                parts,
                mine,
                folder,
                _of_rank(options, group),
                group,
                token=token,
                reused=reused,
            )
        for checkpoint in job.opened.values():
            checkpoint.verify_unchanged()
        written = [m for of_rank in group.gather(manifests) for m in of_rank]
    except BaseException:
        # Without a finished file there is nothing to go on from.
        held = group.leads and shards.holds(folder, token)
        if held and not shards.manifest_files(folder):
            with suppress(OSError):  # others may still be writing there
                placing.remove(folder, out)
        raise
    if group.leads:
        made = _completed(checked, options, written, folder, out, about)
        placing.put(made, out, folder, force=force)
        try:
            placing.remove(folder, out)
        finally:  # a single Ctrl-C never leaves it behind
            placing.remove(folder, out)
    group.share(None)  # the others wait, so that they end as rank 0 does
    return True


def _is_complete(out: Path, text: str, folder: Path) -> bool:
    """Whether `out` is a whole model with this YAML, and no file waits to be used.

    Raises a ValueError if it is one with another YAML, or if files of it are missing,
    cut short or corrupt.
    """
    copy = out / "mergekit_config.yml"
    if (
        not (out / "config.json").is_file()  # comes last
        or not copy.is_file()
        or shards.finished(folder)
    ):
        return False
    same = copy.read_text(encoding="utf-8") == text
    try:
        replaying.open_result(out)
    except (OSError, ValueError) as error:
        if not same:
            return False
        raise ValueError(
            f"{out} was merged from this YAML, but is not whole: {in_one_line(error)}. "
            "Give --force to merge it again"
        ) from error
    if not same:
        raise ValueError(
            f"{out} is complete, but was merged from another YAML ({copy}): there is "
            "nothing to resume. Choose another folder, or replace it with --force"
        )
    return True


def _set_up(folder: Path, out: Path, token: str, checked: _Checked) -> str:
    """Make the folder in which all ranks work; return our section of the card."""
    placing.restore(folder, out)
    shards.take_apart(folder, folder / "made" / out.name)
    for name in ("made", "beside"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / shards.TOKEN).write_text(token)
    if not checked.prepared:
        return ""
    # Write these first: they should fail before hours of merging, not after.
    return checked.prepared.write_beside(folder / "beside")


def _announced(checked: _Checked) -> AbstractContextManager[None]:
    """Keep our method from logging again, while it is planned, what was logged."""
    return running.already_warned(
        checked.job.config, warned=bool(checked.prepared and checked.prepared.warned)
    )


def _of_rank(options: MergeOptions, group: ranks.Group) -> MergeOptions:
    """Give each rank of a node a GPU of its own."""
    if options.device != "cuda" or not torch.cuda.is_available():
        return options
    number = ranks.local()[0] % torch.cuda.device_count()
    return options.model_copy(update={"device": f"cuda:{number}"})


def _completed(
    checked: _Checked,
    options: MergeOptions,
    written: Sequence[shards.Manifest],
    folder: Path,
    out: Path,
    about: str,
) -> Path:
    """Make the model of the files that all ranks have written; return its folder."""
    made = folder / "made" / out.name
    made.mkdir(parents=True)
    config = checked.job.config
    running.run_without_tensors(config, str(made), options, source=checked.text)
    shards.assemble(written, folder, made, safe=options.safe_serialization)
    if checked.prepared:
        checked.prepared.complete(made, folder / "beside", about, options)
    return made
