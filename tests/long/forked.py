"""Runs merges in forks of one warm process, and disturbs them as asked."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
# A user who has no entry in the password file, and so no home.
STRANGER = 54321

# What happens at a write: the process is killed, or told to end, or Ctrl-C is pressed;
# or from then on the disk is full.
KILL, TERMINATE, INTERRUPT, FULL = "kill", "terminate", "interrupt", "full"

# The steps of our command, by the function that begins them.
STEPS = {
    "checks": "mergekit_metagpt.merge_config.jobs:check",
    "scan": "mergekit_metagpt.report.inspecting:inspect",
    "export": "mergekit_metagpt.merge_config.plain_yaml:export",
    "figure": "mergekit_metagpt.commands.merging:report_figure",
    "merge": "mergekit.merge:run_merge",
    "tensors": "mergekit.graph:Executor.run",
    "finish": "mergekit.io.tensor_writer:TensorWriter.finalize",
    "card": "mergekit.merge:generate_card",
    "last step": "mergekit_metagpt.commands.placing:put",
    "clean-up": "shutil:rmtree",
}


@dataclass(frozen=True)
class Job:
    """A merge in a process of its own, and what is to go wrong.

    Attributes:
        arguments: of the command.
        command: `mergekit-metagpt` or `mergekit-yaml`.
        env: variables to set; None removes one.
        cwd: the current folder.
        watched: folder below which writes are counted.
        write: number of the write at which `event` happens, from 1; 0 for none.
        event: what happens there.
        after_s: seconds after which `number` is sent; None for never.
        number: of the signal; SIGINT goes through the terminal if there is one.
        terminal: whether it runs on a pseudo-terminal of its own.
        limits: resource limits, by the name that `resource` has for them.
        as_stranger: whether it gives up its rights as root.
        teardown: whether Python's own ending is gone through, which takes longer than
            so small a merge.
        code: Python to run first in the process; in the warm one, for all.
    """

    arguments: tuple[str, ...]
    command: str = "mergekit-metagpt"
    env: Mapping[str, str | None] = field(default_factory=dict)
    cwd: str = "/"
    watched: str = ""
    write: int = 0
    event: str = ""
    after_s: float | None = None
    number: int = signal.SIGKILL
    terminal: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)
    as_stranger: bool = False
    teardown: bool = True
    code: str = ""


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        status: exit status; negative for a signal.
        said: all that it printed.
        seconds: from its start to its end.
        step: the last that it began before it was disturbed.
        writes: how many it was about to make.
        hung: whether it had to be ended, after `LIMIT_S`.
    """

    status: int
    said: str
    seconds: float
    step: str
    writes: int
    hung: bool


class Forks:
    """A process with all modules imported; each job runs in a fork of it."""

    def __init__(self, warm: Job) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env={**env, "MERGEKIT_METAGPT_CACHE": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        (ended,) = self._ask(warm=True, jobs=[warm])
        assert ended.status == 0, ended

    @property
    def pid(self) -> int:
        """Process id of the warm process."""
        return self._process.pid

    def run(self, *jobs: Job) -> list[Ended]:
        """Run jobs, all at once, to their end."""
        return self._ask(warm=False, jobs=jobs)

    def close(self) -> None:
        """End the warm process."""
        self._process.communicate(timeout=LIMIT_S)

    def _ask(self, *, warm: bool, jobs: Sequence[Job]) -> list[Ended]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"warm": warm, "jobs": [asdict(job) for job in jobs]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the warm process ended with {self._process.wait(LIMIT_S)}"
        return [Ended(**ended) for ended in json.loads(answer)]


# ---- in the warm process


def _command(job: Job) -> Callable[[], Any]:
    if job.command == "mergekit-yaml":
        from mergekit.scripts.run_yaml import main as theirs

        return lambda: theirs.main(list(job.arguments), prog_name=job.command)
    from mergekit_metagpt.commands.cli import main as ours

    return lambda: ours.main(list(job.arguments), prog_name=job.command)


def _without_teardown(work: Callable[[], Any]) -> Callable[[], Any]:
    def wrapper() -> None:
        status = 1
        try:
            work()
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    return wrapper


def _marked(name: str, found: Callable[..., Any], pipe: int) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, f"{name}\n".encode())
        return found(*args, **kwargs)

    return wrapper


def _mark_steps(pipe: int) -> None:
    import importlib

    for name, place in STEPS.items():
        module, _, path = place.partition(":")
        holder: Any = importlib.import_module(module)
        *above, attribute = path.split(".")
        for part in above:
            holder = getattr(holder, part)
        setattr(holder, attribute, _marked(name, getattr(holder, attribute), pipe))


