"""Reads headers and tensors of model files on any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_metagpt.checkpoints.pickles import load_pickle, pickle_header
from mergekit_metagpt.checkpoints.stored import (
    PACKED_SUFFIXES,
    SAFETENSORS_FLOATS,
    ConvertedTensor,
    FileHeader,
    StoredTensor,
    corrupt,
    missing,
    quantised,
)


class Readers:
    """The open files of one scan.

    Each thread keeps one safetensors file of each folder open. A pickle cannot be read
    in part, so it is memory-mapped once for all threads.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pickles: dict[Path, Mapping[str, torch.Tensor]] = {}

    def read(self, stored: StoredTensor | ConvertedTensor) -> torch.Tensor:
        """Return the values of a stored tensor, on the CPU; not to be written to.

        They are mapped from the file where possible. Raises an OSError if the file is
        missing, truncated or corrupt.
        """
        if isinstance(stored, ConvertedTensor):
            return self._convert(stored)
        if stored.file.suffix != ".safetensors":
            with self._lock:
                if stored.file not in self._pickles:
                    self._pickles[stored.file] = load_pickle(stored.file)
            return self._pickles[stored.file][stored.name]
        shards: dict[str, tuple[Path, Any]] = self._local.__dict__
        folder = str(stored.file.parent)
        if folder not in shards or shards[folder][0] != stored.file:
            shards[folder] = (stored.file, _open_safetensors(stored.file))
        _, shard = shards[folder]
        try:
            tensor: torch.Tensor = shard.get_tensor(stored.name)
        except Exception as error:
            raise OSError(
                f"cannot read {stored.name} from {stored.file}: {error}"
            ) from error
        return tensor

    def _convert(self, target: ConvertedTensor) -> torch.Tensor:
        from mergekit.architecture.conversion import convert_checkpoint_tensors

        tensor: torch.Tensor | None = convert_checkpoint_tensors(
            target.model_type,
            {source.name: partial(self.read, source) for source in target.sources},
            target.name,
        )
        if tensor is None or tuple(tensor.shape) != target.shape:
            got = "nothing" if tensor is None else list(tensor.shape)
            raise ValueError(
                f"{target.name} cannot be made from what {target.file.parent} stores: "
                f"expected shape {list(target.shape)}, got {got}"
            )
        return tensor


def _open_safetensors(file: Path) -> Any:
    from safetensors import safe_open

    if not file.is_file():
        raise missing(file)
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:
        raise corrupt(file, error) from error


def read_header(label: str, file: Path) -> FileHeader:
    """Read the header of a safetensors file or a pickle of tensors.

    Raises a ValueError, which names the model by its label, if weights are quantised;
    an OSError if the file is missing, truncated or corrupt.
    """
    if file.suffix != ".safetensors":
        return pickle_header(label, file)
    handle = _open_safetensors(file)
    names = handle.offset_keys()
    slices = ((name, handle.get_slice(name)) for name in names)
    tensors, packed = classified(
        file, ((n, view.get_dtype(), tuple(view.get_shape())) for n, view in slices)
    )
    if packed:
        raise quantised(label, packed)
    return FileHeader(frozenset(names), tuple(tensors))


def classified(
    file: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]]
) -> tuple[list[StoredTensor], str | None]:
    """Tell a safetensors file's floating-point tensors from quantised ones.

    `entries` are name, dtype and shape of every tensor, as in the header. Returns the
    floating-point tensors, and the first quantised one in words, or None.
    """
    tensors, packed = [], None
    for name, kind, shape in entries:
        if kind in SAFETENSORS_FLOATS:
            tensors.append(StoredTensor(name, file, SAFETENSORS_FLOATS[kind], shape))
        elif kind.startswith("F") or (
            kind.startswith(("I", "U")) and name.endswith(PACKED_SUFFIXES)
        ):
            packed = packed or f"{name} is stored as {kind}"
    return tensors, packed
