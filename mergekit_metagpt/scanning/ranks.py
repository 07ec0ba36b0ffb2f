"""The ranks of one job: what they tell each other, and which of them has failed."""

from __future__ import annotations

import math
import os
import pickle
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
# Seconds without progress after which a rank, or a node that never came, is given up.
VARIABLE = "MERGEKIT_METAGPT_TIMEOUT"
TIMEOUT_S = 1800.0
# Of a rank on another node. A writer of gigabytes may keep Python's other threads from
# running for minutes.
SILENT_S = 300.0
BEAT_S = 1.0
# How long a rank may take to notice that another one has failed, before it is ended.
GRACE_S = 30.0
_FAILED = "failed"
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def timeout() -> float:
    """Return after how many seconds a rank without progress is given up.

    Raises a ValueError if the environment has something else than a positive number.
    """
    given = os.environ.get(VARIABLE, "")
    try:
        seconds = float(given) if given else TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"{VARIABLE} is {given!r}; expected seconds, such as 1800")
    return seconds


@dataclass(frozen=True)
class _Peer:
    """A rank as it introduces itself: `space` tells in which space its `pid` is."""

    host: str
    space: str
    pid: int

    @classmethod
    def here(cls) -> _Peer:
        space = ""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        except OSError:  # not Linux
            pass
        return cls(socket.gethostname(), space, os.getpid())

    def is_gone(self, here: _Peer) -> bool:
        """Whether the process has ended, as far as can be seen from here."""
        if not here.space or (self.host, self.space) != (here.host, here.space):
            return False
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return True
        return status.rpartition(")")[2].split()[0] in "ZX"


def _loaded(packed: bytes) -> Any:
    return pickle.loads(zlib.decompress(packed))


@dataclass
class _Heard:
    """The last beat of a rank, and when it, and its count of steps, changed."""

    beat: bytes = b""
    steps: bytes = b""
    beat_at: float = field(default_factory=time.monotonic)
    steps_at: float = field(default_factory=time.monotonic)


