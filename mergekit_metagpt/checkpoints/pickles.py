"""Reads tensors from pickles without running code; checks torch's archives."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_metagpt.checkpoints.stored import (
    FLOATS,
    PACKED_SUFFIXES,
    FileHeader,
    StoredTensor,
    dtype_name,
    missing,
    quantised,
)


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary that a pickle holds: tensors by name, here or at `state_dict`."""
    archive = Archive.of(file)
    try:
        mapped = archive is not None and archive.can_be_mapped
        state = torch.load(file, mmap=mapped, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise missing(file) from error
    except Exception as error:
        raise OSError(
            f"{file} cannot be read: {error}. It is truncated, corrupt, or holds more "
            "than tensors"
        ) from error
    if archive is not None:
        archive.check_records()
    inner = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(inner, dict) or not all(isinstance(name, str) for name in inner):
        raise OSError(
            f"{file} cannot be read: it holds {type(inner).__name__}; expected tensors "
            "by name. Fetch or make it again"
        )
    return state


def load_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    return _tensors(file, _unpickled(file))


def _tensors(file: Path, state: dict[str, Any]) -> Mapping[str, torch.Tensor]:
    inner = state.get("state_dict", state)
    tensors = {k: v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise OSError(
                f"{file} cannot be read: {name} is {tensor.layout} on "
                f"{tensor.device}; expected plain tensors"
            )
    return tensors


def pickle_header(label: str, file: Path) -> FileHeader:
    outer = _unpickled(file)
    state, tensors = _tensors(file, outer), []
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(state.items()):
        kind = dtype_name(tensor.dtype)
        if tensor.dtype in FLOATS:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            first = seen.setdefault(place, name) if tensor.numel() else name
            shares = first if first != name else None
            shape = tuple(tensor.shape)
            tensors.append(StoredTensor(name, file, tensor.dtype, shape, shares))
        elif tensor.is_floating_point() or (
            "int" in kind and name.endswith(PACKED_SUFFIXES)
        ):
            raise quantised(label, f"{name} is stored as {kind}")
    nested = any(outer.get(name) is not tensor for name, tensor in state.items())
    return FileHeader(frozenset(state), tuple(tensors), nested)


# Bytes of an element, by the class of its storage.
_BYTES = {
    "UntypedStorage": 1,
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage"), 1),
    **dict.fromkeys(("QUInt4x2Storage", "QUInt2x4Storage"), 1),
    "QInt32Storage": 4,
}


@dataclass(frozen=True)
class Archive:
    """The records of an archive by lower-case name: torch ignores case."""

    file: Path
    folder: str
    records: Mapping[str, zipfile.ZipInfo]

    @classmethod
    def of(cls, file: Path) -> Archive | None:
        """Read the directory of an archive.

        Args:
            file: a file saved by torch.

        Returns:
            the archive; None for a file of another kind.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):
            return None  # torch will say what is wrong with it
        records = {record.filename.lower(): record for record in entries}
        folder = entries[0].filename.partition("/")[0].lower() if entries else ""
        return cls(file, folder, records)

    @property
    def can_be_mapped(self) -> bool:
        """Whether the records are stored without compression."""
        kinds = {record.compress_type for record in self.records.values()}
        return kinds <= {zipfile.ZIP_STORED}

    def check_records(self) -> None:
        """Check that each storage of the pickle has a record of exactly its size.

        torch maps as many bytes as the pickle says, from the beginning of the record.
        If the record is shorter, the end of the tensor is read from its neighbours.
        Call it once torch has accepted the pickle: this reader sets no limits itself.

        Raises:
            OSError: a record is missing, shorter or longer.
        """
        try:
            with zipfile.ZipFile(self.file) as archive:
                content = archive.read(self.records[f"{self.folder}/data.pkl"])
            lister = _StorageLister(content)
            lister.load()
        except Exception as error:
            raise OSError(
                f"{self.file} cannot be read: {type(error).__name__} {error} in its "
                "pickle. Fetch or make it again, or store it as safetensors"
            ) from error
        for key, expected in lister.storages:
            record = self.records.get(f"{self.folder}/data/{key}".lower())
            size = 0 if record is None else record.file_size
            if record is None or size != expected:
                raise OSError(
                    f"{self.file} cannot be read: its record data/{key} has "
                    f"{size:,} bytes; its pickle says {expected:,}. It is truncated "
                    "or corrupt: fetch or make it again"
                )


class _Nothing:
    """Stands for every object that a pickle names or makes; does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Nothing:
        return super().__new__(cls)

    def __call__(self, *arguments: Any, **named: Any) -> _Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _StorageLister(pickle.Unpickler):
    """Lists the records of a pickle's storages, with their sizes in bytes.

    Imports and calls nothing that the pickle names.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.storages: list[tuple[str, int]] = []

    def find_class(self, module: str, name: str) -> type[_Nothing]:
        return type(name, (_Nothing,), {})

    def persistent_load(self, identity: Any) -> _Nothing:
        _, kind, key, _, count = identity
        if type(key) is not str or type(count) is not int:
            raise TypeError(f"a storage of key {key!r} and size {count!r}")
        self.storages.append((key, count * _BYTES[kind.__name__]))
        return _Nothing()
