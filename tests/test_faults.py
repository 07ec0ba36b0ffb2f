"""What goes wrong in the middle of a merge leaves nothing half done, and is said."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_metagpt
from mergekit_metagpt.arithmetic import scaled_sums, squared_norms
from mergekit_metagpt.checkpoints.files import Readers, read_header
from mergekit_metagpt.commands import merging, placing
from mergekit_metagpt.scanning import one_pass
from tests.broken import snapshot
from tests.conftest import Family, make_family
from tests.families import merge_config, read_model, run_command, run_mergekit, tuned
from tests.long import killed
from tests.long.forked import FULL, INTERRUPT, KILL, TERMINATE
from tests.long.killed import QUIET, Place, disturbed
from tests.merges import write_merge
from tests.oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def place() -> Place:
    """A family, and a warm process that merges it in forks."""
    return killed.shared_place()


def aborted(place: Place, *, complete: bool = False) -> str:
    """What our command says last after Ctrl-C."""
    out = place.folder / "work" / "out"
    if complete:
        return f"Aborted! {out} is complete all the same."
    return f"Aborted! Nothing was written to {out}."


# ---- killed, interrupted, disk full: in processes of their own


def test_killed_at_random_moments(place: Place) -> None:
    assert sum(killed.kill_at_random(place, 6).values()) == 6


@pytest.mark.parametrize("event", [KILL, TERMINATE, FULL, INTERRUPT])
def test_at_a_few_of_all_writes(event: str, place: Place) -> None:
    """`python -m tests.long.killed` takes every one of them."""
    writes = place.writes["mergekit-metagpt"]
    assert writes > 20
    for write in (1, writes // 4, writes // 2, 3 * writes // 4, writes):
        job = replace(place.job("mergekit-metagpt"), write=write, event=event)
        ended = disturbed(place, job)
        if event in (KILL, TERMINATE):
            number = signal.SIGKILL if event == KILL else signal.SIGTERM
            assert ended.status == -number, ended
        elif event == FULL and ended.status:
            assert ended.status == 2, ended
            last = ended.said.splitlines()[-1]
            assert last.startswith("Error: ") and "No space left on device" in last
        elif event == INTERRUPT:
            assert ended.status == 130, ended
            complete = write == writes  # the last one removes the hidden folder
            assert ended.said.splitlines()[-1] == aborted(place, complete=complete)


def test_control_c_while_it_cleans_up(place: Place) -> None:
    """The model is in its place by then; no hidden folder stays beside it."""
    write = place.writes["mergekit-metagpt"]
    job = replace(place.job("mergekit-metagpt"), write=write, event=INTERRUPT)
    with place.work() as work:
        (ended,) = place.forks.run(job)
        assert ended.status == 130 and ended.step == "clean-up", ended
        assert ended.said.splitlines()[-1] == aborted(place, complete=True)
        assert dict(snapshot(work / "out")) == place.reference["mergekit-metagpt"]
        assert not killed.hidden(work)


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        ("scanning.one_pass", "align", "OSError('cannot read lm_head.weight')"),
        ("commands.merging", "report_figure", "TypeError('no shape')"),
    ],
)
def test_control_c_that_a_library_takes_for_an_error(
    module: str, name: str, error: str, place: Place
) -> None:
    """As torch does when it is pressed while it asks Python about mapped storage."""
    code = f"""
import signal
import mergekit_metagpt.{module} as module

def swallowing(*arguments, **options):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise {error}

