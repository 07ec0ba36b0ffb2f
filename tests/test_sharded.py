"""mergekit's multi-GPU executor with CPUs as devices, and merges and scans at once."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import multigpu_executor
from mergekit.multigpu_executor import MultiGPUExecutor

from mergekit_metagpt import scan
from mergekit_metagpt.arithmetic import scaled_sums
from mergekit_metagpt.scanning import once, threads
from tests.conftest import Family, make_family
from tests.families import (
    merge_config,
    read_model,
    run_mergekit,
    said,
    write_model,
)
from tests.merges import pretend_devices
from tests.oracle import (
    assert_same_states,
    naive_coefficients,
    naive_sq_norms,
)

pytestmark = pytest.mark.timeout(60)
DEVICES = 4
LAYERS = {"layer_range": [0, 3]}

Scans = list[tuple[str, tuple[str, ...]]]


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_devices(monkeypatch, DEVICES)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    """The base and the models of every scan from now on."""
    seen: Scans = []
    scan_files = once.scan_checkpoints

    def counted(base: Any, models: Any, **options: Any) -> Any:
        seen.append((base.label, tuple(model.label for model in models)))
        time.sleep(0.05)  # long enough for the other threads to ask too
        return scan_files(base, models, **options)

    monkeypatch.setattr(once, "scan_checkpoints", counted)
    return seen


@pytest.fixture
def fresh_family(tmp_path: Path) -> Family:
    """A family that nothing has scanned yet."""
    return make_family(tmp_path / "family")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        if "tqdm" not in type(thread).__module__:
            thread.join(timeout=5)
            assert not thread.is_alive(), thread


def scanned_pairs(scans: Scans) -> Counter[tuple[str, str]]:
    return Counter((base, model) for base, models in scans for model in models)


# ---- the plan


class Planned(MultiGPUExecutor):
    """Plans only; the last plan is kept."""

    last: MultiGPUExecutor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        Planned.last = self

    def run(self, quiet: bool = False) -> Iterator[tuple[Any, Any]]:
        return iter(())


def plan(
    config: dict[str, Any], out: Path, caplog: pytest.LogCaptureFixture
) -> tuple[int, dict[str, Counter[str]]]:
    """Number of islands, and for each device what kinds of tasks it was given."""
    caplog.clear()
    with caplog.at_level("INFO", logger=multigpu_executor.LOG.name):
        run_mergekit(config, out, "--multi-gpu")
    (islands,) = re.findall(r"Found (\d+) islands", caplog.text)
    return int(islands), {
        str(device): Counter(type(handle.task()).__name__ for handle in handles)
        for device, handles in Planned.last.gpu_assignments.items()
    }


@pytest.mark.parametrize("form", ["models", "slices", "layer", "power 0"])
def test_islands_are_those_of_task_arithmetic(
    form: str,
    family: Family,
    tmp_path: Path,
    four_devices: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mergekit.merge.MultiGPUExecutor", Planned)
    everyone = family.paths
    settings: dict[str, Any] = {"parameters": {"weight": 0.5}, "dtype": "float32"}
    if form == "slices":
        sources = [{"model": str(model), **LAYERS} for model in everyone]
        settings["slices"] = [{"sources": sources}]
    if form == "layer":
        settings["parameters"]["granularity"] = "layer"
    if form == "power 0":
        settings["parameters"]["power"] = 0
    config = merge_config(family.base, everyone, **settings)

    ours, on_devices = plan(config, tmp_path / "ours", caplog)
    theirs = plan({**config, "merge_method": "task_arithmetic"}, tmp_path / "t", caplog)
    assert (ours, on_devices) == theirs
    assert ours >= len(family.base_state)
    assert len(on_devices) == DEVICES
    sizes = [sum(tasks.values()) for tasks in on_devices.values()]
    assert max(sizes) - min(sizes) <= max(sizes) // 3


# ---- the run


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_sharded_merge_has_the_bits_of_the_single_one(
    granularity: str,
    fresh_family: Family,
    tmp_path: Path,
    four_devices: None,
    scans: Scans,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sums: list[tuple[int, tuple[float, ...]]] = []
    merged = scaled_sums.merged_and_finite

    def noted(
        base: torch.Tensor, tuned: list[torch.Tensor], lambdas: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        sums.append((threading.get_ident(), tuple(lambdas.tolist())))
        return merged(base, tuned, lambdas)

    monkeypatch.setattr(scaled_sums, "merged_and_finite", noted)
    parameters = {"granularity": granularity}
    config = merge_config(fresh_family.base, fresh_family.models, parameters=parameters)
    sharded = run_mergekit(config, tmp_path / "sharded", "--multi-gpu")
    in_threads, sums[:] = list(sums), []
    found = said(caplog, "coefficients of")
    once = list(scans)
    single = run_mergekit(config, tmp_path / "single")

    assert_same_states(sharded, single)
    assert len(in_threads) == len(fresh_family.base_state)
    assert len({thread for thread, _ in in_threads}) == DEVICES
    assert {thread for thread, _ in sums} == {threading.get_ident()}
    assert Counter(lambdas for _, lambdas in in_threads) == Counter(
        lambdas for _, lambdas in sums
    )
    assert len(found) == 1
    if granularity == "tensor":
        assert not scans
        return
    assert once == scans
    assert once == [(str(fresh_family.base), tuple(map(str, fresh_family.models)))]
    if granularity == "model":
        (lambdas,) = {lambdas for _, lambdas in in_threads}
        expected = naive_coefficients(
            naive_sq_norms(fresh_family.base_state, fresh_family.states)
        )
        torch.testing.assert_close(
            torch.tensor(lambdas, dtype=torch.float64), expected, rtol=1e-7, atol=0
        )


def test_error_of_the_scan_is_raised_once(
    fresh_family: Family,
    tmp_path: Path,
    four_devices: None,
    scans: Scans,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    state = dict(fresh_family.states[1])
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].clone()
    state[name][3, 4] = float("nan")
    ill = write_model(tmp_path / "ill", state, shards=2)
    config = merge_config(fresh_family.base, [fresh_family.models[0], ill])

    for attempt in (1, 2):
        with pytest.raises(ValueError, match="NaN") as caught:
            run_mergekit(config, tmp_path / "out", "--multi-gpu")
        assert name in str(caught.value)
        assert str(ill) in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert len(scans) == attempt
    assert not said(caplog, "NaN")
    assert "NaN" not in "".join(capfd.readouterr())

    write_model(ill, fresh_family.states[1], shards=2)
    merged = run_mergekit(config, tmp_path / "out", "--multi-gpu")
    well = merge_config(fresh_family.base, fresh_family.models[:2])
    assert_same_states(merged, run_mergekit(well, tmp_path / "well"))


def test_error_of_one_model_is_not_kept_for_another(
    fresh_family: Family, tmp_path: Path
) -> None:
    """A merge that was planned before another one failed still gets its own answer."""
    state = dict(fresh_family.states[1])
    state["lm_head.weight"] = torch.full_like(state["lm_head.weight"], float("inf"))
    ill = once.open_checkpoint(write_model(tmp_path / "ill", state))
    base = once.open_checkpoint(fresh_family.base)
    well = once.open_checkpoint(fresh_family.models[0])
    with pytest.raises(ValueError, match="infinity"):
        once.measure(base, [well, ill])
    result = once.measure(base, [well])
    expected = naive_sq_norms(fresh_family.base_state, fresh_family.states[:1])
    assert result.pool().sq_norms.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    with pytest.raises(ValueError, match="infinity"):
        once.measure(base, [well, ill])


# ---- at once


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Call each function on a thread of its own, all starting together."""
    together = threading.Barrier(len(calls), timeout=30)

    def start(call: Callable[[], Any]) -> Any:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(start, c) for c in calls]]


