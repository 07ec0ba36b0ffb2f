"""Merges a YAML as mergekit-yaml does: the whole job checked first, all or nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt import recipe
from mergekit_metagpt.alignment import check_pair
from mergekit_metagpt.checkpoints import open_checkpoint
from mergekit_metagpt.registration import register
from mergekit_metagpt.scanning import pair_norms

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


def merge(
    config_file: Path, out: Path, options: MergeOptions, *, force: bool = False
) -> None:
    """Merge with `metagpt` through mergekit; `out` appears only when it is whole.

    The YAML, the headers of all models and (where the coefficients need them) all
    weights are checked before mergekit starts. mergekit then finds the scan done.

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

    text = config_file.read_text(encoding="utf-8")
    try:
        config = recipe.read(text)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    recipe.check(config)
    if not force and out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another, or --force")
    options.apply_global_options()
    register()
    LoaderCache().setup(options)
    _check_models(config, options)

    out.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        # Under the name of `out`, which mergekit makes the title of the model card.
        run_merge(config, str(parent / out.name), options, config_source=text)
        if out.exists():
            out.rename(parent / "replaced")
        (parent / out.name).rename(out)
    finally:
        shutil.rmtree(parent)


def _check_models(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check headers of all models first, then all weights that a scan reads."""

    checkpoints = {
        model: open_checkpoint(
            model,
            lora_merge_cache=options.lora_merge_cache,
            transformers_cache=options.transformers_cache,
        )
        for model in recipe.models(config)
    }
    jobs = []
    for part in recipe.inputs(config):
        if part.base is None:
            continue
        tuned = [checkpoints[model] for model in part.models if model != part.base]
        for model in tuned:
            check_pair(checkpoints[part.base], model)
        if tuned and recipe.needs_scan(part):
            jobs.append((checkpoints[part.base], tuned))
    for base, tuned in jobs:
        pair_norms(base, tuned)
