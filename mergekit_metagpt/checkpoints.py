"""Opens base and models: their headers, under the names that mergekit writes."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt import model_config
from mergekit_metagpt.archives import Archive
from mergekit_metagpt.files import (
    FileIdentity,
    Readers,
    StoredTensor,
    check_regular,
    quantised,
    read_header,
)

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex
    from mergekit.options import MergeOptions

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The header of an opened model: what is stored, under mergekit's output names.

    Attributes:
        label: the model as its user wrote it.
        tensors: floating-point tensors by output name.
        tied_names: for an output name, the weights that stand in for it when it is
            not stored, by the architecture.
        identity: of every file, when it was opened.
        model_type: by its configuration, or None.
        written: output names by mergekit's definition of the architecture, or None
            where it has none and writes what the inputs store.
        layers: how many there are by the configuration, by the name of the module,
            where mergekit has a definition.
        refused: why mergekit could not plan a merge of it, though it can be measured.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    tied_names: Mapping[str, tuple[str, ...]]
    identity: tuple[FileIdentity, ...]
    model_type: str | None = None
    written: frozenset[str] | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    refused: str | None = None

    @functools.cached_property
    def renamed(self) -> Mapping[str, str]:
        """Output names by every name that transformers' renaming rules give them."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = {name: name for name in self.tensors}
        if self.model_type is None:
            return found
        for rule in get_checkpoint_conversion_mapping(self.model_type) or ():
            if isinstance(rule, WeightRenaming):
                new = {rule.rename_source_key(n)[0]: own for n, own in found.items()}
                found = {**new, **found}
        return found

    def first_elements(self, name: str, count: int) -> torch.Tensor:
        """Return up to `count` leading elements of a stored tensor, flattened."""
        return self._readers.read(self.tensors[name]).reshape(-1)[:count]

    @functools.cached_property
    def _readers(self) -> Readers:
        return Readers()

    def verify_unchanged(self) -> None:
        """Check that every file is the one whose header was read.

        Raises:
            OSError: a file has changed, or is gone.
        """
        for known in self.identity:
            try:
                current = FileIdentity.of(Path(known.path))
            except OSError:
                current = None
            if current != known:
                raise OSError(
                    f"{known.path} has changed since {self.label} was opened; the "
                    "squared norms and the merge would be of different weights. Run "
                    "the merge again in a new process"
                )


# What mergekit looks for, in its order; an index goes before the single file.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def _index(label: str, folder: Path) -> ShardedTensorIndex:
    from mergekit.io import ShardedTensorIndex

    found = (folder / name for name in _WEIGHTS if (folder / name).exists())
    file = next(found, folder)
    if file.suffix == ".bin":
        Archive.of(file)  # before torch crashes on what this refuses
    try:
        return ShardedTensorIndex.from_disk(str(folder))
    except Exception as error:
        raise OSError(
            f"{file} cannot be read: {error}. It is truncated or corrupt: fetch it "
            "again"
        ) from error


def _check_files(folder: Path) -> None:
    """Refuse pipes and devices before anybody waits for what they say."""
    for path in folder.iterdir() if folder.is_dir() else ():
        check_regular(path)


def _shard_path(folder: Path, label: str, entry: str) -> Path:
    path = Path(os.path.normpath(folder / entry)) if isinstance(entry, str) else None
    if path is None or not path.is_relative_to(os.path.normpath(folder)):
        raise ValueError(
            f"the index of {label} points outside its folder: {entry!r}; expected "
            "a file beside it. Fetch the model again"
        )
    return path


