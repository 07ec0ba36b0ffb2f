"""Makes a merged model in a hidden folder and moves it to its place, all or nothing."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.merge_config import dividing, jobs, merge_yaml

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

# Where an old model lies in the hidden folder while the new one takes its place.
ASIDE = "replaced"


def require_free(
    out: Path,
    config_file: Path,
    config: MergeConfiguration,
    *,
    force: bool,
    ignoring: str | None = None,
) -> None:
    """Refuse an output folder that is taken, holds an input or lies in one.

    Also refuses one beside which no folder can be made to work in.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; expected a folder for merged models")
    paths = [
        Path(part.path)
        for model in merge_yaml.models(config)
        for part in (model.model, model.lora)
        if part is not None
    ]
    for path in (config_file, *paths):
        read = path.resolve()
        within = read.is_dir() and out.is_relative_to(read)
        if within or read.is_relative_to(out):
            raise ValueError(
                f"{out} {'lies in' if within and out != read else 'holds'} {read}, "
                "which this merge reads; choose another folder"
            )
    if force:
        _require_replaceable(out, ignoring)
    else:
        _require_empty(out, ignoring)
    place = out if ignoring else home(out)
    try:
        with workplace(out, place):
            pass
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written: no folder can be made in {place} to work in "
            f"({error.strerror}). Choose another place or name"
        ) from error


def require_space(out: Path, job: jobs.Job, done: int = 0) -> None:
    """Refuse a merge whose tensors would not fit on the disk.

    Args:
        out: folder for the merged model.
        job: the checked merge.
        done: bytes of it that are written already.
    """
    size = sum(dividing.written(job.config, t, job.opened) for t in job.planned)
    place = home(out)
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < size - done:  # some systems tell nothing
        raise ValueError(
            f"the merged model takes {size / 1e9:.2f} GB, and {place} has only "
            f"{disk.free / 1e9:.2f} GB free. Make room, or choose another disk"
        )


def _require_replaceable(out: Path, ignoring: str | None) -> None:
    """Refuse to replace what is no model and has folders, such as one of models."""
    if not out.exists() or (out / "config.json").exists():
        return
    for path in sorted(out.iterdir()):
        ours = path.name == ignoring or path.name.startswith(f".{out.name}.")
        if path.is_dir() and not ours:
            raise ValueError(
                f"{out} is no model, and --force would remove the folder {path.name} "
                "in it; choose another folder, or remove it yourself"
            )


class Taken(ValueError):
    """An output folder that is not empty."""


def _require_empty(out: Path, ignoring: str | None) -> None:
    """Refuse an output folder that holds anything but what is ignored."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names - {ignoring}:
        raise Taken(
            f"{out} exists and is not empty; choose another, or replace all that it "
            "holds with --force"
        )


@contextmanager
def workplace(out: Path, place: Path | None = None) -> Iterator[Path]:
    """Make a hidden folder to work in, beside `out`, and remove it afterwards."""
    # It is named before it is made and removed twice, so that a single Ctrl-C never
    # leaves it behind.
    folder = (place or home(out)) / f".{out.name}.{secrets.token_urlsafe(6)}"
    try:
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            remove(folder, out)
    finally:
        remove(folder, out)


def restore(folder: Path, out: Path) -> None:
    """Put an old model in a workplace back, if no new one has taken its place."""
    if (folder / ASIDE).exists() and not out.exists():
        (folder / ASIDE).rename(out)


def remove(folder: Path, out: Path) -> None:
    """Remove a workplace, after `restore`."""
    restore(folder, out)
    if folder.exists():
        shutil.rmtree(folder)


def home(out: Path) -> Path:
    """The folder for a workplace, from which a model can be renamed to `out`."""
    if out.is_dir() and not any(out.iterdir()):
        return out  # it may be a mount point, onto which nothing can be renamed
    return next(folder for folder in out.parents if folder.is_dir())


def parts(out: Path) -> Path:
    """The folder in which ranks work: beside `out`, or in it if that is empty."""
    name = f".{out.name}.parts"
    inside = out.is_dir() and (out / name).is_dir()
    return out / name if inside else home(out) / name


def put(made: Path, out: Path, workplace: Path, *, force: bool) -> None:
    """Move a finished model to `out`; on failure, leave everything as it was.

    Raises `Taken` if another run has filled `out` meanwhile, unless `force`; an OSError
    if a file cannot be moved.
    """
    aside = workplace / ASIDE
    if not force:
        _require_empty(out, workplace.name)
    if made.is_relative_to(out):
        # Keep the folder: a mount point, or somebody's working directory. Move
        # config.json last, which makes it a model; on failure take it back first.
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
