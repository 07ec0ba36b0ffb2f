"""Opens base and models: their headers, under the names that mergekit writes."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.files import (
    FileIdentity,
    Readers,
    StoredTensor,
    quantised,
    read_header,
)

if TYPE_CHECKING:
    from mergekit.architecture import WeightInfo
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
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    tied_names: Mapping[str, tuple[str, ...]]
    identity: tuple[FileIdentity, ...]
    model_type: str | None = None
    written: frozenset[str] | None = None

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

    try:
        return ShardedTensorIndex.from_disk(str(folder))
    except Exception as error:
        found = (folder / name for name in _WEIGHTS if (folder / name).exists())
        file = next(found, folder)
        raise OSError(
            f"{file} cannot be read: {error}. It is truncated or corrupt: fetch it "
            "again"
        ) from error


def _shard_path(folder: Path, label: str, entry: str) -> Path:
    path = Path(os.path.normpath(folder / entry))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise ValueError(
            f"the index of {label} points outside its folder: {entry!r}; expected "
            "a file beside it. Fetch the model again"
        )
    return path


def _read_header(
    label: str,
    index: ShardedTensorIndex,
    *,
    trust_remote_code: bool,
    bare: bool = False,
) -> Checkpoint:
    """Read headers; of a `bare` file, nothing that may lie beside it."""
    folder = Path(index.base_path)
    config_file = folder / "config.json"
    try:
        config = dict(json.loads(config_file.read_bytes()))
    except (OSError, ValueError, TypeError):
        config = {}
    if config.get("quantization_config"):
        raise quantised(label, f"{config_file} has a quantization_config")

    files = sorted({_shard_path(folder, label, s) for s in index.tensor_paths.values()})
    headers = [read_header(label, file) for file in files]
    held = frozenset[str]().union(*(header.names for header in headers))
    if lost := sorted(index.tensor_paths.keys() - held):
        raise OSError(
            f"{lost[0]} is named by the index of {label}, but no file holds it. Fetch "
            "the model again"
        )
    stored = {
        tensor.name: tensor
        for header in headers
        for tensor in header.tensors
        if tensor.name in index.tensor_paths
    }
    weights, defined = (
        ([], False) if bare else _architecture(folder, stored, trust_remote_code)
    )
    names = {
        alias: weight.name
        for weight in weights
        for alias in weight.aliases or ()
        if alias in stored and weight.name not in stored
    }
    return Checkpoint(
        label=label,
        tensors={names.get(name, name): tensor for name, tensor in stored.items()},
        tied_names={w.name: tuple(w.tied_names) for w in weights if w.tied_names},
        identity=tuple(FileIdentity.of(file) for file in files),
        model_type=None if bare else config.get("model_type"),
        written=frozenset(weight.name for weight in weights) if defined else None,
    )


def _architecture(
    folder: Path, stored: Mapping[str, StoredTensor], trust_remote_code: bool
) -> tuple[list[WeightInfo], bool]:
    """Weights by mergekit's definition, or transformers' ties and False without one."""
    import transformers
    from mergekit.architecture import WeightInfo, arch_info_for_config

    if not (folder / "config.json").is_file():
        return [], False
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code
        )
        if architecture := arch_info_for_config(config):
            return architecture.all_weights(config), True
        model_class = getattr(transformers, config.architectures[0], None)
        ties = getattr(model_class, "_tied_weights_keys", None)
    except Exception as error:
        # mergekit cannot plan such a merge; bare files and our own scan still can.
        LOG.info("no architecture known for %s: %s", folder, error)
        return [], False
    tied = [
        WeightInfo(name=name, tied_names=(source,))
        for name, source in (ties.items() if isinstance(ties, dict) else ())
        if source in stored
    ]
    return tied, False


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
        ValueError: no model there, a bare LoRA adapter, a quantised model.
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
    merged = model.merged(
        cache_dir=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        lora_merge_dtype=LoaderCache().lora_merge_dtype,
    )
    try:
        folder = Path(merged.local_path(transformers_cache))
    except Exception as error:
        raise ValueError(
            f"{label} is no folder here, nor to be had from the hub: {error}"
        ) from error
    return _read_header(
        label, _index(label, folder), trust_remote_code=trust_remote_code
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