module.{name} = swallowing
"""
    ended = disturbed(place, replace(place.job("mergekit-metagpt"), code=code))
    assert ended.status == 130, ended
    assert ended.said.splitlines()[-1] == aborted(place)


def test_control_c_on_a_terminal(place: Place) -> None:
    assert sum(killed.interrupt_at_random(place, 3).values()) == 3


@pytest.mark.parametrize("size", [1_000, 68_000], ids=["report", "weights"])
def test_a_file_that_cannot_grow(size: int, place: Place) -> None:
    """By the system itself, as on a full disk; what is first too large has the name."""
    job = place.job("mergekit-metagpt", "--out-shard-size", "5B")
    ended = disturbed(place, replace(job, limits={"FSIZE": size}))
    assert ended.status == 2, ended
    last = ended.said.splitlines()[-1]
    assert last.startswith("Error: ") and "File too large" in last, ended


def test_an_old_model_survives_a_killed_merge(place: Place) -> None:
    """With --force the old model lies at its place, or in the hidden folder."""
    whole = place.reference["mergekit-metagpt"]
    job = place.job("mergekit-metagpt", "--force")
    seen, writes = [], 0
    # The last writes put the old model aside, the new one into place, and clean up.
    for back in range(-1, 10):
        with place.work() as work:
            out = work / "out"
            out.mkdir()
            (out / "old").write_text("precious")
            write = writes - back if writes else 0
            (ended,) = place.forks.run(replace(job, write=write, event=KILL))
            if not writes:
                assert ended.status == 0, ended
                writes = ended.writes
                continue
            assert ended.status == -signal.SIGKILL, ended
            if out.exists():
                held = dict(snapshot(out))
                assert held in (whole, {"old": b"precious"})
                seen.append("new" if held == whole else "old")
            else:
                (hidden,) = work.glob(".out.*")
                assert (hidden / "replaced" / "old").read_text() == "precious"
                seen.append("aside")
                killed.assert_next_run_is_right(place, work)
    assert set(seen) == {"old", "aside", "new"}, seen


def test_too_little_memory(place: Place) -> None:
    """Address space runs out at some point of the merge, wherever that is."""
    used = int(Path(f"/proc/{place.forks.pid}/statm").read_text().split()[0])
    bytes_ = used * os.sysconf("SC_PAGESIZE")
    statuses = set()
    for more in (-(1 << 24), 0, 1 << 20):
        job = place.job("mergekit-metagpt")
        ended = disturbed(place, replace(job, limits={"AS": bytes_ + more}))
        statuses.add(ended.status)
        assert ended.status in (0, 1, 2), ended
    assert statuses & {1, 2}, "memory sufficed each time"


def test_mergekit_yaml_when_it_is_killed(place: Place) -> None:
    """mergekit writes straight into the output: what is left may be incomplete.

    What it leaves never loads as another model, and the next run into the same folder
    gives the whole one.
    """
    kinds = killed.yaml_at_writes(place, every=2)
    assert kinds["some shards or no index: does not load"]


# ---- in this process


@pytest.fixture
def pair(tmp_path: Path) -> Family:
    """A base and two fine-tunes, each in several shards; not yet scanned."""
    return make_family(tmp_path / "family", count=2, shards=3)


@pytest.fixture
def job(pair: Family, tmp_path: Path) -> Path:
    """A YAML that merges them."""
    (tmp_path / "work").mkdir()
    return write_merge(tmp_path / "work" / "merge.yml", pair.base, pair.models)


def merge(file: Path, *options: str) -> int:
    """Run our command; return its exit status."""
    return run_command("merge", file, file.with_name("out"), *QUIET, *options)


def rewrite(folder: Path, family: Family, seed: int = 9) -> None:
    """Replace the shards of a model by those of another one of the same layout."""
    state = tuned(family.base_state, seed, 0.05)
    for file in folder.glob("*.safetensors"):
        part = {name: state[name].contiguous() for name in load_file(file)}
        new = file.with_name("new")
        save_file(part, new, metadata={"format": "pt"})
        new.replace(file)


def before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object]
) -> None:
    """Let something happen right before the first call of a function."""
    found, done = getattr(owner, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(True)
            act()
        return found(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


# A moment of our command, as the function that begins it.
MOMENTS: dict[str, tuple[Any, str]] = {
    "before the scan": (one_pass, "align"),
    "during the scan": (squared_norms, "flat_sq_norms"),
    "after the scan": (merging.plain_yaml, "export"),
    "before the merge": (merging, "report_figure"),
    "while tensors are merged": (scaled_sums, "merged_and_finite"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("what", ["replaced", "a shard removed", "removed"])
def test_a_model_that_is_replaced_or_removed_is_noticed(
    what: str,
    moment: str,
    pair: Family,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = pair.models[1]
    changes: dict[str, Callable[[], object]] = {
        "replaced": lambda: rewrite(model, pair),
        "a shard removed": next(model.glob("*.safetensors")).unlink,
        "removed": lambda: shutil.rmtree(model),
    }
    before(monkeypatch, *MOMENTS[moment], changes[what])
    found = snapshot(job.parent)
    assert merge(job) == 2
    said = capsys.readouterr().err
    assert str(model) in said
    assert what != "replaced" or "has changed since" in said
    assert snapshot(job.parent) == found


def test_read_errors_name_the_file(
    pair: Family,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_pieces = os.preadv

    def failing(handle: int, buffers: list[memoryview], offset: int) -> int:
        if str(pair.models[0]) in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return in_pieces(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = snapshot(job.parent)
    assert merge(job) == 2
    said = capsys.readouterr().err
    assert "Input/output error" in said and str(pair.models[0]) in said
    assert snapshot(job.parent) == found


def test_a_tensor_that_cannot_be_read_is_named(pair: Family) -> None:
    file = next(pair.base.glob("*.safetensors"))
    lost = replace(read_header("base", file).tensors[0], name="lost")
    with pytest.raises(OSError, match=f"cannot read lost from {file}"):
        Readers().read(lost)


def test_a_file_that_shrinks_during_the_scan_is_an_error(place: Place) -> None:
    """Its weights are read, not mapped: nothing sends SIGBUS."""
    code = """
