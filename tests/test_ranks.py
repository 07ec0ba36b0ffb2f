"""Several ranks make what one process makes; whoever fails is named, and all end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mergekit_metagpt.scanning import dealing, ranks
from tests.conftest import make_family
from tests.families import State, merge_config, read_model
from tests.long import rank_jobs
from tests.long.forked import FULL, KILL
from tests.long.rank_jobs import SEED, Place, free_port
from tests.oracle import assert_same_states


@pytest.fixture(scope="module")
def place() -> Place:
    return rank_jobs.shared_place()


@pytest.fixture(scope="module")
def expected(place: Place) -> State:
    """What one process makes by `metagpt`."""
    place.config()
    return place.alone()


def errors(ended: rank_jobs.Ended) -> list[str]:
    return [line for line in ended.said.splitlines() if line.startswith("Error: ")]


# ---- shares


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_shares_are_balanced_and_in_order(count: int) -> None:
    # A model of 80 layers with two embeddings, by the sizes of its tensors.
    layer = [64, 8, 8, 64, 224, 224, 224, 1, 1]
    sizes = [1024, *(size * (1 + at % 3) for at in range(80) for size in layer), 1024]
    owners = dealing.owners(sizes, count)
    shares = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(count)
    ]
    mean = sum(sizes) / count
    if max(sizes) <= mean:
        assert max(abs(share / mean - 1) for share in shares) <= 0.1
    small = [
        owner
        for size, owner in zip(sizes, owners, strict=True)
        if size <= dealing.LARGE * mean
    ]
    assert small == sorted(small)


def test_shares_of_few_and_of_empty_tensors() -> None:
    assert sorted(dealing.owners([5, 3], 4)) != [0, 0]
    assert dealing.owners([0, 0, 0], 2) == [0, 0, 0]
    assert dealing.owners([], 3) == []


# ---- the same tensors


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_same_bits_as_one_process(size: int, place: Place, expected: State) -> None:
    place.config()
    with place.work():
        all_ended = place.ranks(size, place.merge())
        assert [ended.status for ended in all_ended] == [0] * size, all_ended
        assert_same_states(read_model(place.out), expected)
        first, *others = all_ended
        assert first.said.count("coefficients of the whole model") == 1
        assert "Wrote " in first.said
        assert not any(ended.said for ended in others)
        assert [path.name for path in place.out.parent.iterdir()] == ["out"]
        index = json.loads((place.out / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in place.out.glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == files
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        names = {path.name for path in place.out.iterdir()} - set(files)
        assert names == {
            *("README.md", "config.json", "mergekit_config.yml"),
            *("metagpt.json", "metagpt.png", "mergekit_config.plain.yml"),
            "model.safetensors.index.json",
        }


@pytest.mark.parametrize("method", ["metagpt_dare_ties", "ties"])
def test_methods_that_draw_and_methods_of_mergekit(method: str, place: Place) -> None:
    """`python -m tests.long.ranked` takes every method."""
    place.config(method)
    alone = place.alone if method in rank_jobs.OURS else place.alone_by_mergekit
    reference = alone(*SEED)
    with place.work():
        all_ended = place.ranks(2, place.merge(*SEED))
        assert [ended.status for ended in all_ended] == [0, 0], all_ended
        assert_same_states(read_model(place.out), reference)


def test_inspect_and_a_cache_of_rank_0_alone(place: Place, tmp_path: Path) -> None:
    config = str(place.config("metagpt", granularity="layer"))
    (alone,) = place.forks.run(place.job(("inspect", config, "--json", "-")))
    first, second = place.ranks(2, ("inspect", config, "--json", "-"))
    assert (first.status, second.status) == (0, 0), (first, second)
    assert json.loads(first.said) == json.loads(alone.said)
    assert second.said == ""


# ---- failures


def test_ranks_that_see_other_models_are_refused_before_they_scan(
    place: Place, tmp_path: Path
) -> None:
    """Else one rank's sums would be of other weights, and stay in rank 0's cache."""
    config = place.config()
    elsewhere = make_family(tmp_path / "family", count=2, sizes=(3e-2, 4e-3))
    text = yaml.safe_dump(merge_config(elsewhere.base, elsewhere.models))
    cache = tmp_path / "cache"
    other = tmp_path / "merge.yml"
    other.write_text(text)
    all_ended = place.ranks(
        2,
        ("inspect", str(config)),
        {1: {"arguments": ("inspect", str(other))}},
        MERGEKIT_METAGPT_CACHE=str(cache),
    )
    for ended in all_ended:
        assert ended.status == 2
        (line,) = errors(ended)
        assert "rank 1 of 2" in line and "sees other models than rank 0" in line
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_other_ranks_end_as_rank_0_does(place: Place) -> None:
    """It completes the model alone: until then nobody has finished."""
    place.config()
    fail = """
