"""Opens models, reading headers only, or finds those that mergekit has open."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint, read_checkpoint
from mergekit_metagpt.checkpoints.hub import explained, require_repository
from mergekit_metagpt.checkpoints.lora import merged_copy, require_current
from mergekit_metagpt.checkpoints.nearby import is_local, missing
from mergekit_metagpt.checkpoints.stored import corrupt

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex
    from mergekit.options import MergeOptions

# The files that mergekit looks for, in its order: an index comes before a single file.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def _index(folder: Path) -> ShardedTensorIndex:
    from mergekit.io import ShardedTensorIndex

    try:
        return ShardedTensorIndex.from_disk(str(folder))
    except Exception as error:
        files = (folder / name for name in WEIGHTS if (folder / name).exists())
        raise corrupt(next(files, folder), error) from error


_BY_LOADER: weakref.WeakKeyDictionary[LazyTensorLoader, Checkpoint] = (
    weakref.WeakKeyDictionary()
)
_BY_LOADER_LOCK = threading.Lock()


def already_open(model: Hashable) -> Checkpoint | None:
    """Return the checkpoint behind the id of a tensor entry, if mergekit has it open.

    Never opens or downloads a model itself. The header is read once per loader. Raises
    a ValueError if the checkpoint is quantised or its index leaves its folder; an
    OSError if a shard is missing, truncated or corrupt.
    """
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(model, ModelReference):
        return None
    loader = LoaderCache.loaders.get(model)
    raw_files = sys.modules.get("mergekit.scripts.merge_raw_pytorch")
    bare = loader is None
    if bare and raw_files is not None:
        loader = raw_files.SimpleLoaderCache().loaders.get(model.model.path)
    if loader is None:
        return None
    with _BY_LOADER_LOCK:
        if loader not in _BY_LOADER:
            if model.lora and not bare:
                require_current(model, Path(loader.index.base_path))
            _BY_LOADER[loader] = read_checkpoint(
                str(model),
                loader.index,
                override=model.override_architecture,
                trust_remote_code=LoaderCache().trust_remote_code,
                bare=bare,
            )
        return _BY_LOADER[loader]


def open_checkpoint(
    model: str | os.PathLike[str] | ModelReference,
    *,
    lora_merge_cache: str | None = None,
    transformers_cache: str | None = None,
    trust_remote_code: bool = False,
    base: ModelReference | str | None = None,
) -> Checkpoint:
    """Open a model as mergekit does, reading headers only.

    Args:
        model: local folder, hub repository or `ModelReference`; `model+adapter` for a
            LoRA, which is merged into `lora_merge_cache` first.
        lora_merge_cache: folder for merged adapters, needed for LoRA models.
        transformers_cache: folder of downloaded models.
        trust_remote_code: run code that comes with a model, for its architecture.
        base: base of the merge, for messages.

    Returns:
        the checkpoint.

    Raises:
        ValueError: the model does not exist, is a bare LoRA adapter, or is quantised.
        OSError: a file is missing, truncated or corrupt.
    """
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(model, ModelReference):
        model = ModelReference.parse(os.fspath(model))
    label, path = str(model), Path(model.model.path)
    if path.is_file():
        raise ValueError(f"{label} is a file; expected a model's folder")
    if path.is_dir() and not any((path / name).exists() for name in WEIGHTS):
        if (path / "adapter_config.json").is_file():
            whole = f"{'BASE' if base in (None, model) else base}+{label}"
            raise ValueError(
                f"{label} is a bare LoRA adapter; write it as base+adapter "
                f"({whole}) and give --lora-merge-cache FOLDER"
            )
        raise ValueError(
            f"{label} holds no weights; expected model.safetensors or "
            "pytorch_model.bin, or their .index.json"
        )
    if not path.exists() and is_local(model.model.path):
        raise ValueError(missing(label, "a model's folder", folders=True))
    if model.lora:
        if not lora_merge_cache:
            raise ValueError(
                f"{label} has a LoRA adapter; give --lora-merge-cache FOLDER"
            )
        folder = merged_copy(
            model,
            lora_merge_cache,
            trust_remote_code=trust_remote_code,
            dtype=LoaderCache().lora_merge_dtype,
        )
    elif path.exists():
        folder = path
    else:
        require_repository(model.model.path, model.model.revision)
        folder = explained(label, lambda: Path(model.local_path(transformers_cache)))
    return read_checkpoint(
        label,
        _index(folder),
        override=model.override_architecture,
        trust_remote_code=trust_remote_code,
    )


def is_adapter_of(model: ModelReference, base: ModelReference) -> bool:
    """Whether a model is given as this base plus an adapter.

    Not so if the adapter is of another model, or the base has an adapter itself.
    """
    if model.lora is None or base.lora is not None:
        return False
    ours, theirs = model.model, base.model
    paths = (os.path.realpath(place.path) for place in (ours, theirs))
    return ours == theirs or (Path(ours.path).is_dir() and len({*paths}) == 1)


def unopened(label: str) -> Checkpoint:
    """Return a checkpoint without tensors, for a base known only by its name."""
    return Checkpoint(label=label, tensors={}, tied_names={}, identity=())


def open_checkpoints(
    models: Iterable[ModelReference],
    options: MergeOptions,
    base: ModelReference | None = None,
) -> dict[ModelReference, Checkpoint]:
    """Open each model once as mergekit does, with its options, reading headers only.

    Messages name the `base` of the merge. Raises as `open_checkpoint`.
    """
    from mergekit.io.tasks import LoaderCache

    LoaderCache().setup(options)  # sets the precision in which adapters are merged
    models = list(dict.fromkeys(models))
    for place in (model.lora for model in models):
        # Before the first adapter is merged into its base.
        if place and is_local(place.path) and not Path(place.path).is_dir():
            raise ValueError(missing(place.path, "an adapter's folder", folders=True))
    return {
        model: open_checkpoint(
            model,
            lora_merge_cache=options.lora_merge_cache,
            transformers_cache=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
            base=base,
        )
        for model in models
    }


@contextmanager
def planned_as_bases(
    bases: Mapping[ModelReference, ModelReference],
    opened: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> Iterator[Mapping[ModelReference, Checkpoint]]:
    """Let mergekit plan with bases in place of their adapters.

    Otherwise mergekit would merge each adapter into its base first. That copy has the
    names, shapes and precisions of the base. Yields the headers to plan with.
    """
    from mergekit.io.tasks import LoaderCache

    headers = {**opened, **{model: opened[base] for model, base in bases.items()}}
    hand_to_mergekit({base: opened[base] for base in bases.values()}, options)
    lent = [model for model in bases if model not in LoaderCache.loaders]
    for model in lent:
        LoaderCache.loaders[model] = LoaderCache().get(bases[model])
    try:
        yield headers
    finally:
        for model in lent:
            del LoaderCache.loaders[model]


def hand_to_mergekit(
    opened: Mapping[ModelReference, Checkpoint], options: MergeOptions
) -> None:
    """Let mergekit open the same models, so that their headers are not read again."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache().setup(options)
    for model, checkpoint in opened.items():
        new = model not in LoaderCache.loaders
        loader = LoaderCache().get(model)
        if new:  # an old loader may hold an earlier version of the files
            with _BY_LOADER_LOCK:
                _BY_LOADER[loader] = checkpoint