import pathlib, sys
import mergekit_metagpt.arithmetic.squared_norms as squared_norms

found = squared_norms.flat_sq_norms

def shrinking(base, tuned, **options):
    for file in pathlib.Path("family/tuned0").glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.truncate(4096)
    squared_norms.flat_sq_norms = found
    return found(base, tuned, **options)

squared_norms.flat_sq_norms = shrinking
"""
    kept = {
        file: (file.read_bytes(), file.stat())
        for file in (place.folder / "family" / "tuned0").iterdir()
    }
    with place.work() as work:
        job = replace(place.job("mergekit-metagpt"), code=code)
        (ended,) = place.forks.run(job)
        for file, (content, stat) in kept.items():
            file.write_bytes(content)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert not ended.hung
        assert ended.status == 2, ended
        assert not (work / "out").exists()
        killed.assert_next_run_is_right(place, work)


# ---- what belongs to one version of the files must not meet another


@pytest.mark.parametrize("parameters", [{"granularity": "tensor"}, {"power": 0}])
def test_shards_of_two_versions_are_noticed_without_a_scan(
    parameters: dict[str, Any],
    pair: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is replaced after its first tensors were merged."""
    config = merge_config(pair.base, pair.models, parameters=parameters)
    owner, name = MOMENTS["while tensors are merged"]
    before(monkeypatch, owner, name, lambda: rewrite(pair.models[1], pair))
    with pytest.raises(OSError, match="has changed since"):
        run_mergekit(config, tmp_path / "out")


def in_place(folder: Path) -> None:
    """Change every weight of a model in place, as a program that maps the file may."""
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        length = int.from_bytes(content[:8], "little")
        content[8 + length :] = bytes(len(content) - 8 - length)
        with file.open("r+b") as stream:
            stream.write(content)