import mergekit_metagpt.commands.placing as placing
def put(*args, **kwargs):
    raise OSError(28, "No space left on device", "out")
placing.put = put
"""
    with place.work():
        for ended in place.ranks(2, place.merge(), {0: {"code": fail}}):
            assert ended.status == 2
            (line,) = errors(ended)
            assert "rank 0 of 2" in line and "No space left on device" in line
        assert not place.out.exists()
        all_ended = place.ranks(2, place.merge("--resume"))
        assert [ended.status for ended in all_ended] == [0, 0], all_ended


def version_of(path: Path) -> tuple[int, int]:
    """What a file keeps when it is renamed; two files may have one time."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize("before_last", [0, 1, 2])
def test_a_killed_rank_is_named_and_resume_goes_on(
    before_last: int, place: Place, expected: State
) -> None:
    place.config()
    with place.work():
        # Rank 1 dies as it names its last file, or writes or names that one's manifest.
        writes = place.ranks(2, place.merge())[1].writes
        place.out.rename(place.folder / "whole")
        kill = {"write": writes - before_last, "event": KILL}
        first, second = place.ranks(2, place.merge(), {1: kill})
        assert second.status == -signal.SIGKILL
        assert first.status == 2 and not place.out.exists()
        (line,) = errors(first)
        assert "rank 1 of 2" in line and "killed" in line
        whole = [
            p.with_suffix(".safetensors") for p in place.parts.glob("shard-*.json")
        ]
        kept = {path.name: version_of(path) for path in whole}
        assert len(kept) > 1

        # Without --resume nothing is touched; with it, what is finished is used.
        (refused, _) = place.ranks(2, place.merge())
        assert refused.status == 2 and "--resume" in errors(refused)[0]
        damaged = next(iter(kept))
        with (place.parts / damaged).open("ab") as stream:
            stream.write(b"?")
        all_ended = place.ranks(2, place.merge("--resume"))
        assert [ended.status for ended in all_ended] == [0, 0], all_ended
        assert_same_states(read_model(place.out), expected)
        versions = {version_of(path) for path in place.out.glob("*.safetensors")}
        assert versions >= {kept[name] for name in kept if name != damaged}
        assert kept[damaged] not in versions
    shutil.rmtree(place.folder / "whole")


def test_a_full_disk_of_one_rank(place: Place) -> None:
    place.config()
    with place.work():
        first, second = place.ranks(2, place.merge(), {1: {"write": 3, "event": FULL}})
        for ended in (first, second):
            assert ended.status == 2
            (line,) = errors(ended)
            assert "rank 1 of 2" in line and "No space left on device" in line
        assert not place.out.exists()


def test_a_rank_that_never_comes(place: Place) -> None:
    place.config()
    limit = {"MERGEKIT_METAGPT_TIMEOUT": "1"}
    (ended,) = place.ranks(2, place.merge(), only=(0,), **limit)
    assert ended.status == 2 and "rank 1 of 2 did not come within 1 s" in ended.said
    (ended,) = place.ranks(2, place.merge(), only=(1,), **limit)
    assert ended.status == 2 and "rank 1 of 2" in ended.said
    assert "cannot reach rank 0 at 127.0.0.1" in ended.said


def test_a_rank_that_hangs(place: Place) -> None:
    place.config()
    hang = """
import time
import mergekit.io.tensor_writer as writer
import mergekit_metagpt.scanning.ranks as ranks
ranks.GRACE_S = 0.0
writer.TensorWriter.save_tensor = lambda *a, **k: time.sleep(1000)
"""
    with place.work():
        all_ended = place.ranks(
            2, place.merge(), {1: {"code": hang}}, MERGEKIT_METAGPT_TIMEOUT="2"
        )
        for ended in all_ended:
            assert ended.status == 2
            (line,) = errors(ended)
            assert "rank 1 of 2" in line and "made no progress for 2 s" in line


