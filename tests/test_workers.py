"""Work on the parts of one tensor: in order, in the caller's mode, to its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from mergekit_metagpt.arithmetic.in_parts import spread

both = pytest.mark.parametrize("compiled", [False, True])


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@both
def test_results_come_in_the_order_of_the_parts(compiled: bool) -> None:
    found = spread(lambda part: part * part, range(100), compiled=compiled)
    assert found == [part * part for part in range(100)]


@both
def test_one_part_needs_no_second_thread(compiled: bool) -> None:
    assert spread(str, [7], compiled=compiled) == ["7"]


def test_the_caller_takes_turns_with_compiled_loops_only() -> None:
    """Each of three threads waits until all three are at work."""
    met = threading.Barrier(3, timeout=60)

    def name(part: int) -> str:
        met.wait()
        return threading.current_thread().name

    here = threading.current_thread().name
    assert here in spread(name, range(3), compiled=True)
    assert here not in spread(name, range(3))


@both
@pytest.mark.parametrize("inference", [False, True])
def test_work_is_done_in_the_mode_of_the_caller(
    compiled: bool, inference: bool
) -> None:
    def mode(part: int) -> bool:
        return torch.is_inference_mode_enabled()

    with torch.inference_mode(inference):
        assert set(spread(mode, range(9), compiled=compiled)) == {inference}


@both
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_an_error_is_raised_and_ends_the_work(compiled: bool, bad: int) -> None:
    done: list[int] = []
    failed = threading.Event()

    def work(part: int) -> None:
        if part == bad:
            failed.set()
            raise RuntimeError(f"part {part}")
        if part > bad:
            failed.wait(60)
        done.append(part)

    with pytest.raises(RuntimeError, match=f"part {bad}"):
        spread(work, range(10_000), compiled=compiled)
    assert len(done) < 10_000 - 1
    assert not [t for t in threading.enumerate() if t.name.startswith("metagpt-sum")]


@both
def test_no_thread_of_torch_is_lost(compiled: bool) -> None:
    spread(str, range(10), compiled=compiled)
    assert torch.get_num_threads() == 3
