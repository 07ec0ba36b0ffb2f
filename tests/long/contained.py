"""Runs jobs in forks that may neither escape their folder nor run out of bounds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.families import merge_config
from tests.long.forked import Ended, Forks, Job

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


@contextmanager
def opened(folder: Path) -> Iterator[Place]:
    """Merge the good models `base`, `tuned0` and `tuned1` once, to warm a process."""
    paths = [folder / name for name in ("base", "tuned0", "tuned1")]
    (folder / "warm.yml").write_text(yaml.safe_dump(merge_config(paths[0], paths[1:])))
    warm = ("merge", str(folder / "warm.yml"), str(folder / "warm"), *OPTIONS)
    forks = Forks(Job(arguments=warm))
    try:
        status = Path(f"/proc/{forks.pid}/statm").read_text().split()
        mapped = int(status[0]) * os.sysconf("SC_PAGE_SIZE")
        yield Place(folder, forks, mapped + MEMORY)
    finally:
        forks.close()


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