def _read_header(
    label: str,
    index: ShardedTensorIndex,
    *,
    override: str | None,
    trust_remote_code: bool,
    bare: bool = False,
) -> Checkpoint:
    """Read headers; of a `bare` file, nothing that may lie beside it."""
    folder = Path(index.base_path)
    config = model_config.content(folder)
    if config.get("quantization_config"):
        file = folder / model_config.FILE
        raise quantised(label, f"{file} has a quantization_config")
    if not isinstance(index.tensor_paths, dict):
        raise OSError(
            f"the index of {label} holds a {type(index.tensor_paths).__name__}; "
            "expected files by the names of tensors. Fetch the model again"
        )
    if not bare:
        model_config.check_counts(label, folder, config, len(index.tensor_paths))

    places = {
        name: _shard_path(folder, label, entry)
        for name, entry in index.tensor_paths.items()
    }
    files = sorted(set(places.values()))
    headers = {file: read_header(label, file) for file in files}
    lost = [n for n, file in places.items() if n not in headers[file].names]
    if lost:
        name = min(lost)
        raise OSError(
            f"{name} is said to be in {places[name]} by the index of {label}, but is "
            "not. Fetch the model again"
        )
    stored = {
        tensor.name: tensor
        for header in headers.values()
        for tensor in header.tensors
        if places.get(tensor.name) == tensor.file
    }
    known = model_config.Architecture()
    model_type = None
    if not bare:
        known = model_config.architecture(
            label,
            folder,
            stored,
            override=override,
            trust_remote_code=trust_remote_code,
        )
        model_type = config.get("model_type")
        if nested := [file for file in files if headers[file].nested]:
            known = replace(
                known,
                refused=f"{nested[0]} of {label} holds tensors under state_dict, where "
                "mergekit does not read them. Store them by their names",
            )
    if known.refused:
        LOG.info("%s can be measured, not merged: %s", label, known.refused)
    names = {
        alias: weight.name
        for weight in known.weights
        for alias in weight.aliases or ()
        if alias in stored and weight.name not in stored
    }
    return Checkpoint(
        label=label,
        tensors={names.get(name, name): tensor for name, tensor in stored.items()},
        tied_names={w.name: tuple(w.tied_names) for w in known.weights if w.tied_names},
        identity=tuple(FileIdentity.of(file) for file in files),
        model_type=model_type if isinstance(model_type, str) else None,
        written=frozenset(w.name for w in known.weights) if known.defined else None,
        layers=known.layers,
        refused=known.refused,
    )


_BY_LOADER: weakref.WeakKeyDictionary[LazyTensorLoader, Checkpoint] = (
    weakref.WeakKeyDictionary()
)
_BY_LOADER_LOCK = threading.Lock()


def already_open(model: Hashable) -> Checkpoint | None:
    """Return the checkpoint behind a merge input if mergekit has opened it.

    Never opens or downloads a model itself. The header is read once per loader.

    Args:
        model: the id of a tensor entry: a `ModelReference` in a merge from files.

    Returns:
        the checkpoint, or None where the id stands for no open checkpoint.

    Raises:
        ValueError: the checkpoint is quantised or its index leaves its folder.
        OSError: a shard is missing, truncated or corrupt.
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
            _BY_LOADER[loader] = _read_header(
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
) -> Checkpoint:
    """Open a model as mergekit does, reading headers only.

    Args:
        model: local folder, hub repository or `ModelReference`; `model+adapter` for a
            LoRA, which is merged into `lora_merge_cache` first.
        lora_merge_cache: folder for merged adapters, needed for LoRA models.
        transformers_cache: folder of downloaded models.
        trust_remote_code: run code that comes with a model, for its architecture.

    Returns:
        the checkpoint's header.

    Raises:
        ValueError: no model there, a bare LoRA adapter, a quantised model; billions of
            layers.
        OSError: a file of it is missing, truncated or corrupt.
    """
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(model, ModelReference):
        model = ModelReference.parse(os.fspath(model))
    label, path = str(model), Path(model.model.path)
    if path.is_file():
        raise ValueError(f"{label} is a file; expected a model's folder")
    if path.is_dir() and not any((path / name).exists() for name in _WEIGHTS):
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{label} is a bare LoRA adapter; write it as base+adapter "
                f"(BASE+{label}) and give --lora-merge-cache FOLDER"
            )
        raise ValueError(
            f"{label} holds no weights; expected model.safetensors or "
            "pytorch_model.bin, or their .index.json"
        )
    if not path.exists() and (path.is_absolute() or label.startswith((".", "~"))):
        raise ValueError(f"{label} does not exist; expected a model's folder")
    if model.lora and not lora_merge_cache:
        raise ValueError(f"{label} has a LoRA adapter; give --lora-merge-cache FOLDER")
    for part in (model.model, model.lora):
        if part is not None:
            _check_files(Path(part.path))
    merged = model.merged(
        cache_dir=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        lora_merge_dtype=LoaderCache().lora_merge_dtype,
    )
    try:
        folder = Path(merged.local_path(transformers_cache))
    except Exception as error:
        raise ValueError(
            f"{label} is no folder here (if one was meant, write ./{label}), nor to be "
            f"had from the hub: {error}"
        ) from error
    _check_files(folder)
    return _read_header(
        label,
        _index(label, folder),
        override=model.override_architecture,
        trust_remote_code=trust_remote_code,
    )


def open_checkpoints(
    models: Iterable[ModelReference], options: MergeOptions
) -> dict[ModelReference, Checkpoint]:
    """Open models as mergekit does with these options, reading headers only.

    Args:
        models: references; each is opened once.
        options: mergekit's own.

    Returns:
        the headers by model.

    Raises:
        ValueError: as `open_checkpoint`.
        OSError: as `open_checkpoint`.
    """
    return {
        model: open_checkpoint(
            model,
            lora_merge_cache=options.lora_merge_cache,
            transformers_cache=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        )
        for model in dict.fromkeys(models)
    }