def test_two_merges_at_once(fresh_family: Family, tmp_path: Path, scans: Scans) -> None:
    """Two merges that share the base and one model; that pair is scanned once."""
    configs = [
        merge_config(fresh_family.base, fresh_family.models[:2]),
        merge_config(
            fresh_family.base,
            fresh_family.models[1:],
            parameters={"power": 1.0, "lambda": 0.5},
            dtype="float32",
        ),
    ]
    threaded = at_once(
        *(
            lambda n=n, config=config: run_mergekit(
                config, tmp_path / f"threaded{n}", fresh=False
            )
            for n, config in enumerate(configs)
        )
    )
    assert scanned_pairs(scans) == {
        (str(fresh_family.base), str(model)): 1 for model in fresh_family.models
    }
    for n, config in enumerate(configs):
        single = run_mergekit(config, tmp_path / f"single{n}")
        assert_same_states(threaded[n], single)


@pytest.mark.parametrize("what", ["scan", "run", "failing run"])
def test_torch_threads_are_left_as_they_were(what: str, family: Family) -> None:
    """Of this thread, one that runs beside the scans, and those started later."""

    def number() -> int:
        time.sleep(0.02)
        return torch.get_num_threads()

    def nothing() -> torch.Tensor:
        if what == "failing run":
            raise ValueError("on purpose")
        return torch.zeros(1) + number()

    def work() -> list[float]:
        if what == "scan":
            scan(family.base, family.models, workers=3)
            return [1.0]
        try:
            return [float(n) for n in threads.run([(1, nothing)] * 9, 3)]
        except ValueError:
            return [1.0]

    default = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as beside:
            assert beside.submit(number).result() == 3
            for numbers in at_once(work, work):
                assert set(numbers) == {1.0}, "a worker shares its work with others"
            assert beside.submit(number).result() == 3
        assert torch.get_num_threads() == 3
        assert at_once(*[number] * 8) == [3] * 8
    finally:
        torch.set_num_threads(default)


def test_merge_in_a_thread_leaves_its_torch_threads(
    fresh_family: Family, tmp_path: Path
) -> None:
    config = merge_config(fresh_family.base, fresh_family.models)

    def merge() -> tuple[int, int]:
        before = torch.get_num_threads()
        run_mergekit(config, tmp_path / "out", fresh=False)
        return before, torch.get_num_threads()

    ((before, after),) = at_once(merge)
    assert before == after
    assert read_model(tmp_path / "out")
