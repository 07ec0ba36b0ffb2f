"""Hostile checkpoints: refused in one line, or merged right; never anything else."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import State, read_model, tuned
from tests.long.forked import Ended, Forks, Job
from tests.long.hostile import LAST, MUTATIONS, TENSOR, Mutation, good_state, write_good
from tests.merges import write_merge
from tests.oracle import assert_within_bound, naive_coefficients, naive_sq_norms

MEMORY = 4 << 30  # beyond what the process has mapped at its start
LIMIT_S = 40.0
CPU_S = 15
FORBIDDEN = 99

OPTIONS = ("--no-copy-tokenizer", "--quiet")

# Ends a process that starts another one, connects, or writes outside its folder.
GUARD = f"""
import os, sys, tempfile, warnings
tempfile.tempdir = ALLOWED
warnings.simplefilter("ignore")  # torch's own, of odd pickles
RUN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
       "os.startfile", "pty.spawn", "socket.connect", "ctypes.dlopen")
MAKE = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir",
        "os.truncate", "os.chmod", "os.chown", "shutil.copyfile", "shutil.move")
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def guard(event, arguments):
    if event in RUN:
        os.write(2, f"FORBIDDEN {{event}} {{arguments}}".encode())
        os._exit({FORBIDDEN})
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & FLAGS
    if not writes and event not in MAKE:
        return
    paths = arguments[:1]
    if event in ("os.rename", "shutil.move"):
        paths = arguments[:2]
    elif event in ("os.link", "os.symlink", "shutil.copyfile"):
        paths = arguments[1:2]
    # Within rmtree names are relative to open folders.
    if event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
        return
    for path in paths:
        if isinstance(path, (str, os.PathLike)):
            home, name = os.path.split(os.path.abspath(path))
            # What is opened may be a link; what is renamed or removed is the link.
            follows = event not in ("os.rename", "os.remove", "os.rmdir")
            place = os.path.realpath(path if follows else home)
            if not follows:
                place = os.path.join(place, name)
            if place != "/dev/null" and not f"{{place}}/".startswith(f"{{ALLOWED}}/"):
                os.write(2, f"FORBIDDEN {{event}} {{place}}".encode())
                os._exit({FORBIDDEN})

sys.addaudithook(guard)

# To take apart a process with all modules loaded takes longer than most jobs.
def leave(status=0):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)

def explain(kind, error, where):
    sys.__excepthook__(kind, error, where)
    leave(1)

sys.exit = leave
sys.excepthook = explain
"""

SCAN = """
import json
import mergekit_metagpt
base, *models = MODELS
try:
    found = mergekit_metagpt.scan(base, models).pool("model").sq_norms.tolist()
except (ValueError, OSError) as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"sq_norms": found}))
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Place:
    """Good models, and a warm process that merges in forks."""

    folder: Path
    forks: Forks
    memory: int

    def job(self, work: Path, *arguments: str, code: str = "", **more: Any) -> Job:
        """A job that may write below `work` alone."""
        return Job(
            arguments=arguments,
            env={"HOME": str(work), "MERGEKIT_METAGPT_CACHE": "0"},
            cwd=str(work),
            watched=str(work),
            after_s=LIMIT_S,
            limits={"AS": self.memory, "CPU": CPU_S},
            code=f"ALLOWED = {str(work)!r}\n{GUARD}\n{code}",
            **more,
        )


def tree(folder: Path) -> Mapping[str, object]:
    """All that lies below a folder: kinds, sizes, times of change, targets of links."""
    found: dict[str, object] = {}
    for home, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(home) / name
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                found[str(path)] = "folder"
            elif stat.S_ISLNK(status.st_mode):
                found[str(path)] = str(path.readlink())
            else:
                found[str(path)] = status.st_size, status.st_mtime_ns
    return found


def assert_contained(ended: Ended) -> None:
    """Check that a process came to its own end, and did nothing that it must not."""
    assert not ended.hung and ended.status >= 0, ended
    assert ended.status != FORBIDDEN, ended
    assert "FORBIDDEN" not in ended.said


