"""Reads a model's headers; its tensors have the names that mergekit writes."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_metagpt.checkpoints import architecture
from mergekit_metagpt.checkpoints.files import Readers, read_header
from mergekit_metagpt.checkpoints.identity import FileIdentity, fingerprint
from mergekit_metagpt.checkpoints.stored import (
    Adapter,
    ConvertedTensor,
    FileHeader,
    StoredTensor,
    layer_key,
)

if TYPE_CHECKING:
    from mergekit.io import ShardedTensorIndex

    from mergekit_metagpt.checkpoints.ranges import RemoteFile

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The headers of an opened model, under mergekit's output names.

    Attributes:
        label: the model as its user wrote it.
        tensors: floating-point tensors by output name.
        tied_names: for an output name, the tensors that the architecture uses instead
            if it is not stored.
        identity: identities of all files when they were opened.
        model_type: from its configuration, or None.
        folder: folder of its config.json, or None for a bare file.
        others: names of stored tensors that are not floating-point.
        vocabulary: output names of tensors with an entry for each token.
        layers: number of layers of each module, if mergekit defines the architecture.
        defined: output names of all tensors of that definition.
        warning: what will be wrong with a merge that copies its configuration, or None.
        refused: why mergekit cannot plan a merge of it, or None.
        remote: readers of its files by path, if it was not downloaded.
        adapter: the LoRA adapter that it is, or None; `tensors` are then factors.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    tied_names: Mapping[str, tuple[str, ...]]
    identity: tuple[FileIdentity, ...]
    model_type: str | None = None
    folder: Path | None = None
    others: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    layers: Mapping[str, int] = field(default_factory=dict)
    defined: frozenset[str] = frozenset()
    warning: str | None = None
    refused: str | None = None
    remote: Mapping[Path, RemoteFile] = field(default_factory=dict)
    adapter: Adapter | None = None

    @functools.cached_property
    def renamed(self) -> Mapping[str, str]:
        """Output names by all names that transformers' renaming rules give to them."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        names = {name: name for name in self.tensors}
        if self.model_type is None:
            return names
        for rule in get_checkpoint_conversion_mapping(self.model_type) or ():
            if isinstance(rule, WeightRenaming):
                new = {rule.rename_source_key(n)[0]: own for n, own in names.items()}
                names = {**new, **names}
        return names

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """All names that one of its tensors may have."""
        adapted = self.adapter.factors if self.adapter else ()
        return frozenset(self.renamed).union(self.tied_names, adapted)

    @functools.cached_property
    def stored_layers(self) -> Mapping[str, tuple[StoredTensor, ...]]:
        """Tensors of each layer, by all names of the layer."""
        layers: dict[str, dict[StoredTensor, None]] = {}
        for alias, name in self.renamed.items():
            layers.setdefault(layer_key(alias), {})[self.tensors[name]] = None
        return {key: tuple(tensors) for key, tensors in layers.items()}

    @functools.cached_property
    def counterparts(self) -> weakref.WeakKeyDictionary[Checkpoint, dict[str, Any]]:
        """Results of `layouts.counterparts`, for each model that is still open."""
        return weakref.WeakKeyDictionary()

    @functools.cached_property
    def converted(self) -> dict[str, ConvertedTensor | None]:
        """Tensors that `layouts` converts from another layout, by name."""
        return {}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that a scan depends on, in hexadecimal."""
        files = []
        for file in self.identity:
            content = fingerprint(file)
            changed = 0 if content.whole else file.modified_ns
            files.append([content.name, content.size, content.digest, changed])
        header = [
            [name, tensor.name, tensor.file.name, str(tensor.dtype), tensor.shape]
            for name, tensor in sorted(self.tensors.items())
        ]
        ties = sorted(self.tied_names.items())
        text = json.dumps([files, header, ties, self.model_type])
        return hashlib.sha256(text.encode()).hexdigest()

    def first_elements(self, name: str, count: int) -> torch.Tensor:
        """Return the first `count` elements (or fewer) of a stored tensor."""
        return self._readers.read(self.tensors[name]).reshape(-1)[:count]

    @functools.cached_property
    def _readers(self) -> Readers:
        return Readers()

    def verify_unchanged(self) -> None:
        """Check that every file is the one whose header was read.

        Raises:
            OSError: a file has changed, or is gone.
        """
        for opened in self.identity:
            if opened.etag:
                continue  # on the hub: `RemoteFile` compares every answer
            try:
                current = FileIdentity.of(Path(opened.path))
            except OSError:
                current = None
            if current != opened:
                raise OSError(
                    f"{opened.path} has changed since {self.label} was opened; squared "
                    "norms and merge would be of different weights. Run the merge "
                    "again in a new process"
                )


def _shard_path(folder: Path, label: str, entry: str) -> Path:
    path = Path(os.path.normpath(folder / entry))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise ValueError(
            f"the index of {label} points outside its folder: {entry!r}; expected "
            "a file beside it. Fetch or save the model again"
        )
    return path


def read_checkpoint(
    label: str,
    index: ShardedTensorIndex,
    *,
    override: str | None,
    trust_remote_code: bool,
    bare: bool = False,
) -> Checkpoint:
    """Read headers; if `bare`, of the file only, without the config.json beside it."""
    folder = Path(index.base_path)
    places = {
        name: _shard_path(folder, label, entry)
        for name, entry in index.tensor_paths.items()
    }
    files = sorted(set(places.values()))
    headers = {file: read_header(label, file) for file in files}
    identity = tuple(FileIdentity.of(file) for file in files)
    return made_of(
        label,
        places,
        headers,
        identity,
        folder,
        override=override,
        trust=trust_remote_code,
        bare=bare,
    )


def made_of(
    label: str,
    places: Mapping[str, Path],
    headers: Mapping[Path, FileHeader],
    identity: tuple[FileIdentity, ...],
    folder: Path,
    *,
    override: str | None = None,
    trust: bool,
    bare: bool = False,
) -> Checkpoint:
    """Put the headers of a model's files together.

    `places` has the file of every tensor, by the index, and `folder` config.json, which
    is ignored if `bare`. The user may `override` the architecture in it. Raises an
    OSError if a tensor is not in the file that the index names.
    """
    lost = [n for n, file in places.items() if n not in headers[file].names]
    if lost:
        name = min(lost)
        raise OSError(
            f"{name} is not in {places[name]}, where the index of {label} has it. "
            "Fetch or save the model again"
        )
    stored = {
        tensor.name: tensor
        for header in headers.values()
        for tensor in header.tensors
        if places.get(tensor.name) == tensor.file
    }
    own, config = architecture.Architecture(), architecture.content(folder)
    model_type = warning = None
    if config.get("quantization_config"):
        warning = (
            f"{label} stores plain weights, but {folder / architecture.FILE} has a "
            "quantization_config. The merged model would get it too, and load wrongly. "
            "Remove that entry"
        )
    if not bare:
        own = architecture.architecture_of(
            label, folder, stored, override=override, trust_remote_code=trust
        )
        model_type = config.get("model_type")
        if nested := [file for file in sorted(headers) if headers[file].nested]:
            own = replace(
                own,
                refused=f"{nested[0]} of {label} holds tensors under state_dict, where "
                "mergekit does not read them. Store them by their names",
            )
    if own.refused:
        LOG.info("%s can be measured, not merged: %s", label, own.refused)
    names = {
        alias: weight.name
        for weight in own.weights
        for alias in weight.aliases or ()
        if alias in stored and weight.name not in stored
    }
    return Checkpoint(
        label=label,
        tensors={names.get(name, name): tensor for name, tensor in stored.items()},
        tied_names={w.name: tuple(w.tied_names) for w in own.weights if w.tied_names},
        identity=identity,
        model_type=model_type if isinstance(model_type, str) else None,
        folder=None if bare else folder,
        others=frozenset(places).difference(stored),
        vocabulary=own.vocabulary,
        layers=own.layers,
        defined=frozenset(w.name for w in own.weights if own.layers),
        warning=warning,
        refused=own.refused,
    )
