"""`pip install .` beside a mergekit of other versions: what would pip replace?

pip's own resolver is asked, by a dry run without an index: for the requirements in
pyproject.toml, in an environment that consists of nothing but names and versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).parents[1]
NAME, VERSION = "mergekit_metagpt", "0.1.0"
# What somebody may have who merges with mergekit: none is the version of the tests.
INSTALLED = {
    "click": "8.1.8",
    "huggingface_hub": "1.3.0",
    "matplotlib": "3.8.4",
    "mergekit": "0.1.5",
    "pydantic": "2.12.0",
    "rich": "13.9.4",
    "safetensors": "0.6.2",
    "torch": "2.5.1+cu124",
    "tqdm": "4.66.5",
    "transformers": "5.1.0",
    "wrapt": "1.16.0",
}


def metadata(name: str, version: str, requires: list[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {part}" for part in requires)]) + "\n"


def write_wheel(folder: Path) -> Path:
    """A wheel with the requirements of pyproject.toml, and no code."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        requires = tomllib.load(stream)["project"]["dependencies"]
    info = f"{NAME}-{VERSION}.dist-info"
    file = folder / f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata(NAME, VERSION, requires))
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    return file


def environment_of(folder: Path, installed: Mapping[str, str]) -> Path:
    """An environment in which pip finds these packages; return its Python."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("[Ll]ib/**/site-packages"))
    for name, version in installed.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata(name, version, []))
    return next(folder.glob("[bS]*/python*"))


def would_install(folder: Path, installed: Mapping[str, str]) -> Any:
    """Packages that pip would install; None where it would need others."""
    python = environment_of(folder / "env", installed)
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    asked = ["--dry-run", "--no-index", "--quiet", "--report", "-"]
    # Whatever this machine's pip is told otherwise.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(
        [*pip, *asked, write_wheel(folder)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        assert "No matching distribution" in done.stderr, done.stderr
        return None
    return [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]


@pytest.mark.parametrize(
    ("changed", "replaces"),
    [
        ({}, False),
        ({"transformers": "5.30.0", "torch": "2.20.0"}, False),
        ({"transformers": "4.57.1"}, True),
        ({"mergekit": "0.1.4"}, True),
    ],
)
def test_versions_that_fit_are_kept(
    changed: dict[str, str], replaces: bool, tmp_path: Path
) -> None:
    found = would_install(tmp_path, {**INSTALLED, **changed})
    assert found == (None if replaces else [NAME])


def test_the_environment_has_other_versions_than_the_tests() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    same = [name for name, version in INSTALLED.items() if pins.get(name) == version]
    assert same == ["mergekit"]
