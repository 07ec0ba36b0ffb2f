"""Reading in pieces: the right elements, few open files, clear errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_metagpt.checkpoints.files import read_header
from mergekit_metagpt.checkpoints.pairs import SharedTensor
from mergekit_metagpt.checkpoints.stored import StoredTensor
from mergekit_metagpt.scanning import pieces
from mergekit_metagpt.scanning.pieces import Files, Streams
from tests.oracle import ORDER, assert_same_bits


@pytest.fixture
def opened() -> Iterator[Streams]:
    found = Streams()
    yield found
    found.close()


def stored(file: Path, name: str = "weight") -> StoredTensor:
    return next(t for t in read_header("model", file).tensors if t.name == name)


def written(file: Path, tensor: torch.Tensor) -> StoredTensor:
    others = {"a": torch.ones(3, dtype=torch.int8), "z": torch.zeros(5)}
    save_file({**others, "weight": tensor}, file)
    return stored(file)


def read(source: Streams, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    room = torch.empty((stop - start) * tensor.dtype.itemsize, dtype=torch.uint8)
    source.read(tensor, start, memoryview(room.numpy().data))
    return room.view(tensor.dtype)


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("dtype", ORDER)
def test_pieces_are_the_elements_of_the_tensor(
    dtype: torch.dtype, tmp_path: Path, opened: Streams
) -> None:
    tensor = torch.randn(7, 11).to(dtype)
    held = written(tmp_path / "model.safetensors", tensor)
    flat = tensor.reshape(-1)
    for start, stop in ((0, 77), (0, 1), (76, 77), (13, 14), (20, 61), (5, 5)):
        assert_same_bits(read(opened, held, start, stop), flat[start:stop])


def test_what_the_tensor_does_not_have_is_not_read(
    tmp_path: Path, opened: Streams
) -> None:
    held = written(tmp_path / "model.safetensors", torch.ones(4))
    with pytest.raises(ValueError, match="asked for more"):
        read(opened, held, 1, 5)


def test_short_reads_are_completed(
    tmp_path: Path, opened: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel may hand out less than was asked for, as network file systems do."""
    tensor = torch.randn(1000)
    held, whole = written(tmp_path / "model.safetensors", tensor), os.preadv

    def some(handle: int, buffers: list[memoryview], offset: int) -> int:
        return whole(handle, [buffers[0][:300]], offset)

    monkeypatch.setattr(os, "preadv", some)
    assert_same_bits(read(opened, held, 3, 997), tensor[3:997])


def test_a_file_that_shrank_is_an_error(tmp_path: Path, opened: Streams) -> None:
    file = tmp_path / "model.safetensors"
    held = written(file, torch.randn(10_000))
    read(opened, held, 0, 10)
    with file.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(OSError, match=r"cannot read weight from .*it ends before"):
        read(opened, held, 9000, 9010)


def test_a_tensor_that_is_no_longer_there_is_an_error(
    tmp_path: Path, opened: Streams
) -> None:
    file = tmp_path / "model.safetensors"
    held = written(file, torch.randn(100))
    save_file({"weight": torch.ones(7)}, file)
    with pytest.raises(OSError, match=r"weight from .*header has changed"):
        read(opened, held, 0, 7)
    file.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read"):
        read(Streams(), held, 0, 7)


def test_few_files_are_open_at_a_time(tmp_path: Path, opened: Streams) -> None:
    count = 3 * pieces.OPEN_FILES
    values = [torch.full((8,), float(number)) for number in range(count)]
    files = [
        written(tmp_path / f"{number}.safetensors", value)
        for number, value in enumerate(values)
    ]
    before = handles()
    for _ in range(2):
        for held, value in zip(files, values, strict=True):
            assert_same_bits(read(opened, held, 0, 8), value)
    assert handles() - before == pieces.OPEN_FILES
    opened.close()
    assert handles() == before


def test_threads_share_what_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_allowed", lambda: 10 * pieces.SHARE)
    files = [
        written(tmp_path / f"{number}.safetensors", torch.ones(8))
        for number in range(9)
    ]
    for threads, most in ((1, 9), (2, 5), (5, 2), (100, 1)):
        source, before = Streams(threads), handles()
        for held in files:
            read(source, held, 0, 8)
        assert handles() - before == most
        source.close()


def test_with_too_many_open_files_others_are_closed(
    tmp_path: Path, opened: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        written(tmp_path / f"{number}.safetensors", torch.full((8,), float(number)))
        for number in range(5)
    ]
    allowed, plain = handles() + 2, os.open

    def scarce(path: Any, flags: int, *rest: Any) -> int:
        if handles() > allowed:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", scarce)
    for number, held in enumerate(files):
        assert read(opened, held, 0, 8).eq(number).all()
    allowed = 0
    with pytest.raises(OSError, match="Too many open files"):
        read(Streams(), files[0], 0, 8)


def test_threads_read_at_once(tmp_path: Path, opened: Streams) -> None:
    tensor = torch.randn(100_000)
    held = written(tmp_path / "model.safetensors", tensor)

    def piece(start: int) -> bool:
        return read(opened, held, start, start + 500).equal(tensor[start : start + 500])

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(piece, range(0, 99_500, 250)))


def test_overlaps_along_another_axis_are_cut_from_the_whole(tmp_path: Path) -> None:
    tensor = torch.randn(6, 10)
    held = written(tmp_path / "model.safetensors", tensor)
    room = torch.empty(240, dtype=torch.uint8)
    for shape in ((6, 10), (4, 10), (6, 7), (4, 7)):
        pair = SharedTensor("weight", held, held, shape)
        expected = tensor[: shape[0], : shape[1]].reshape(-1)
        with Files() as files:
            source = files.source(pair, held)
            assert (source.streamed is None) == (shape[1] != 10)
            assert_same_bits(source.read(slice(3, 20), room), expected[3:20])


def test_pickles_are_not_streamed(tmp_path: Path) -> None:
    tensor, file = torch.randn(6, 10), tmp_path / "pytorch_model.bin"
    torch.save({"weight": tensor}, file)
    held = stored(file)
    with Files() as files:
        assert not files.in_parts(held)
        source = files.source(SharedTensor("weight", held, held, (6, 10)), held)
        assert_same_bits(source.read(slice(2, 9), torch.empty(0)), tensor.view(-1)[2:9])
