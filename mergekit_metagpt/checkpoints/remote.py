"""Reads configuration and headers of models on the hub, without downloading weights."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.checkpoints import adapters, architecture
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint, made_of
from mergekit_metagpt.checkpoints.files import classified
from mergekit_metagpt.checkpoints.hub import explained, require_repository
from mergekit_metagpt.checkpoints.identity import FileIdentity, hub_revision
from mergekit_metagpt.checkpoints.opening import WEIGHTS, open_checkpoint
from mergekit_metagpt.checkpoints.ranges import (
    AT_ONCE,
    TIMEOUT_S,
    RemoteFile,
    request,
)
from mergekit_metagpt.checkpoints.stored import FileHeader, quantised

if TYPE_CHECKING:
    from mergekit.common import ModelReference


@dataclass(frozen=True)
class Glimpse:
    """A model's configuration and headers.

    Attributes:
        checkpoint: the headers; without a folder if they were read from the hub.
        commit: of a repository; None for a local folder.
        download: bytes to download for a merge; 0 for a local folder.
        quantised: a sentence on what is quantised in it, or None.
    """

    checkpoint: Checkpoint
    commit: str | None = None
    download: int = 0
    quantised: str | None = None


def open_adapter(model: ModelReference) -> Checkpoint:
    """Open a LoRA adapter; from the hub it is downloaded whole, as it is small.

    Args:
        model: `base+adapter`, or an adapter alone; folders or `repository@revision`.

    Returns:
        a checkpoint of factors.

    Raises:
        ValueError: there is no adapter, or its task vector is not such a product.
        OSError: the repository or a file of it cannot be read.
    """
    place, label = model.lora or model.model, str(model)
    if not adapters.is_at_hand(place.path, place.revision):
        require_repository(place.path, place.revision)
    fetch = functools.partial(adapters.adapter_folder, place.path, place.revision)
    folder = explained(str(place), fetch)
    if not folder.is_dir():
        raise ValueError(f"{place} does not exist; expected an adapter's folder")
    return adapters.read_adapter(label, folder)


def _glimpse_adapter(model: ModelReference) -> Glimpse:
    opened = open_adapter(model)
    assert opened.adapter is not None
    return Glimpse(opened, hub_revision(opened.adapter.folder))


def glimpse(
    model: ModelReference, *, is_own_adapter: bool = False, **options: Any
) -> Glimpse:
    """Read configuration and headers of a local folder or a hub repository.

    Args:
        model: a folder or `repository@revision`.
        is_own_adapter: whether it is an adapter of the base it is measured against.
        **options: of `open_checkpoint`, for local folders.

    Returns:
        the model; its weights are not downloaded.

    Raises:
        ValueError: it stores pickles, which cannot be read in part, or is an adapter
            of another base.
        OSError: the repository or a file of it cannot be read.
    """
    if is_own_adapter:
        return _glimpse_adapter(model)
    label, path = str(model), Path(model.model.path)
    if path.exists() or path.is_absolute() or label.startswith((".", "~")):
        return Glimpse(open_checkpoint(model, **options))
    if model.lora:
        raise ValueError(
            f"{label} has a LoRA adapter of another model than the base, which cannot "
            "be merged remotely. Leave out --remote, or name the adapter's merged model"
        )
    return explained(label, functools.partial(_glimpse, model))


def _glimpse(model: ModelReference) -> Glimpse:
    from huggingface_hub import HfApi, hf_hub_url

    label, repository = str(model), model.model.path
    info = HfApi().model_info(
        repository, revision=model.model.revision, timeout=TIMEOUT_S
    )
    commit, names = str(info.sha), {f.rfilename for f in info.siblings or ()}

    def place(name: str) -> Path:
        return Path(repository, "resolve", commit, name)

    def remote(name: str) -> RemoteFile:
        url = hf_hub_url(repository, name, revision=commit)
        return RemoteFile(str(place(name)), url)

    def content(name: str) -> bytes:
        file = remote(name)
        return request(file.label, file.url, None).content

    weights = next((name for name in WEIGHTS if name in names), "")
    if not weights and adapters.CONFIG in names:
        return _glimpse_adapter(model)
    if not weights.startswith("model.safetensors"):
        raise ValueError(_nothing_to_read(label, weights))
    config = content(architecture.FILE) if architecture.FILE in names else None
    places: dict[str, str] | None = None
    if weights.endswith(".index.json"):
        places = _weight_map(label, content(weights), names)
    files = {name: remote(name) for name in sorted(set((places or {}).values()))}
    if places is None:
        files = {weights: remote(weights)}
    with ThreadPoolExecutor(AT_ONCE) as executor:
        read = executor.map(RemoteFile.read_header, files.values())
        entries = dict(zip(files, read, strict=True))
    if places is None:
        places = dict.fromkeys(entries[weights], weights)
    packed, headers = None, {}
    for name, of_file in entries.items():
        kinds = ((n, e["dtype"], tuple(e["shape"])) for n, e in of_file.items())
        floats, odd = classified(place(name), kinds)
        headers[place(name)] = FileHeader(frozenset(of_file), tuple(floats))
        packed = packed or odd
    checkpoint = _checkpoint(
        label,
        {name: place(file) for name, file in places.items()},
        headers,
        [_identity(place(name), file, commit) for name, file in files.items()],
        config,
    )
    method = architecture.quantisation(config)
    return Glimpse(
        checkpoint=replace(
            checkpoint, remote={place(name): file for name, file in files.items()}
        ),
        commit=commit,
        download=sum(file.size or 0 for file in files.values()),
        quantised=str(quantised(label, packed)) if packed else method,
    )


def _nothing_to_read(label: str, weights: str) -> str:
    if weights:
        return (
            f"{label} stores pickles ({weights}), which cannot be read in part. "
            "Download it, and name its folder"
        )
    return f"{label} holds no weights; expected model.safetensors or its .index.json"


def _weight_map(label: str, index: bytes, names: set[str]) -> dict[str, str]:
    try:
        places = dict(json.loads(index)["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"the index of {label} is corrupt: {error}") from error
    for file in places.values():
        if file not in names or PurePosixPath(file).suffix != ".safetensors":
            raise OSError(
                f"the index of {label} names {file!r}; expected a safetensors file of "
                "the repository"
            )
    return places


def _identity(place: Path, file: RemoteFile, commit: str) -> FileIdentity:
    etag = file.linked or f"{commit}:{place.name}"
    return FileIdentity(str(place), file.size or 0, 0, 0, etag)


def _checkpoint(
    label: str,
    places: Mapping[str, Path],
    headers: Mapping[Path, FileHeader],
    identity: Sequence[FileIdentity],
    config: bytes | None,
) -> Checkpoint:
    """Make a checkpoint; config.json is in a temporary folder only while it is read."""
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            Path(folder, architecture.FILE).write_bytes(config)
        made = made_of(
            label, places, headers, tuple(identity), Path(folder), trust=False
        )
        where = str(next(iter(headers)).parent)
        refused, warning = (
            None if text is None else text.replace(folder, where)
            for text in (made.refused, made.warning)
        )
        return replace(made, folder=None, refused=refused, warning=warning)
