"""Runs the quick tests with other versions of Python, transformers and safetensors.

`python -m tests.long.versions FOLDER [NAME...]` makes a virtual environment in FOLDER
for each set of versions below (or those named), installs a copy of this project with
pip, runs the tests of `QUICK`, and prints a row for each. torch is the one that
constraints.txt names, but for the sets `torch lowest` and `torch highest`, which are
run when they are named: where pip has no build for CPUs alone they take gigabytes. An
environment takes about 2 GB and is left in place: a second run is quicker. What pip
cannot install is said, not hidden.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 1800
QUICK = (
    "tests/test_closed_form.py",
    "tests/test_kernels.py",
    "tests/test_host_contract.py",
    "tests/test_granularity.py",
    "tests/test_merge_command.py",
    "tests/test_cache.py",
)
PYTEST = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")


@dataclass(frozen=True)
class Versions:
    """A set of versions: the interpreter, what pip is to install, another torch."""

    python: str
    packages: tuple[str, ...] = ()
    torch: str | None = None


# The lowest that pyproject.toml allows, the highest there is, and every Python.
SETS = {
    "lowest": Versions("3.11", ("transformers==5.1.0", "safetensors==0.6.1")),
    "highest": Versions("3.11", ("--upgrade", "transformers", "safetensors")),
    "python 3.10": Versions("3.10"),
    "python 3.12": Versions("3.12"),
    "python 3.13": Versions("3.13"),
    "torch lowest": Versions("3.11", torch="torch==2.5.1"),
    "torch highest": Versions("3.11", torch="torch"),
}


def run(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> tuple[int, str]:
    """Run a command; return its status and what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    return done.returncode, done.stdout


def interpreter(version: str) -> str | None:
    """Find a Python of this version that starts."""
    found = shutil.which(f"python{version}")
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [str(p / "bin" / "python") for p in sorted(home.glob(f"{version}.*"))]
    for candidate in (*candidates, *([found] if found else [])):
        if run(candidate, "--version")[0] == 0:
            return candidate
    return None


def last_line(said: str) -> str:
    """The last line that says something, without what surrounds it."""
    lines = [line.strip("= ") for line in said.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "nothing said"


def why(said: str) -> str:
    """The first error that pip printed."""
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    return errors[0] if errors else last_line(said)


def copy_project(folder: Path) -> Path:
    """Copy what is installed and tested: building leaves files behind."""
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    for name in ("mergekit_metagpt", "recipes", "tests", "docs"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=without)
    return project


def torch_pin() -> str:
    """The line of constraints.txt that names torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = (line for line in lines if line.startswith("torch=="))
    return pin


def checked(folder: Path, name: str, versions: Versions) -> str:
    """Install one set, run the tests; return what to print of it."""
    python = interpreter(versions.python)
    if python is None:
        return f"no Python {versions.python} here"
    home = folder / name.replace(" ", "-")
    if not home.exists():
        status, said = run(python, "-m", "venv", home)
        if status:
            return f"no virtual environment: {last_line(said)}"
    inner = home / "bin" / "python"
    install = (inner, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    project = copy_project(folder)
    torch = versions.torch or torch_pin()
    for wanted in ((project, torch, *PYTEST), versions.packages):
        status, said = run(*install, *wanted) if wanted else (0, "")
        if status:
            return f"not installed: {why(said)}"
    _, found = run(
        inner,
        "-c",
        "from importlib.metadata import version as v; print(*(f'{p} {v(p)}' for p in"
        " ('torch', 'transformers', 'safetensors', 'mergekit')), sep=', ')",
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *QUICK)
    started = time.monotonic()
    _, said = run(inner, *tests, env=env, cwd=project)
    (folder / f"{home.name}.log").write_text(said, encoding="utf-8")
    seconds = time.monotonic() - started
    return f"{found.strip()}: {last_line(said)} ({seconds:.0f} s)"


def main() -> None:
    """Check all sets, or those named."""
    if len(sys.argv) < 2:
        print(__doc__)
        raise SystemExit(2)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    usual = [name for name, versions in SETS.items() if versions.torch is None]
    for name in sys.argv[2:] or usual:
        print(f"{name}: {checked(folder, name, SETS[name])}", flush=True)


if __name__ == "__main__":
    main()
