"""What the files of a model hold: tensors by stored name, read on any thread."""

from __future__ import annotations

import math
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_metagpt.archives import Archive

_SAFETENSORS_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SAFETENSORS_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
_PACKED_SUFFIXES = ("weight", "qweight", "qzeros", "weight_packed", "blocks")
_FLOATS = frozenset(_SAFETENSORS_FLOATS.values())


@dataclass(frozen=True)
class StoredTensor:
    """A floating-point tensor in a file: its stored name, file, dtype and shape.

    `shares` names an earlier tensor of the same file with the same memory (pickles).
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    shares: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ConvertedTensor:
    """A tensor that is stored in another layout, as single experts instead of fused.

    transformers' conversion rules of `model_type` make it from `sources`, as when
    mergekit loads it.
    """

    name: str
    model_type: str
    sources: tuple[StoredTensor, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """One of the files that hold it, for messages."""
        return self.sources[0].file


@dataclass(frozen=True)
class FileIdentity:
    """What tells one version of a file from the next."""

    path: str
    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


def check_regular(path: Path) -> None:
    """Check that a path is no pipe or device, which may never end, if it exists.

    Args:
        path: a file or a folder.

    Raises:
        OSError: it is something else.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(
            f"{path} is a pipe or a device, which may never end; expected a file. Put "
            "the model's own file there"
        )


class Readers:
    """The open files of one scan: per thread, one shard of each folder at a time.

    Pickles cannot be read in part: each is memory-mapped once, for all threads.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pickles: dict[Path, Mapping[str, torch.Tensor]] = {}

    def read(self, stored: StoredTensor | ConvertedTensor) -> torch.Tensor:
        """Return the stored tensor, on the CPU, backed by the file where possible.

        Args:
            stored: the tensor, from `read_header`, or one that is made from such.

        Returns:
            its values: a view of the mapped file, not to be written to.

        Raises:
            OSError: the file is missing, truncated or corrupt.
        """
        if isinstance(stored, ConvertedTensor):
            return self._convert(stored)
        if stored.file.suffix != ".safetensors":
            with self._lock:
                if stored.file not in self._pickles:
                    self._pickles[stored.file] = _load_pickle(stored.file)
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

    def _convert(self, wanted: ConvertedTensor) -> torch.Tensor:
        from mergekit.architecture.conversion import convert_checkpoint_tensors

        tensor: torch.Tensor | None = convert_checkpoint_tensors(
            wanted.model_type,
            {source.name: partial(self.read, source) for source in wanted.sources},
            wanted.name,
        )
        if tensor is None or tuple(tensor.shape) != wanted.shape:
            found = "nothing" if tensor is None else list(tensor.shape)
            raise ValueError(
                f"{wanted.name} cannot be made from what {wanted.file.parent} stores: "
                f"expected shape {list(wanted.shape)}, got {found}"
            )
        return tensor


def _open_safetensors(file: Path) -> Any:
    from safetensors import safe_open

    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; it is part of the model by its index. Fetch it again"
        )
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:
        raise OSError(
            f"{file} cannot be read: {error}. It is truncated or corrupt: fetch it "
            "again"
        ) from error


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary that a pickle holds, of tensors or with one under `state_dict`."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    archive = Archive.of(file)
    try:
        try:
            mapped = archive is not None and archive.can_be_mapped
            state = torch.load(file, mmap=mapped, **options)
        except RuntimeError:
            # Of a kind that torch can read, but not map.
            state = torch.load(file, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file} is missing; it is part of the model by its index. Fetch it again"
        ) from error
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
            "by name. Fetch it again"
        )
    return state


def _load_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    return _tensors(file, _unpickled(file))


def _tensors(file: Path, state: dict[str, Any]) -> Mapping[str, torch.Tensor]:
    inner = state.get("state_dict", state)
    found = {k: v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise OSError(
                f"{file} cannot be read: {name} is {tensor.layout} on "
                f"{tensor.device}; expected plain tensors"
            )
    return found


def quantised(label: str, why: str) -> ValueError:
    """Return the error for a model whose weights are not floating point."""
    return ValueError(
        f"{label} is quantised ({why}); MetaGPT measures floating-point weights. "
        "Dequantise it first, or name the unquantised model"
    )


@dataclass(frozen=True)
class FileHeader:
    """What a file holds: names of all tensors, and those of floating point.

    `tensors` are in the order of their bytes. `nested` is whether some lie where
    mergekit does not look for them: under a `state_dict` of a pickle.
    """

    names: frozenset[str]
    tensors: tuple[StoredTensor, ...]
    nested: bool = False


def read_header(label: str, file: Path) -> FileHeader:
    """Read what is known of a file's tensors without their values.

    Args:
        label: the model as its user wrote it, for messages.
        file: a safetensors file or a pickle of tensors.

    Returns:
        the header.

    Raises:
        ValueError: the weights are quantised.
        OSError: the file is missing, truncated, corrupt, or no file.
    """
    check_regular(file)
    read = _safetensors_header if file.suffix == ".safetensors" else _pickle_header
    return read(label, file)


def _safetensors_header(label: str, file: Path) -> FileHeader:
    handle = _open_safetensors(file)
    names, tensors = handle.offset_keys(), []
    for name in names:
        view = handle.get_slice(name)
        kind = view.get_dtype()
        if kind in _SAFETENSORS_FLOATS:
            shape = tuple(view.get_shape())
            dtype = _SAFETENSORS_FLOATS[kind]
            tensors.append(StoredTensor(name, file, dtype, shape))
        elif kind.startswith("F") or (
            kind in _SAFETENSORS_INTEGERS and name.endswith(_PACKED_SUFFIXES)
        ):
            raise quantised(label, f"{name} is stored as {kind}")
    return FileHeader(frozenset(names), tuple(tensors))


def _pickle_header(label: str, file: Path) -> FileHeader:
    outer = _unpickled(file)
    state, tensors = _tensors(file, outer), []
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(state.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype in _FLOATS:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            first = seen.setdefault(place, name) if tensor.numel() else name
            shares = first if first != name else None
            shape = tuple(tensor.shape)
            tensors.append(StoredTensor(name, file, tensor.dtype, shape, shares))
        elif tensor.is_floating_point() or (
            "int" in kind and name.endswith(_PACKED_SUFFIXES)
        ):
            raise quantised(label, f"{name} is stored as {kind}")
    nested = any(outer.get(name) is not tensor for name, tensor in state.items())
    return FileHeader(frozenset(state), tuple(tensors), nested)
