"""Scratch buffers: kept for the next loop, never shared, large ones given back."""

from __future__ import annotations

import pytest
import torch

from mergekit_metagpt.arithmetic import in_parts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(in_parts, "_FREE", kept)
    return kept


def test_a_buffer_is_used_again(free: list[torch.Tensor]) -> None:
    with in_parts.scratch(2, 10, torch.float64, CPU) as first:
        place = first.data_ptr()
    with in_parts.scratch(3, 7, torch.bfloat16, CPU) as second:
        assert second.data_ptr() == place and second.shape == (3, 7)
    assert len(free) == 1


def test_two_loops_at_once_have_two(free: list[torch.Tensor]) -> None:
    with (
        in_parts.scratch(1, 10, torch.float32, CPU) as first,
        in_parts.scratch(1, 10, torch.float32, CPU) as second,
    ):
        first.fill_(1)
        second.fill_(2)
        assert first.eq(1).all()
    assert len(free) == 2


def test_large_ones_are_given_back(free: list[torch.Tensor]) -> None:
    with in_parts.scratch(1, in_parts.MOST + 1, torch.uint8, CPU):
        pass
    assert not free


def test_a_buffer_of_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode(), in_parts.scratch(1, 4, torch.float32, CPU) as one:
        place = one.data_ptr()
    with in_parts.scratch(1, 4, torch.float32, CPU) as again:
        again.zero_()
        assert again.data_ptr() == place


def test_a_failing_loop_returns_its_buffer(free: list[torch.Tensor]) -> None:
    with pytest.raises(KeyError), in_parts.scratch(1, 4, torch.float32, CPU):
        raise KeyError
    assert len(free) == 1
