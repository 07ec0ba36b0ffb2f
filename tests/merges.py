"""Merges of configurations, compared with the oracle."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import multigpu_executor
from mergekit.graph import Executor
from mergekit.multigpu_executor import MultiGPUExecutor

from tests.families import State, merge_config, read_model, run_mergekit
from tests.matrix import Row
from tests.oracle import (
    GRANULARITIES,
    Oracle,
    assert_lambdas,
    assert_merged,
    assert_sq_norms,
)


def write_merge(
    file: Path, base: Path | str, models: Sequence[Path | str], **settings: Any
) -> Path:
    """Write a merge YAML; return its path."""
    file.write_text(yaml.safe_dump(merge_config(base, models, **settings)))
    return file


def with_granularity(config: Mapping[str, Any], granularity: str) -> dict[str, Any]:
    settings = {**config.get("parameters", {}), "granularity": granularity}
    return {**config, "parameters": settings}


def assert_merges(
    config: Mapping[str, Any],
    out: Path,
    oracle: Oracle,
    *options: str,
    granularity: str = "model",
) -> State:
    """Merge in the stored precision and check every element; return the result."""
    config = with_granularity(config, granularity)
    merged = run_mergekit(config, out / granularity, *options)
    assert_merged(merged, oracle, granularity)
    return merged


def assert_merges_exactly(
    config: Mapping[str, Any],
    out: Path,
    oracle: Oracle,
    *options: str,
    granularity: str = "model",
) -> State:
    """Merge in float64 and check every element and every lambda; return the result."""
    config = {**with_granularity(config, granularity), "dtype": "float64"}
    merged = run_mergekit(config, out / f"{granularity}64", *options)
    assert_lambdas(merged, oracle, granularity)
    exact = oracle.as_dtype(torch.float64)
    assert_merged(merged, oracle, granularity, handed_over=exact)
    return merged


def assert_works(
    row: Row,
    config: Mapping[str, Any],
    out: Path,
    oracle: Oracle,
    *options: str,
    scanned: Sequence[Path] = (),
) -> dict[str, State]:
    """Check the merges that a row describes; return them by granularity.

    n_t of the scanned checkpoints, the base first, is checked too.
    """
    with row.expect():
        if scanned:
            assert_sq_norms(oracle, scanned[0], scanned[1:])
        assert_merges_exactly(config, out, oracle, *options)
        return {
            granularity: assert_merges(
                config, out, oracle, *options, granularity=granularity
            )
            for granularity in GRANULARITIES
        }


def task_arithmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same merge by mergekit's own method, with weights."""
    settings = {**config.get("parameters", {}), "weight": 0.5}
    return {**config, "merge_method": "task_arithmetic", "parameters": settings}


def assert_task_arithmetic_fails(
    config: Mapping[str, Any], folder: Path, message: str, *options: str
) -> None:
    """Check that mergekit's own method fails on these inputs, with that message."""
    with pytest.raises(Exception, match=re.escape(message)):
        run_mergekit(task_arithmetic(config), folder / "theirs", *options)


def merge_files(
    files: Sequence[Path], out: Path, *options: str, granularity: str, **settings: Any
) -> State:
    """Merge bare files through the code of `mergekit-pytorch`; the base comes first."""
    from mergekit.scripts.merge_raw_pytorch import main

    config = merge_config(files[0], files[1:], **settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yml")
    file.write_text(yaml.safe_dump(with_granularity(config, granularity)))
    main.main([str(file), str(out), "--quiet", *options], standalone_mode=False)
    return read_model(out)


def pretend_devices(
    monkeypatch: pytest.MonkeyPatch, count: int, *, patient: bool = True
) -> None:
    """Make mergekit see so many devices, each of which computes on the CPU.

    All start together, so that each has a thread of its own. The device under which a
    worker runs is `meta`: a tensor that we make without naming its device has no data.

    If `patient`, a worker ends when mergekit has taken its results: mergekit's thread
    for these stops as soon as all workers have ended, and drops what it has not taken
    by then. With any method, a merge in some 200 then fails: "No value for required
    tensor".
    """
    together = threading.Barrier(count, timeout=30)
    cpu = torch.device("cpu")

    def device_worker(
        self: MultiGPUExecutor,
        task_list: list[Any],
        cached_values: dict[Any, Any],
        device: torch.device,
        quiet: bool,
    ) -> None:
        together.wait()
        with torch.device("meta"):
            executor = Executor(
                targets=task_list,
                math_device=cpu,
                storage_device=cpu,
                cached_values=cached_values,
            )
            for handle, result in executor._run(quiet=quiet):
                wanted = handle in self.targets or handle in self.trailing_dependencies
                self.task_completion_queue.put(
                    (handle._index, result if wanted else None)
                )
        while patient and not self.task_completion_queue.empty():
            time.sleep(0.001)

    names = ("get_torch_accelerator_type", "get_torch_accelerator_count")
    for name, value in zip(names, ("cuda", count), strict=True):
        monkeypatch.setattr(multigpu_executor, name, lambda value=value: value)
    monkeypatch.setattr(MultiGPUExecutor, "_device_worker", device_worker)