class Group:
    """All ranks of a job, as one of them sees it.

    Ranks exchange values through torch's key-value store, and watch each other: each
    publishes a beat that counts its steps; rank 0 watches all others, they watch rank
    0. The first that fails, or is found to have ended, names rank and cause for all.

    Args:
        store: torch's, shared by all ranks.
        rank: number of this one, from 0.
        size: how many there are.
        address: where the store is, for messages.
    """

    def __init__(self, store: Store, rank: int, size: int, address: str = "") -> None:
        self._store, self.rank, self.size = store, rank, size
        self._address, self._limit = address, timeout()
        self._silence = max(10 * BEAT_S, min(SILENT_S, self._limit))
        self._exchanges = self._steps = 0
        self._failure: str | None = None
        self._ended = threading.Event()
        self._here = _Peer.here()
        self._peers = {rank: self._here}
        if size > 1:
            self._introduce()
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which prints, and completes what all have made."""
        return self.rank == 0

    @property
    def me(self) -> str:
        """This rank, for messages."""
        return self._named(self.rank)

    def _named(self, rank: int) -> str:
        return f"rank {rank} of {self.size} on {self._peers[rank].host}"

    def _introduce(self) -> None:
        """Meet all other ranks."""
        keys = [f"hello/{rank}" for rank in range(self.size)]
        with self._connected():
            self._store.set(f"beat/{self.rank}", "")
            self._put(keys[self.rank], self._here)
            # Rank 0 says it to the others, which wait a little longer for that.
            until = time.monotonic() + self._limit + (0 if self.leads else 5)
            while not self._store.check(keys):
                if time.monotonic() > until:
                    missing = [n for n, k in enumerate(keys) if not self._has(k)]
                    self.fail(
                        f"rank {', '.join(map(str, missing[:10]))} of {self.size} did "
                        f"not come within {self._limit:g} s ({len(missing)} missing in "
                        f"all). See that all nodes start, and reach {self._address}; "
                        f"{VARIABLE} sets the seconds"
                    )
                    if self.leads:
                        time.sleep(1)
                if self._has(_FAILED):
                    raise ValueError(self._store.get(_FAILED).decode())
                time.sleep(0.05)
            peers = self._store.multi_get(keys)
            self._peers = {rank: _loaded(peer) for rank, peer in enumerate(peers)}

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        from torch.distributed import DistError

        try:
            yield
        except DistError as error:
            self._failure = self._failure or self._lost()
            raise ValueError(self._failure) from error

    def _lost(self) -> str:
        """What to say when the store does not answer, which lives with rank 0."""
        met = len(self._peers) == self.size
        if met and self._peers[0].is_gone(self._here):
            return self._gone(0)
        where = f" on {self._peers[0].host}" if met else ""
        return (
            f"rank 0 of {self.size}{where} is not to be reached any more at "
            f"{self._address}: it, its launcher or its node has ended. Its log says why"
        )

    def check(self) -> None:
        """Take note of a step of this rank; raise if another rank has failed.

        Raises:
            ValueError: rank and cause.
        """
        self._steps += 1
        if self._failure is not None:
            raise ValueError(self._failure)

    def fail(self, cause: str) -> str:
        """Let all ranks end; return the cause that all are told, the first one's."""
        from torch.distributed import DistError

        if self._failure is None:
            try:
                self._failure = self._store.compare_set(_FAILED, "", cause).decode()
            except DistError:
                self._failure = cause
        return self._failure

    def terminated(self) -> str:
        """Return why this rank was asked to end: the cause, if another one failed.

        A launcher ends all ranks of a node as soon as one of them has ended.
        """
        return self._fail_if_gone() or self.fail(
            f"{self.me} was asked to end (SIGTERM): by its launcher, a time limit or "
            "another job"
        )

    def _fail_if_gone(self) -> str | None:
        """Let all ranks end if one of this node has, other than by `leave`."""
        for rank, peer in self._peers.items():
            if peer.is_gone(self._here) and not self._left(rank):
                return self.fail(self._gone(rank))
        return None

    def _left(self, rank: int) -> bool:
        from torch.distributed import DistError

        try:
            return self._has(f"bye/{rank}")
        except DistError:
            return True

    def _gone(self, rank: int) -> str:
        return (
            f"{self._named(rank)} has ended without a word: it was killed, or ran out "
            "of memory. Its launcher or its system says why"
        )

    def share(self, value: T) -> T:
        """Return rank 0's value on all ranks; others may pass anything.

        Raises a ValueError if another rank has failed.
        """
        if self.size == 1:
            return value
        key = self._next()
        if self.leads:
            with self._connected():
                self._put(key, value)
            return value
        self._await([key])
        with self._connected():
            shared: T = _loaded(self._store.get(key))
        return shared

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on all ranks.

        Raises a ValueError if another rank has failed.
        """
        if self.size == 1:
            return [value]
        name = self._next()
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        with self._connected():
            self._put(keys[self.rank], value)
        self._await(keys)
        with self._connected():
            texts = self._store.multi_get(keys)
        return [_loaded(text) for text in texts]

    def require_same(self, value: object, what: str) -> None:
        """Raise a ValueError if the value of a rank is not rank 0's."""
        first, *others = self.gather(value)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"{self._named(rank)} sees other {what} than rank 0. Give all "
                    "ranks the same command, environment and file system"
                )

    def _put(self, key: str, value: object) -> None:
        packed = zlib.compress(pickle.dumps(value), 1)
        self._store.set(key, packed)  # type: ignore[arg-type]  # takes bytes, too

    def leave(self) -> None:
        """End this rank's part; rank 0, which may host the store, waits for others."""
        from torch.distributed import DistError

        self._ended.set()
        try:
            self._store.set(f"bye/{self.rank}", "")
            if self.leads:
                until = time.monotonic() + 10 * BEAT_S
                while time.monotonic() < until and not all(
                    self._left(rank) or peer.is_gone(self._here)
                    for rank, peer in self._peers.items()
                ):
                    time.sleep(0.05)
        except DistError:
            pass  # who hosts the store has left

    def _next(self) -> str:
        self._exchanges += 1
        return f"value/{self._exchanges}"

    def _await(self, keys: Sequence[str]) -> None:
        pause = 0.005
        while True:
            self.check()
            with self._connected():
                if self._store.check(list(keys)):
                    return
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def _watch(self) -> None:
        """Publish beats, and look at those of others, until this rank ends."""
        watched = range(1, self.size) if self.leads else range(1)
        heard = {rank: _Heard() for rank in watched}
        noticed, beats = None, 0
        while not self._ended.wait(BEAT_S):
            beats += 1
            if self._failure is None:
                self._look(f"{beats} {self._steps}", heard)
            if self._failure is None:
                continue
            noticed = noticed or time.monotonic()
            if time.monotonic() - noticed > GRACE_S:
                # The main thread hangs, or computes for long: nothing waits for it.
                print(f"Error: {self._failure}", file=sys.stderr, flush=True)
                os._exit(2)

    def _look(self, beat: str, heard: dict[int, _Heard]) -> None:
        from torch.distributed import DistError

        try:
            self._store.set(f"beat/{self.rank}", beat)
            if self._has(_FAILED):
                self._failure = self._store.get(_FAILED).decode()
                return
            if self._fail_if_gone():
                return
            keys = [f"beat/{rank}" for rank in heard]
            beats = self._store.multi_get(keys)
        except DistError:
            if not self._ended.is_set():
                self._failure = self._failure or self._lost()
            return
        now = time.monotonic()
        for (rank, last), text in zip(heard.items(), beats, strict=True):
            steps = text.partition(b" ")[2]
            if text != last.beat:
                last.beat, last.beat_at = text, now
            if steps != last.steps:
                last.steps, last.steps_at = steps, now
            silent = now - last.beat_at > self._silence
            stuck = now - last.steps_at > self._limit
            if (silent or stuck) and not self._left(rank):
                why = (
                    f"was not heard of for {self._silence:g} s: its node or the "
                    "network is down"
                    if silent
                    else f"made no progress for {self._limit:g} s: see whether its "
                    f"file system answers. {VARIABLE} sets the seconds"
                )
                self.fail(f"{self._named(rank)} {why}")
                return


