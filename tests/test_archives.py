"""Archives of torch: all that it writes is read; what does not fit is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_metagpt import scan
from mergekit_metagpt.checkpoints.files import Readers, read_header
from mergekit_metagpt.checkpoints.pickles import Archive
from tests.families import State, llama_state, tuned, write_model
from tests.oracle import assert_same_bits

Change = Callable[[dict[str, bytes]], object]


def kinds() -> State:
    """Tensors of every kind of storage, and of kinds of views."""
    rows = torch.arange(12.0).view(3, 4)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return {
        **{str(dtype): rows.to(dtype) for dtype in floats},
        "int": rows.long(),
        "bool": rows > 3,
        "complex": rows * 1j,
        "parameter": torch.nn.Parameter(rows.clone()),
        "view": rows[1:],
        "transposed": rows.T,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }


def rewritten(file: Path, change: Change, compression: int = 0) -> None:
    """The records of an archive changed: bytes by name."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_torch_writes_is_read(
    legacy: bool, compression: int, tmp_path: Path
) -> None:
    file, state = tmp_path / "x.bin", kinds()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        rewritten(file, lambda records: None, compression)
    archive = Archive.of(file)
    assert (archive is None) == legacy
    if archive is not None:
        assert archive.can_be_mapped == (compression == zipfile.ZIP_STORED)
    header = read_header("x", file)
    assert header.names == state.keys()
    readers = Readers()
    for stored in header.tensors:
        assert_same_bits(readers.read(stored), state[stored.name].detach())
    assert {stored.name for stored in header.tensors} == {
        name for name, tensor in state.items() if tensor.is_floating_point()
    }


def resized(by: int) -> Change:
    """Every record of values with fewer or more bytes."""

    def change(records: dict[str, bytes]) -> None:
        for name, content in records.items():
            if "/data/" in name:
                records[name] = (content + bytes(4))[: len(content) + by]

    return change


@pytest.mark.parametrize("by", [-1, 4])
def test_records_that_do_not_fit_are_refused_by_a_scan(by: int, tmp_path: Path) -> None:
    """Before a value is read: torch itself maps them, and goes on into the next."""
    base = write_model(tmp_path / "base", llama_state())
    model = write_model(tmp_path / "model", tuned(llama_state(), seed=1))
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save(tuned(llama_state(), seed=1), file)
    assert scan(base, [model]).pool("model").sq_norms.item() > 0
    rewritten(file, resized(by))
    with pytest.raises(
        OSError, match=r"record data/\d+ has [\d,]+ bytes; its pickle"
    ) as raised:
        scan(base, [model])
    assert str(raised.value).startswith(f"{file} cannot be read: ")


def test_torch_maps_what_is_refused_here(tmp_path: Path) -> None:
    """The fact about torch for which archives are checked at all."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(64), "b": torch.full((64,), 2.0)}, file)
    rewritten(file, resized(-128))
    state = torch.load(file, mmap=True, weights_only=True)
    assert state["a"].shape == (64,) and state["a"][0] == 1


def test_nothing_in_a_pickle_is_called(tmp_path: Path) -> None:
    """`check_records` comes after torch has refused code, and would run none."""
    marker = tmp_path / "called"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3), "evil": Evil()}, file)
    archive = Archive.of(file)
    assert archive is not None
    archive.check_records()
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()
