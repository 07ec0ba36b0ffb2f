"""Reads configuration and headers of models on the hub, without downloading weights."""

from __future__ import annotations

import functools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.checkpoints import adapters, architecture
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint, made_of
from mergekit_metagpt.checkpoints.files import classified
from mergekit_metagpt.checkpoints.hub import explained, require_repository
from mergekit_metagpt.checkpoints.identity import FileIdentity, hub_revision
from mergekit_metagpt.checkpoints.nearby import is_local
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
    """Open a LoRA adapter, `base+adapter` or the adapter alone: its factors.

    From the hub it is downloaded whole, as it is small. Raises a ValueError if there is
    no adapter, or its task vector is no product of factors; an OSError if the
    repository or a file of it cannot be read.
    """
    place = model.lora or model.model
    if is_local(place.path):
        folder = Path(place.path)
    else:
        if not adapters.is_cached(place.path, place.revision):
            require_repository(place.path, place.revision)
        fetch = functools.partial(adapters.download, place.path, place.revision)
        folder = explained(str(place), fetch)
    if not folder.is_dir():
        raise ValueError(f"{place} does not exist; expected an adapter's folder")
    return adapters.read_adapter(str(model), folder)


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
    label = str(model)
    if is_local(model.model.path):
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
    folder = Path(repository, "resolve", commit)

    def remote(name: str) -> RemoteFile:
        url = hf_hub_url(repository, name, revision=commit)
        return RemoteFile(str(folder / name), url)

    def content(name: str) -> bytes:
        file = remote(name)
        return request(file.label, file.url, None).content

    weights = next((name for name in WEIGHTS if name in names), "")
    if not weights and adapters.CONFIG in names:
        return _glimpse_adapter(model)
    if not weights:
        raise ValueError(
            f"{label} holds no weights; expected model.safetensors or its .index.json"
        )
    if not weights.startswith("model.safetensors"):
        raise ValueError(
            f"{label} stores pickles ({weights}), which cannot be read in part. "
            "Download it, and name its folder"
        )
    config = content(architecture.FILE) if architecture.FILE in names else None
    by_name: dict[str, str] | None = None
    if weights.endswith(".index.json"):
        by_name = _weight_map(label, content(weights), names)
    listed = {weights} if by_name is None else {*by_name.values()}
    files = {folder / name: remote(name) for name in sorted(listed)}
    with ThreadPoolExecutor(AT_ONCE) as executor:
        entries = executor.map(RemoteFile.read_header, files.values())
    packed, headers = None, {}
    for place, of_file in zip(files, entries, strict=True):
        kinds = ((n, e["dtype"], tuple(e["shape"])) for n, e in of_file.items())
        floats, odd = classified(place, kinds)
        headers[place] = FileHeader(frozenset(of_file), tuple(floats))
        packed = packed or odd
    if by_name is None:
        by_name = dict.fromkeys(headers[folder / weights].names, weights)
    identity = [
        FileIdentity(
            str(place), file.size or 0, 0, 0, file.linked or f"{commit}:{place.name}"
        )
        for place, file in files.items()
    ]
    places = {name: folder / file for name, file in by_name.items()}
    with tempfile.TemporaryDirectory() as here:  # mergekit reads folders only
        if config is not None:
            Path(here, architecture.FILE).write_bytes(config)
        made = made_of(label, places, headers, tuple(identity), Path(here), trust=False)
        refused, warning = (
            None if text is None else text.replace(here, str(folder))
            for text in (made.refused, made.warning)
        )
    checkpoint = replace(
        made, folder=None, refused=refused, warning=warning, remote=files
    )
    method = architecture.quantisation(config)
    return Glimpse(
        checkpoint=checkpoint,
        commit=commit,
        download=sum(file.size or 0 for file in files.values()),
        quantised=str(quantised(label, packed)) if packed else method,
    )


def _weight_map(label: str, index: bytes, names: set[str]) -> dict[str, str]:
    try:
        places = dict(json.loads(index)["weight_map"])
        if not places:
            raise ValueError("it names no tensors")
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"the index of {label} is corrupt: {error}") from error
    for file in places.values():
        if file not in names or PurePosixPath(file).suffix != ".safetensors":
            raise OSError(
                f"the index of {label} names {file!r}; expected a safetensors file of "
                "the repository"
            )
    return places