BASE = good_state()
TUNED = (tuned(BASE, seed=1), tuned(BASE, seed=2, size=2e-2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Good models, and a warm process that has merged them once."""
    folder = tmp_path_factory.mktemp("good").resolve()
    names = ("base", "tuned0", "tuned1")
    paths = [
        write_good(folder / name, state)
        for name, state in zip(names, (BASE, *TUNED), strict=True)
    ]
    file = write_merge(folder / "warm.yml", paths[0], paths[1:])
    forks = Forks(Job(arguments=("merge", str(file), str(folder / "warm"), *OPTIONS)))
    try:
        status = Path(f"/proc/{forks.pid}/statm").read_text().split()
        mapped = int(status[0]) * os.sysconf("SC_PAGE_SIZE")
        yield Place(folder, forks, mapped + MEMORY)
    finally:
        forks.close()


@dataclass(frozen=True)
class Trial:
    """A mutated model in the place of the base, or of the second fine-tune.

    Attributes:
        work: the folder that may be written to.
        role: `base` or `tuned`.
        states: what base and models mean; None where they mean nothing.
        left: what can be scanned of them, likewise.
    """

    work: Path
    role: str
    states: tuple[State, ...] | None
    left: tuple[State, ...] | None

    @property
    def hostile(self) -> Path:
        return self.work / "hostile"

    @property
    def paths(self) -> list[Path]:
        """Base and models."""
        if self.role == "base":
            return [self.hostile, self.work / "tuned0", self.work / "tuned1"]
        return [self.work / "base", self.work / "tuned0", self.hostile]

    def out(self, command: str) -> Path:
        return self.work / f"out-{command}"


def prepare(place: Place, folder: Path, mutation: Mutation, role: str) -> Trial:
    """Write the mutated model and links to the good ones beside it."""
    work = (folder / role).resolve()
    work.mkdir()
    for name in ("base", "tuned0", "tuned1"):
        shutil.copytree(place.folder / name, work / name)
    replaced = "base" if role == "base" else "tuned1"
    (work / replaced).rename(work / "hostile")
    mutation.spoil(work / "hostile")
    at = 0 if role == "base" else 2
    good = (BASE, *TUNED)

    def with_hostile(state: State) -> tuple[State, ...]:
        return (*good[:at], state, *good[at + 1 :])

    states = left = None
    if mutation.means is not None:
        states = left = with_hostile(mutation.means(good[at]))
    if mutation.lost is not None:
        left = with_hostile({n: t for n, t in good[at].items() if n != mutation.lost})
    trial = Trial(work, role, states, left)
    write_merge(work / "merge.yml", trial.paths[0], trial.paths[1:])
    return trial


def assert_merged(trial: Trial, out: Path) -> None:
    """Check every element of a merge of what the mutated model means."""
    assert trial.states is not None, "merged, though it means nothing"
    base, *models = trial.states
    merged = read_model(out)
    assert merged.keys() == base.keys()
    lambdas = naive_coefficients(naive_sq_norms(base, models))
    for name, tensor in merged.items():
        assert_within_bound(tensor, base[name], [m[name] for m in models], lambdas)


def assert_refused(trial: Trial, said: str) -> None:
    """Check for one line that names the model, one of its files, or the tensor.

    Before it there may be what is said of a merge under way.
    """
    said = "".join(
        line
        for line in said.splitlines(keepends=True)
        if not line.startswith("WARNING:mergekit_metagpt:")
    )
    assert said.startswith("Error: ") and said.endswith("\n"), said
    assert len(said.splitlines()) == 1, said
    assert any(name in said for name in (str(trial.hostile), TENSOR, LAST)), said


def assert_scanned(trial: Trial, said: str) -> bool:
    """Check what `scan` said: the right squared norms, or a clear error."""
    found = json.loads(said.splitlines()[-1])
    if "error" in found:
        assert str(trial.hostile) in found["error"], found
        return False
    assert trial.left is not None, f"measured, though it means nothing: {found}"
    base, *models = trial.left
    pairs = [({n: base[n] for n in base.keys() & m}, m) for m in models]
    expected = torch.cat([naive_sq_norms(shared, [model]) for shared, model in pairs])
    sq_norms = torch.tensor(found["sq_norms"], dtype=torch.float64)
    torch.testing.assert_close(sq_norms, expected, rtol=1e-12, atol=0)
    return True


def assert_answered(place: Place, trials: list[Trial], *, legal: bool) -> None:
    """Scan and merge with each mutated model, at once, and check all answers."""
    before = [tree(trial.work) for trial in trials]
    jobs = []
    for trial in trials:
        models = [str(path) for path in trial.paths]
        out = str(trial.out("ours"))
        merge = ("merge", str(trial.work / "merge.yml"), out, *OPTIONS)
        jobs += [
            place.job(trial.work, *merge),
            place.job(trial.work, code=f"MODELS = {models!r}\n{SCAN}"),
        ]
    ended = place.forks.run(*jobs)
    for number, trial in enumerate(trials):
        merged, scanned = ended[2 * number : 2 * number + 2]
        assert_contained(merged)
        assert_contained(scanned)
        assert scanned.status == 0, scanned.said
        measured = assert_scanned(trial, scanned.said)
        assert measured or not legal, scanned.said
        assert merged.status in (0, 2), merged.said
        if merged.status == 0:
            assert_merged(trial, trial.out("ours"))
            shutil.rmtree(trial.out("ours"))
        else:
            assert not legal, merged.said
            assert_refused(trial, merged.said)
        assert tree(trial.work) == before[number]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_model_is_refused_or_merged_right(
    name: str, place: Place, tmp_path: Path
) -> None:
    mutation = MUTATIONS[name]
    trials = [prepare(place, tmp_path, mutation, role) for role in ("base", "tuned")]
    assert_answered(place, trials, legal=mutation.legal)


def test_the_guard_sees_what_it_must(place: Place, tmp_path: Path) -> None:
    """Without it, the tests above could not fail for code that is run."""
    codes = {
        "os.system('true')": FORBIDDEN,
        "open('/tmp/outside', 'w')": FORBIDDEN,
        "import subprocess; subprocess.Popen(['true'])": FORBIDDEN,
        "os.mkdir('/tmp/outside')": FORBIDDEN,
        "open('inside', 'w')\nos._exit(3)": 3,
        "x = bytearray(5 << 30)": 1,
    }
    work = tmp_path.resolve()
    for code, status in codes.items():
        (ended,) = place.forks.run(place.job(work, code=code))
        assert ended.status == status, (code, ended)
    assert not Path("/tmp/outside").exists()


def test_names_of_tensors_are_shown_without_control_characters(
    place: Place, tmp_path: Path
) -> None:
    """A model that was downloaded must not write to the terminal as it likes."""
    for kind in ("another-tensor-escape", "renamed-to-escape"):
        (tmp_path / kind).mkdir()
        trial = prepare(place, tmp_path / kind, MUTATIONS[kind], "tuned")
        base, _, hostile = map(str, trial.paths)
        job = place.job(trial.work, "inspect", "--base", base, hostile)
        (ended,) = place.forks.run(job)
        assert_contained(ended)
        odd = {c for c in ended.said if ord(c) < 32 or 127 <= ord(c) < 160}
        assert odd <= {"\n"}, odd