def test_a_model_that_changes_under_the_last_sum_is_noticed(
    pair: Family, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, left = scaled_sums.merged_and_finite, [len(pair.base_state)]

    def last(*args: Any) -> tuple[torch.Tensor, bool]:
        left[0] -= 1
        if not left[0]:
            in_place(pair.models[0])
        return merged(*args)

    monkeypatch.setattr(scaled_sums, "merged_and_finite", last)
    assert merge(job) == 2
    assert not job.with_name("out").exists()


# ---- workers


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_worker_without_memory_ends_the_scan(
    error: type[Exception], pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in one of the workers; the next scan is right."""
    calls = []
    sq_norms = squared_norms.flat_sq_norms

    def starved(*arguments: Any, **options: Any) -> list[float]:
        calls.append(True)
        if len(calls) == 5:
            raise error("cannot allocate")
        return sq_norms(*arguments, **options)

    monkeypatch.setattr(squared_norms, "flat_sq_norms", starved)
    with pytest.raises(error, match="cannot allocate"):
        mergekit_metagpt.scan(pair.base, pair.models, workers=3)
    found = mergekit_metagpt.scan(pair.base, pair.models, workers=3)
    monkeypatch.undo()
    alone = mergekit_metagpt.scan(pair.base, pair.models, workers=1)
    assert_same_bits(found.sq_norms, alone.sq_norms)


def test_out_of_memory_is_said_in_one_line(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starve() -> None:
        raise MemoryError

    before(monkeypatch, squared_norms, "flat_sq_norms", starve)
    assert merge(job) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and "memory" in said and said.count("\n") == 1


# ---- Ctrl-C between any two lines


class Interrupts:
    """Presses Ctrl-C before one line of two modules, the first time."""

    FILES = (merging.__file__, placing.__file__)

    def __init__(self, line: tuple[str, int] | None = None) -> None:
        self.line, self.pressed = line, False
        self.seen: list[tuple[str, int]] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Trace the frames of these modules alone."""
        return self.step if frame.f_code.co_filename in self.FILES else None

    def step(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Note a line, and interrupt it if it is the chosen one."""
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.seen.append(line)
            if line == self.line and not self.pressed:
                self.pressed = True
                sys.settrace(self)  # raising ends all tracing
                raise KeyboardInterrupt
        return self.step

    def merge(self, job: Path, *options: str) -> int:
        """Run our command; return its exit status."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return merge(job, *options)
        finally:
            sys.settrace(before)


def prepare(out: Path, place: str) -> list[str]:
    """Make the output anew: absent, empty, or an old model; return our options."""
    shutil.rmtree(out, ignore_errors=True)
    if place != "new":
        out.mkdir()
    if place == "old":
        (out / "old").write_text("precious")
    return ["--force"] if place == "old" else []


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges that draw nothing, which takes most of their time."""
    monkeypatch.setattr(merging, "report_figure", lambda report, file: file.touch())


every_place = pytest.mark.parametrize("place", ["new", "empty", "old"])


@every_place
def test_control_c_before_any_line_of_the_merge(
    place: str, job: Path, without_figures: None
) -> None:
    """At the output lies what lay there, or the whole model; beside it nothing."""
    out = job.with_name("out")
    options = prepare(out, place)
    found = snapshot(job.parent)
    undisturbed = Interrupts()
    assert undisturbed.merge(job, *options) == 0
    whole = snapshot(job.parent)
    lines = sorted(set(undisturbed.seen))
    assert len(lines) > 40
    seen = []
    for line in lines:
        prepare(out, place)
        assert Interrupts(line).merge(job, *options) == 130, line
        left = snapshot(job.parent)
        assert left in (found, whole), (line, left.keys())
        seen.append(left == whole)
    assert any(seen) and not all(seen)


@every_place
def test_control_c_during_any_rename(
    place: str, job: Path, without_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system has done it by the time that Python hears of the key."""
    out, rename, done = job.with_name("out"), Path.rename, 0

    def noted(self: Path, target: Path) -> Path:
        nonlocal done
        renamed = rename(self, target)
        done += 1
        if done == struck:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", noted)
    options, struck = prepare(out, place), 0
    found = snapshot(job.parent)
    assert merge(job, *options) == 0
    whole, count = snapshot(job.parent), done
    assert count >= {"new": 4, "old": 5, "empty": 10}[place]
    for struck in range(1, count + 1):
        prepare(out, place)
        done = 0
        assert merge(job, *options) == 130, struck
        left = snapshot(job.parent)
        assert left in (found, whole), (struck, left.keys())


# ---- the last step


def test_an_empty_output_on_another_disk(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume that is mounted at the output: no file can be renamed into it."""
    out = job.with_name("out")
    out.mkdir()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if (out in self.parents) != (out in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert merge(job) == 0
    assert (out / "config.json").is_file() and read_model(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