def test_a_file_system_that_is_not_shared(place: Place) -> None:
    place.config()
    blind = """
import mergekit_metagpt.commands.shards as shards
shards.SEEN_S = 0.5
shards.holds = lambda folder, token: False
"""
    with place.work():
        all_ended = place.ranks(2, place.merge(), {1: {"code": blind}})
        for ended in all_ended:
            assert ended.status == 2
            assert "rank 1 of 2" in ended.said and "share the file system" in ended.said
        assert not list(place.out.parent.iterdir())


def test_bad_input_is_said_once_by_each_rank(place: Place) -> None:
    place.config(weight="much")
    with place.work():
        for ended in place.ranks(2, place.merge()):
            assert ended.status == 2
            (line,) = errors(ended)
            assert "weight" in line


@pytest.mark.parametrize(
    "method, options, part",
    [
        ("arcee_fusion", (), "arcee_fusion samples"),
        ("metagpt_dare_ties", (), "give --random-seed"),
        ("metagpt", ("--multi-gpu",), "--multi-gpu"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    method: str, options: tuple[str, ...], part: str, place: Place
) -> None:
    place.config(method)
    with place.work():
        (ended,) = place.ranks(1, place.merge(*options))
        assert ended.status == 2 and part in errors(ended)[0]


def test_a_complete_merge_has_nothing_to_resume(place: Place) -> None:
    """A job that is started again after its end must not fail, or merge again."""
    config = place.config()
    with place.work():
        (ended,) = place.ranks(1, place.merge())
        assert ended.status == 0, ended
        before = {path: version_of(path) for path in place.out.iterdir()}
        first, second = place.ranks(2, place.merge("--resume"))
        assert (first.status, second.status) == (0, 0), (first, second)
        assert "is complete" in first.said and "nothing to resume" in first.said
        assert "Wrote" not in first.said and not second.said
        assert {path: version_of(path) for path in place.out.iterdir()} == before
        # Another merge is not this one, and an incomplete one is not complete.
        config.write_text(config.read_text() + "# another\n")
        (ended,) = place.ranks(1, place.merge("--resume"))
        assert ended.status == 2 and "from another YAML" in errors(ended)[0]
        place.config()
        weights = next(place.out.glob("*.safetensors"))
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        (ended,) = place.ranks(1, place.merge("--resume"))
        assert ended.status == 2 and "is not whole" in errors(ended)[0]
        assert "--force" in errors(ended)[0]
        config.write_text(config.read_text() + "# another\n")
        (ended,) = place.ranks(1, place.merge("--resume"))
        assert ended.status == 2 and "is not empty" in errors(ended)[0]
        place.config()
        weights.write_bytes(whole)
        (place.out / "config.json").unlink()
        (ended,) = place.ranks(1, place.merge("--resume"))
        assert ended.status == 2 and "is not empty" in errors(ended)[0]


def test_a_store_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    def fail(*args: object, **kwargs: object) -> None:
        raise distributed.DistError

    monkeypatch.setattr(distributed, "TCPStore", fail)
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="cannot listen on here:1: DistError"):
        ranks.join()


def test_an_incomplete_environment_is_refused(place: Place) -> None:
    place.config()
    (ended,) = place.forks.run(place.job(place.merge(), RANK="0", WORLD_SIZE="2"))
    assert ended.status == 2 and "MASTER_ADDR, MASTER_PORT" in ended.said


# ---- the real launcher


def test_two_nodes_by_torchrun(place: Place, expected: State) -> None:
    place.config()
    rendezvous = f"127.0.0.1:{free_port()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", rendezvous, "--local-addr", "127.0.0.1"]
    command = [*launcher, "-m", "mergekit_metagpt", *place.merge()]
    env = {**os.environ, "MERGEKIT_METAGPT_CACHE": "0", "OMP_NUM_THREADS": "1"}
    with place.work():
        nodes = [
            subprocess.Popen(
                command,
                env=env,
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        said = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert sum(text.count("Wrote ") for text in said) == 1
        assert_same_states(read_model(place.out), expected)


def test_numbers_are_skipped_as_mergekit_draws_them() -> None:
    import torch
    from mergekit.sparsify import bernoulli

    from mergekit_metagpt.merge_config import dividing

    with torch.random.fork_rng(devices=[]):
        states = []
        for draw in (
            lambda: bernoulli(torch.ones(1500, 1000, dtype=torch.bfloat16), 0.3),
            lambda: dividing.skip(1_500_000),
        ):
            torch.manual_seed(0)
            draw()
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
