"""Merges of configurations, compared with the oracle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.families import State, merge_config, run_mergekit
from tests.oracle import Oracle, assert_lambdas, assert_merged


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