def join() -> Group | None:
    """Join the other ranks of a job that `torchrun` or the like has started.

    Returns:
        the group; None where the environment has no ranks.

    Raises:
        ValueError: the environment is incomplete; rank 0 cannot be reached; a rank
            does not come in time.
    """
    given = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
    if not given["RANK"] and given["WORLD_SIZE"] in ("", "1"):
        return None
    if given["WORLD_SIZE"] == "1":
        return alone()
    if missing := [name for name, value in given.items() if not value]:
        raise ValueError(
            f"{', '.join(missing)} is not set in the environment, and others of "
            f"{', '.join(_ENVIRONMENT)} are. Start all ranks by torchrun, or set all "
            "four"
        )
    try:
        rank, size, port = (
            int(given[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")
        )
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and MASTER_PORT: {error}") from error
    if not 0 <= rank < size:
        raise ValueError(f"RANK is {rank}; expected one from 0 to {size - 1}")
    # torch exports them without saying so to type checkers.
    from torch import distributed as dist

    # torchrun hosts a store of its own.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, limit = f"{given['MASTER_ADDR']}:{port}", timeout()
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            given["MASTER_ADDR"],
            port,
            is_master=hosts,
            timeout=timedelta(seconds=limit / 2),  # it tries twice
            wait_for_workers=False,
        )
    except dist.DistError as error:
        host, said = socket.gethostname(), str(error).partition("\n")[0]
        raise ValueError(
            f"rank {rank} of {size} on {host} cannot "
            f"{'listen on' if hosts else 'reach rank 0 at'} {address}: "
            f"{said or type(error).__name__}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"metagpt/{attempt}", store)  # type: ignore[attr-defined]
    return Group(own, rank, size, address)


def alone() -> Group:
    """Return a group of one rank, which needs no store of others."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    return Group(HashStore(), 0, 1)


def local() -> tuple[int, int]:
    """Return this rank's number on its node, and how many ranks the node has."""
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    number, count = (os.environ.get(name, "") for name in names)
    return int(number or 0), max(1, int(count or 1))
