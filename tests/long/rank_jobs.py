"""Ranks of a job as forks of one warm process: what they print and leave behind."""

from __future__ import annotations

import atexit
import functools
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import make_family
from tests.families import State, merge_config, read_model
from tests.long.forked import Ended, Forks, Job
from tests.long.killed import NO_FIGURE, QUIET

# Small enough that each rank writes several files.
SHARDS = ("--out-shard-size", "20K")
SEED = ("--random-seed", "7")
# Of mergekit, by its own names: what each needs beside the models.
THEIRS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "karcher": {},
}
OURS: dict[str, dict[str, Any]] = {
    "metagpt": {},
    "metagpt_ties": {"density": 0.5},
    "metagpt_dare_ties": {"density": 0.5},
    "metagpt_dare_linear": {"density": 0.5},
    "metagpt_della": {"density": 0.5, "epsilon": 0.1},
    "metagpt_della_linear": {"density": 0.5, "epsilon": 0.1},
    "metagpt_breadcrumbs": {"density": 0.5},
    "metagpt_breadcrumbs_ties": {"density": 0.5},
}


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True)
class Place:
    """A folder with a family, and a warm process whose forks are the ranks."""

    folder: Path
    forks: Forks

    @property
    def out(self) -> Path:
        return self.folder / "work" / "out"

    @property
    def parts(self) -> Path:
        """Where ranks work."""
        return self.out.with_name(".out.parts")

    def config(self, name: str = "metagpt", **settings: Any) -> Path:
        """Write the YAML of a method; return its path."""
        parameters = {**{**OURS, **THEIRS}.get(name, {}), **settings}
        family = [self.folder / "family" / n for n in ("base", "tuned0", "tuned1")]
        config = merge_config(family[0], family[1:], merge_method=name)
        if parameters:
            config["parameters"] = parameters
        file = self.folder / "merge.yml"
        file.write_text(yaml.safe_dump(config))
        return file

    def merge(self, *options: str) -> tuple[str, ...]:
        """The arguments that merge `merge.yml` into `out`."""
        file = str(self.folder / "merge.yml")
        return ("merge", file, str(self.out), *QUIET, *SHARDS, *options)

    def job(self, arguments: tuple[str, ...], **env: str) -> Job:
        off = {"MERGEKIT_METAGPT_CACHE": "0", "MERGEKIT_METAGPT_TIMEOUT": "20"}
        return Job(
            arguments=arguments,
            env={**off, **env},
            cwd=str(self.folder),
            watched=str(self.folder / "work"),
            teardown=False,
        )

    def ranks(
        self,
        size: int,
        arguments: tuple[str, ...],
        changes: Mapping[int, Mapping[str, Any]] | None = None,
        *,
        only: tuple[int, ...] | None = None,
        **env: str,
    ) -> list[Ended]:
        """Run a command on all ranks.

        Args:
            size: how many.
            arguments: of the command.
            changes: to the jobs of some ranks.
            only: the ranks that come; all if None.
            env: variables to set.
        """
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        jobs = []
        for rank in range(size) if only is None else only:
            own = {"RANK": str(rank), "WORLD_SIZE": str(size), **where, **env}
            job = self.job(arguments, **own)
            jobs.append(replace(job, **(changes or {}).get(rank, {})))
        return self.forks.run(*jobs)

    @contextmanager
    def work(self) -> Iterator[None]:
        """A new folder for the output."""
        self.out.parent.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(self.out.parent)

    def alone(self, *options: str) -> State:
        """What one process makes of `merge.yml`, which it alone may do."""
        with self.work():
            (ended,) = self.forks.run(self.job(self.merge(*options)))
            assert ended.status == 0, ended
            return read_model(self.out)

    def alone_by_mergekit(self, *options: str) -> State:
        """What `mergekit-yaml` makes of `merge.yml`."""
        with self.work():
            job = self.job(self.merge(*options)[1:])
            (ended,) = self.forks.run(replace(job, command="mergekit-yaml"))
            assert ended.status == 0, ended
            return read_model(self.out)


@contextmanager
def place() -> Iterator[Place]:
    """Write a family of two models, and start the warm process."""
    with tempfile.TemporaryDirectory(prefix="metagpt-ranks-") as name:
        folder = Path(name)
        family = make_family(folder / "family", count=2)
        config = merge_config(family.base, family.models)
        (folder / "merge.yml").write_text(yaml.safe_dump(config))
        first = (str(folder / "merge.yml"), str(folder / "warm"), *QUIET)
        forks = Forks(Job(arguments=("merge", *first), code=NO_FIGURE))
        try:
            yield Place(folder, forks)
        finally:
            forks.close()


@functools.cache
def shared_place() -> Place:
    """Return the one place of this process, which lasts as long as it does."""
    found = place()
    atexit.register(found.__exit__, None, None, None)
    return found.__enter__()
