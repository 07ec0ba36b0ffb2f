"""Many merges, many processes, many models, many tensors, and one huge tensor."""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import mergekit_metagpt
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.commands.cli import main
from mergekit_metagpt.report import schema
from mergekit_metagpt.scanning import groups, once, one_pass
from tests.broken import snapshot
from tests.conftest import Family, make_family
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    run_mergekit,
    tuned,
    write_model,
)
from tests.long import huge
from tests.long.killed import Place, shared_place
from tests.oracle import (
    assert_same_bits,
    assert_within_bound,
    naive_coefficients,
    naive_sq_norm,
    naive_sq_norms,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


# ---- one process, many merges


def resources(folder: Path) -> dict[str, int]:
    """What this process holds: memory in KiB, threads, open files, files mapped."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "threads": threading.active_count(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "maps": sum(str(folder) in line for line in maps),
    }


@linux
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_many_merges_in_one_process_do_not_pile_up(
    granularity: str, tmp_path: Path
) -> None:
    """64 merges in all; what 8 of them have needed is enough for the others."""
    family = make_family(tmp_path / "family", count=2)
    parameters = {"granularity": granularity}
    config = merge_config(family.base, family.models, parameters=parameters)
    first: State = {}
    for number in range(32):
        merged = run_mergekit(config, tmp_path / "out")
        for name, tensor in merged.items():
            assert_same_bits(first.setdefault(name, tensor), tensor)
        if number == 7:
            early = resources(family.base.parent)
    del merged, tensor
    late = resources(family.base.parent)
    assert late["threads"] <= early["threads"], (early, late)
    assert late["files"] <= early["files"], (early, late)
    assert late["maps"] <= early["maps"], (early, late)
    assert late["memory"] < early["memory"] + 16_384, (early, late)


# ---- many processes


@pytest.fixture
def forks() -> Place:
    """A family, and a warm process that merges it in forks."""
    return shared_place()


def test_eight_processes_share_models_and_cache(forks: Place) -> None:
    """All begin together, with nothing in the cache; then all again, with all in it."""
    with forks.work() as work:
        job = forks.job("mergekit-metagpt")
        first, last, *options = job.arguments
        for turn in ("empty", "filled"):
            jobs = [
                replace(job, arguments=(first, last, f"{work}/{turn}{n}", *options[1:]))
                for n in range(8)
            ]
            for ended in forks.forks.run(*jobs):
                assert ended.status == 0, ended
            for n in range(8):
                merged = dict(snapshot(work / f"{turn}{n}"))
                whole = forks.reference["mergekit-metagpt"]
                weights = {name for name in whole if "safetensors" in name}
                assert weights
                for name in weights | {"metagpt.json", "mergekit_config.plain.yml"}:
                    assert merged[name] == whole[name], name
            entries = sorted(path.name for path in (work / "cache").iterdir())
            # Two pairs; no temporary file is left.
            assert len(entries) == 2 and all(e.endswith(".json") for e in entries)


# ---- many models, many tensors

MODELS = 200
SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """200 fine-tunes of one small base, each somewhat farther from it."""
    folder = tmp_path_factory.mktemp("crowd")
    whole = llama_state(**SIZES)
    states = [tuned(whole, k, 1e-3 * (1 + k / 50)) for k in range(MODELS)]
    config = llama_config(**SIZES)
    return Family(
        base=write_model(folder / "base", cast(whole, torch.bfloat16), config),
        models=tuple(
            write_model(folder / f"m{k}", cast(state, torch.bfloat16), config)
            for k, state in enumerate(states)
        ),
        base_state=cast(whole, torch.bfloat16),
        states=tuple(cast(state, torch.bfloat16) for state in states),
    )


def test_two_hundred_models(crowd: Family, tmp_path: Path) -> None:
    config = merge_config(crowd.base, crowd.models)
    merged = run_mergekit(config, tmp_path / "out")
    lambdas = naive_coefficients(naive_sq_norms(crowd.base_state, crowd.states))
    assert merged.keys() == crowd.base_state.keys()
    for name, tensor in merged.items():
        models = [state[name] for state in crowd.states]
        assert_within_bound(tensor, crowd.base_state[name], models, lambdas)


@linux
def test_two_hundred_models_are_scanned_with_few_open_files(
    crowd: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight workers, each with a shard of all 201 folders open, hold no file open."""
    import resource

    monkeypatch.setattr(once, "_PAIRS", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 64, hard))
    try:
        found = mergekit_metagpt.scan(crowd.base, crowd.models, workers=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    expected = naive_sq_norms(crowd.base_state, crowd.states)
    sq_norms = found.pool("model").sq_norms
    torch.testing.assert_close(sq_norms, expected, rtol=1e-12, atol=0)


def test_two_hundred_models_in_a_report(crowd: Family, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    models = [str(model) for model in crowd.models]
    done = CliRunner().invoke(
        main,
        ["inspect", "--base", str(crowd.base), *models, "--json", str(file)],
        env={"COLUMNS": "400"},
    )
    assert done.exit_code == 0, done.output
    assert all(model in done.output for model in models)
    report = schema.Report.model_validate_json(file.read_text(encoding="utf-8"))
    (found,) = report.families
    sq_norms = naive_sq_norms(crowd.base_state, crowd.states).tolist()
    assert [m.sq_norm for m in found.models] == pytest.approx(sq_norms, rel=1e-12)
    assert [len(row) for row in found.cosines] == [MODELS] * MODELS


def test_few_results_are_kept(crowd: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAIRS", "REQUESTS"):
        monkeypatch.setattr(once, f"_{name}", {})
        monkeypatch.setattr(once, f"_MOST_{name}", 2)
    for model in crowd.models[:3]:
        mergekit_metagpt.scan(crowd.base, [model])
    assert len(once._PAIRS) == len(once._REQUESTS) == 2


TENSORS = 10_000


def test_ten_thousand_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(TENSORS, 4, generator=generator).to(torch.bfloat16)
    change = torch.randn(2, TENSORS, 4, generator=generator).to(torch.bfloat16)
    states = [shared, shared + change[0], shared + 2 * change[1]]
    paths = []
    for number, rows in enumerate(states):
        folder = tmp_path / str(number)
        folder.mkdir()
        named = {f"h.{at}.weight": row.clone() for at, row in enumerate(rows)}
        save_file(named, folder / "model.safetensors")
        paths.append(folder)
    found = mergekit_metagpt.scan(paths[0], paths[1:])
    assert len(found.names) == TENSORS
    expected = [naive_sq_norm(shared, state) for state in states[1:]]
    sq_norms = found.pool("model").sq_norms
    assert sq_norms.tolist() == pytest.approx(expected, rel=1e-12)
    assert len(found.pool("layer").keys) == TENSORS


# ---- one huge tensor


@pytest.fixture
def marked_parts_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a huge tensor, read only the parts that hold something; count all of it."""
    covered: list[int] = []
    everything = groups.Group.segments.fget
    assert everything is not None

    def some(group: groups.Group) -> list[slice]:
        parts = everything(group)
        assert parts[0].start == 0
        for part, following in pairwise(parts):
            assert part.stop == following.start
        covered.append(parts[-1].stop)
        return [
            part
            for part in parts
            if any(part.start <= at < part.stop for at in huge.MARKED)
        ]

    monkeypatch.setattr(groups.Group, "segments", property(some))
    return covered


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_a_tensor_of_more_than_two_to_the_31_elements(
    marked_parts_only: list[int], tmp_path: Path
) -> None:
    """By its parts that are not 0; `python -m tests.long.huge` reads all of it."""
    base, models = huge.write_family(tmp_path)
    assert sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*")) < 2**23
    opened, *tuned_models = (open_checkpoint(p) for p in (base, *models))
    result = one_pass.scan_checkpoints(opened, tuned_models)
    assert set(marked_parts_only) == {huge.NUMEL}
    found = result.sq_norms[result.names.index(huge.NAME)].tolist()
    assert found == [huge.sq_norm(0.5), huge.sq_norm(2.0)]
