"""Merges a YAML as mergekit-yaml does: the whole job checked first, all or nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt import (
    card,
    exporting,
    families,
    inspecting,
    preflight,
    recipe,
)
from mergekit_metagpt.figures import report_figure

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

# What is left beside the merged model.
REPORT = "metagpt.json"
FIGURE = "metagpt.png"
PLAIN = "mergekit_config.plain.yml"


def merge(
    config_file: Path, out: Path, options: MergeOptions, *, force: bool = False
) -> None:
    """Merge with `metagpt` through mergekit; `out` appears only when it is whole.

    The YAML, the headers of all models and all weights are checked before mergekit
    starts. mergekit then finds the scan done. Beside the model lie the report of
    `inspect`, its figure, and the merge as plain YAML; the model card tells of them.

    Args:
        config_file: the merge YAML.
        out: folder for the merged model.
        options: mergekit's own.
        force: replace `out` if it exists.

    Raises:
        ValueError: the configuration or a model is refused; `out` is not empty.
        OSError: a file cannot be read or written.
    """
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    try:
        text = config_file.read_text(encoding="utf-8")
        config = recipe.read(text)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    recipe.check(config)
    out = out.resolve()
    _check_place(out, config_file, config, force=force)
    options.apply_global_options()
    LoaderCache().setup(options)
    checkpoints = preflight.check(config, options)

    found = families.of_config(config)
    report = inspecting.inspect(found, options, method=config.merge_method)
    exported = exporting.export(config, options)

    parent = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=_home(out)))
    try:
        # First what a merge of hours should not be lost to.
        beside = parent / "beside"
        beside.mkdir()
        json_text = report.model_dump_json(indent=2)
        (beside / REPORT).write_text(f"{json_text}\n", encoding="utf-8")
        (beside / PLAIN).write_text(exported.text, encoding="utf-8")
        report_figure(report, beside / FIGURE)
        about = card.section(
            report, figure=FIGURE, plain=PLAIN, changes=exported.changes
        )
        # Under the name of `out`, which mergekit makes the title of the model card.
        made = parent / "made" / out.name
        run_merge(config, str(made), options, config_source=text)
        for checkpoint in checkpoints:
            checkpoint.verify_unchanged()
        for path in beside.iterdir():
            path.rename(made / path.name)
        if options.write_model_card:
            with (made / "README.md").open("a", encoding="utf-8") as stream:
                stream.write(f"\n{about}")
        _put(made, out, aside=parent / "replaced")
    finally:
        _remove(parent)


def _home(out: Path) -> Path:
    """Where to work: a folder from which the model can be moved to its place."""
    if out.is_dir() and not any(out.iterdir()):
        return out  # it may be a disk of its own, into which nothing can be moved
    return next(folder for folder in out.parents if folder.is_dir())


def _remove(folder: Path) -> None:
    """Remove a folder, also if Ctrl-C is pressed meanwhile."""
    try:
        shutil.rmtree(folder)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise


def _check_place(
    out: Path, config_file: Path, config: MergeConfiguration, *, force: bool
) -> None:
    """Refuse an output folder that is taken, or that holds what is to be merged."""
    if out.is_file():
        raise ValueError(f"{out} is a file; expected a folder for the merged model")
    paths = [
        Path(part.path)
        for model in recipe.models(config)
        for part in (model.model, model.lora)
        if part is not None
    ]
    for path in (config_file, *paths):
        if path.resolve().is_relative_to(out):
            raise ValueError(
                f"{out} holds {path}, which this merge reads; choose another folder"
            )
    if not force and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another, or --force")


def _put(made: Path, out: Path, aside: Path) -> None:
    """Move a finished model to its place; on failure all is as it was."""
    if made.is_relative_to(out):
        # The folder itself stays: it may be where somebody stands.
        moved: list[Path] = []
        try:
            # Last what makes the folder a model.
            for path in sorted(made.iterdir(), key=lambda p: p.name == "config.json"):
                moved.append(path.rename(out / path.name))
        except BaseException:
            for path in moved:
                path.rename(made / path.name)
            raise
        return
    above = [folder for folder in out.parents if not folder.exists()]
    if out.exists():
        out.rename(aside)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made.rename(out)
    except BaseException:
        if aside.exists():
            aside.rename(out)
        for folder in filter(Path.exists, above):
            folder.rmdir()
        raise