_MAKES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate")
_REMOVES = ("os.remove", "os.rmdir")
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _watch_writes(job: Job, pipe: int) -> None:
    """Count what changes the watched folder; let the job's event happen in time."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & _FOR_WRITING:
                return
        elif event not in _MAKES + _REMOVES:
            return
        # Within `shutil.rmtree` names are relative to an open folder.
        within = event in _REMOVES and args[-1] != -1
        if not within:
            path = args[0]
            if not isinstance(path, (str, Path)):
                return
            if not Path(path).absolute().is_relative_to(job.watched):
                return
        count += 1
        os.write(pipe, b"write\n")
        if not job.write or count < job.write:
            return
        if count == job.write:
            os.write(pipe, b"struck\n")
        if job.event == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif job.event == TERMINATE:
            os.kill(os.getpid(), signal.SIGTERM)
        elif job.event == INTERRUPT and count == job.write:
            signal.raise_signal(signal.SIGINT)
        elif job.event == FULL and event not in _REMOVES:
            code = errno.ENOSPC
            raise OSError(code, os.strerror(code), str(args[0]))

    sys.addaudithook(hook)


def _end_with_parent() -> None:
    """Die with the warm process, if the system can do that: a job may wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _become(job: Job, pipe: int, terminal: int | None, log: int) -> None:
    """Make a fork the process that a job asks for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    if terminal is None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        places = (nothing, log, log)
    else:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        places = (terminal, terminal, terminal)
    for number, place in enumerate(places):
        os.dup2(place, number)
    for name, value in job.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for name, limit in job.limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit, hard))
    if job.as_stranger and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
    _end_with_parent()
    os.chdir(job.cwd)
    if job.code:
        exec(compile(job.code, "<job>", "exec"), {})
    _mark_steps(pipe)
    _watch_writes(job, pipe)


@dataclass
class _Running:
    job: Job
    pid: int
    marks: int
    log: Any
    master: int | None
    started: float
    said: bytes = b""
    marked: bytes = b""
    signalled: bool = False
    hung: bool = False

    def disturb(self) -> None:
        """Send the signal once its time has come; end what hangs."""
        passed = time.monotonic() - self.started
        due = self.job.after_s is not None and passed >= self.job.after_s
        if due and not self.signalled:
            self.signalled = True
            self.note_marks()
            self.marked += b"struck\n"
            if self.master is not None and self.job.number == signal.SIGINT:
                os.write(self.master, b"\x03")
            else:
                os.kill(self.pid, self.job.number)
        if passed > LIMIT_S and not self.hung:
            self.hung = True
            os.kill(self.pid, signal.SIGKILL)

    def listen(self) -> None:
        """Read what it says on its terminal, which would else fill up."""
        while self.master is not None:
            if not select.select([self.master], [], [], 0)[0]:
                return
            try:
                got = os.read(self.master, 65536)
            except OSError:  # its other end is closed
                return
            if not got:
                return
            self.said += got

    def note_marks(self) -> None:
        """Read which steps it has begun and how much it has written so far."""
        while select.select([self.marks], [], [], 0)[0]:
            got = os.read(self.marks, 65536)
            if not got:
                return
            self.marked += got

    def ended(self, status: int) -> dict[str, Any]:
        passed = time.monotonic() - self.started
        self.listen()
        self.note_marks()
        os.close(self.marks)
        if self.master is not None:
            os.close(self.master)
        self.log.seek(0)
        said = (self.said + self.log.read()).decode(errors="replace")
        self.log.close()
        lines = self.marked.decode().split("\n")[:-1]
        until = lines.index("struck") if "struck" in lines else len(lines)
        steps = [line for line in lines[:until] if line != "write"]
        ended = Ended(
            status=os.waitstatus_to_exitcode(status),
            said=said,
            seconds=passed,
            step=steps[-1] if steps else "start",
            writes=lines.count("write"),
            hung=self.hung,
        )
        return asdict(ended)


class _InFork(Exception):
    """Carries a fork out of the loop that serves."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.work = work


def _start(job: Job) -> _Running:
    marks, pipe = os.pipe()
    master, slave = pty.openpty() if job.terminal else (None, None)
    log = tempfile.TemporaryFile()
    work = _command(job)
    if not job.teardown:
        work = _without_teardown(work)
    pid = os.fork()
    if not pid:
        os.close(marks)
        _become(job, pipe, slave, log.fileno())
        raise _InFork(work)
    os.close(pipe)
    if slave is not None:
        os.close(slave)
    return _Running(job, pid, marks, log, master, time.monotonic())


def _serve_one(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    jobs = [Job(**job) for job in request["jobs"]]
    if request["warm"]:
        exec(compile(jobs[0].code, "<job>", "exec"), {})
        with contextlib.redirect_stdout(sys.stderr):
            try:
                _command(jobs[0])()
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
        import tqdm
        from mergekit.io.tasks import LoaderCache

        LoaderCache.loaders.clear()
        # Its own lock lies in shared memory: a killed fork would hold it for ever.
        tqdm.tqdm.set_lock(threading.RLock())
        gc.freeze()  # else each fork copies and collects what all of them share
        return [asdict(Ended(status, "", 0.0, "", 0, False))]
    running = {}
    for job in jobs:
        started = _start(job)
        running[started.pid] = started
    ended: dict[int, dict[str, Any]] = {}
    while len(ended) < len(running):
        for pid, one in running.items():
            if pid in ended:
                continue
            one.listen()
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = one.ended(status)
            else:
                one.disturb()
        time.sleep(0.001)
    return [ended[pid] for pid in running]


def serve() -> None:
    """Answer requests on stdin until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our own terminal's is not for us
    try:
        for line in sys.stdin:
            print(json.dumps(_serve_one(json.loads(line))), flush=True)
    except _InFork as fork:
        work = fork.work
    else:
        return
    work()  # ends as a process of its own would, by SystemExit


if __name__ == "__main__":
    serve()
