"""Ends merges at every write and at random moments: what is left, and the next run."""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from tests.broken import snapshot
from tests.conftest import make_family
from tests.families import merge_config
from tests.long.forked import FULL, INTERRUPT, KILL, Ended, Forks, Job

LONG_AGO = 1_600_000_000
QUIET = ("--no-copy-tokenizer", "--quiet")
# Small enough that the merge is written in several shards.
SHARDS = ("--out-shard-size", "30K")
NO_FIGURE = """
import mergekit_metagpt.commands.merging as merging

def quick(report, file):
    file.write_bytes(bytes(64_000))

merging.report_figure = quick
"""


@dataclass(frozen=True)
class Place:
    """A folder with a family, its merge YAML and the undisturbed result.

    Attributes:
        folder: all of it; holds nothing else when a merge begins.
        forks: the warm process that merges.
        reference: names and bytes of the merged folder, by command.
        seconds: what the undisturbed merges took, without Python's own ending.
        writes: how many changes of the file system they made.
    """

    folder: Path
    forks: Forks
    reference: dict[str, dict[str, bytes | None]]
    seconds: dict[str, float]
    writes: dict[str, int]

    def job(self, command: str, *options: str) -> Job:
        """The undisturbed merge into `work/out`, with a cache in `work/cache`."""
        work = self.folder / "work"
        file = str(self.folder / "merge.yml")
        return Job(
            arguments=("merge",) * (command == "mergekit-metagpt")
            + (file, str(work / "out"), *QUIET, *SHARDS, *options),
            command=command,
            env={"MERGEKIT_METAGPT_CACHE": str(work / "cache")},
            cwd=str(self.folder),
            watched=str(work),
        )

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A new folder for the output and the cache."""
        work = self.folder / "work"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work)


@contextmanager
def place(code: str = "") -> Iterator[Place]:
    """Write a family of two models, and merge it by both commands.

    Args:
        code: Python that changes what all merges do.

    Yields:
        the place.
    """
    with tempfile.TemporaryDirectory(prefix="metagpt-killed-") as name:
        folder = Path(name)
        warm = make_family(folder / "warm", count=1)
        family = make_family(folder / "family", count=2)
        for file in (folder / "family").rglob("*"):
            os.utime(file, (LONG_AGO, LONG_AGO))  # old enough to be remembered
        config = merge_config(family.base, family.models)
        (folder / "merge.yml").write_text(yaml.safe_dump(config))
        config = merge_config(warm.base, warm.models)
        (folder / "warm.yml").write_text(yaml.safe_dump(config))
        first = (str(folder / "warm.yml"), str(folder / "warm" / "out"), *QUIET)
        forks = Forks(Job(arguments=("merge", *first), code=code))
        found = Place(folder, forks, {}, {}, {})
        for command in ("mergekit-metagpt", "mergekit-yaml"):
            job = replace(found.job(command), teardown=False)
            for _ in range(2):
                with found.work() as work:
                    (ended,) = forks.run(job)
                    assert ended.status == 0, ended
                    result = dict(snapshot(work / "out"))
                assert found.reference.setdefault(command, result) == result
                least = min(ended.seconds, found.seconds.get(command, ended.seconds))
                found.seconds[command] = least
                found.writes[command] = ended.writes
        try:
            yield found
        finally:
            forks.close()


@functools.cache
def shared_place() -> Place:
    """Return the one place of this process, which lasts as long as it does.

    Its merges draw no figure, which takes most of the time of so small a merge.
    """
    found = place(NO_FIGURE)
    atexit.register(found.__exit__, None, None, None)
    return found.__enter__()


def hidden(work: Path) -> list[str]:
    """Names of what lies beside the output and the cache."""
    return sorted(p.name for p in work.iterdir() if p.name not in ("out", "cache"))


def disturbed(place: Place, job: Job) -> Ended:
    """Run a disturbed `mergekit-metagpt merge`; check what is left, then merge again.

    At the place of the output lies nothing, or the whole model. Beside it nothing, or,
    after a kill, one hidden folder. The next run gives the undisturbed bytes.
    """
    whole = place.reference["mergekit-metagpt"]
    with place.work() as work:
        (ended,) = place.forks.run(job)
        assert not ended.hung, ended
        out, left = work / "out", hidden(work)
        if ended.status in (-signal.SIGKILL, -signal.SIGTERM):
            assert len(left) <= 1 and all(n.startswith(".out.") for n in left), left
        else:
            assert not left, (left, ended)
        if out.exists():
            assert dict(snapshot(out)) == whole, ended
        elif ended.status == 0:
            raise AssertionError(f"it said that it merged: {ended}")
        assert_next_run_is_right(place, work)
    return ended


def assert_next_run_is_right(place: Place, work: Path) -> None:
    """Check that a merge with the same cache gives the undisturbed bytes."""
    left = hidden(work)
    job = place.job("mergekit-metagpt", "--force")
    (ended,) = place.forks.run(replace(job, teardown=False))
    assert ended.status == 0, ended
    whole = place.reference["mergekit-metagpt"]
    assert dict(snapshot(work / "out")) == whole
    assert hidden(work) == left


def strike(place: Place, job: Job, count: int, seed: int) -> Iterator[Ended]:
    """Disturb merges at random moments, until so many were struck in the middle."""
    chosen = random.Random(seed)
    for _ in range(4 * count):
        after = chosen.uniform(0, place.seconds["mergekit-metagpt"])
        ended = disturbed(place, replace(job, after_s=after))
        if ended.status:
            count -= 1
            yield ended
        if not count:
            return
    raise AssertionError("most merges were over before they were struck")


def kill_at_random(place: Place, count: int, seed: int = 0) -> Counter[str]:
    """Send SIGKILL at random moments; return the steps in which it struck."""
    job = place.job("mergekit-metagpt")
    return Counter(ended.step for ended in strike(place, job, count, seed))


def interrupt_at_random(place: Place, count: int, seed: int = 1) -> Counter[str]:
    """Press Ctrl-C on a terminal at random moments; return the steps it struck in."""
    job = place.job("mergekit-metagpt")
    job = replace(job, number=signal.SIGINT, terminal=True)
    steps: Counter[str] = Counter()
    for ended in strike(place, job, count, seed):
        # Before and after our command has its say, Python itself ends by SIGINT.
        edge = ended.step in ("start", "clean-up")
        assert edge or (ended.status == 130 and "Aborted!" in ended.said), ended
        steps[ended.step] += 1
    return steps


def at_writes(place: Place, event: str, every: int = 1) -> Counter[str]:
    """Let something happen at every write; return the steps in which it struck."""
    steps: Counter[str] = Counter()
    for write in range(1, place.writes["mergekit-metagpt"] + 1, every):
        job = replace(place.job("mergekit-metagpt"), write=write, event=event)
        ended = disturbed(place, job)
        steps[ended.step if ended.status else "merged all the same"] += 1
    return steps


def yaml_at_writes(place: Place, every: int = 1) -> Counter[str]:
    """Kill `mergekit-yaml` at every write; count what its output folder holds then."""
    whole = place.reference["mergekit-yaml"]
    kinds: Counter[str] = Counter()
    for write in range(1, place.writes["mergekit-yaml"] + 1, every):
        with place.work() as work:
            job = replace(place.job("mergekit-yaml"), write=write, event=KILL)
            (ended,) = place.forks.run(job)
            assert ended.status == -signal.SIGKILL, ended
            kinds[_kind(work / "out", whole)] += 1
            again = replace(place.job("mergekit-yaml"), teardown=False)
            (ended,) = place.forks.run(again)
            assert ended.status == 0, ended
            held = dict(snapshot(work / "out"))
            assert {name: held[name] for name in whole} == whole
    return kinds


def _kind(out: Path, whole: dict[str, bytes | None]) -> str:
    if not out.exists():
        return "no folder"
    held = dict(snapshot(out))
    if held == whole:
        return "the whole model"
    weights = {n for n in whole if "safetensors" in n}
    if not weights <= held.keys():
        return "some shards or no index: does not load"
    if "config.json" not in held:
        return "all weights, no config.json: does not load"
    return "all weights and config.json, other files missing: loads"


def report(name: str, work: Callable[[], Counter[str]]) -> None:
    """Do one thing, and print in which steps it struck."""
    seen = work()
    print(f"{name}: {sum(seen.values())} merges, {dict(seen)}", flush=True)


def main() -> None:
    """Run all, and print what was seen."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    started = time.monotonic()
    with place() as found:
        print(f"one merge: {found.seconds} s; writes: {found.writes}", flush=True)
        for name, work in {
            f"SIGKILL at {count} random moments": lambda: kill_at_random(found, count),
            "SIGKILL at every write": lambda: at_writes(found, KILL),
            "the disk full from every write on": lambda: at_writes(found, FULL),
            "Ctrl-C at every write": lambda: at_writes(found, INTERRUPT),
            "Ctrl-C at 50 random moments": lambda: interrupt_at_random(found, 50),
            "mergekit-yaml: SIGKILL at every write": lambda: yaml_at_writes(found),
        }.items():
            report(name, work)
    # Most of the time of so small a merge goes into the figure: again without it.
    with place(NO_FIGURE) as found:
        print(f"without a figure: {found.seconds} s; writes: {found.writes}")
        report(
            f"SIGKILL at {count} random moments", lambda: kill_at_random(found, count)
        )
        report("Ctrl-C at 50 random moments", lambda: interrupt_at_random(found, 50))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
