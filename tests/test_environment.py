"""Merges in surroundings that are not as kind as a developer's own machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mergekit_metagpt.commands.cli import main
from tests.broken import snapshot
from tests.conftest import Family
from tests.families import merge_config, run_mergekit
from tests.long.forked import Ended
from tests.long.killed import QUIET, Place, shared_place
from tests.oracle import assert_same_bits
from tests.processes import (
    assert_succeeded,
    environment,
    run_process,
    script,
)

LIMIT_S = 120
FILES = {"config.json", "model.safetensors", "metagpt.json", "metagpt.png", "README.md"}


def merge_process(
    cwd: Path, *arguments: str | Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the installed script `mergekit-metagpt merge`, without a terminal."""
    return subprocess.run(
        [str(script("mergekit-metagpt")), "merge", *map(str, arguments), *QUIET],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )


def assert_same_merge(out: Path, family: Family, elsewhere: Path) -> None:
    """Check that a folder holds the bytes that a merge in this process gives."""
    config = merge_config(family.base, family.models)
    run_mergekit(config, elsewhere / "plain")
    expected = (elsewhere / "plain" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected
    assert {path.name for path in out.iterdir()} >= FILES


# ---- names of files


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_letters_links_and_relative_paths(
    locale: str, family: Family, tmp_path: Path
) -> None:
    """The base is a link to a folder, the files of a model are links; no home."""
    work = tmp_path / "my models" / "größer 模型"
    (work / "in").mkdir(parents=True)
    (work / "in" / "bäse").symlink_to(family.base)
    names = []
    for number, model in enumerate(family.models):
        name = f"in/fine-tüned-{number}"
        (work / name).mkdir()
        for file in model.iterdir():
            (work / name / file.name).symlink_to(file)
        names.append(name)
    text = yaml.safe_dump(merge_config("in/bäse", names), allow_unicode=True)
    (work / "mérge 1.yml").write_text(text, encoding="utf-8")
    env = environment(LC_ALL=locale, HOME=os.devnull, MERGEKIT_METAGPT_CACHE="")
    done = merge_process(work, "mérge 1.yml", "öut put", env=env)
    assert_succeeded(done)
    assert_same_merge(work / "öut put", family, tmp_path)
    report = json.loads((work / "öut put" / "metagpt.json").read_text("utf-8"))
    (found,) = report["families"]
    assert [m["name"] for m in found["models"]] == [f"./{name}" for name in names]


def test_spaces_in_the_names_of_models(family: Family, tmp_path: Path) -> None:
    paths = []
    for model in (family.base, *family.models):
        paths.append(tmp_path / "my models" / model.name)
        shutil.copytree(model, paths[-1])
    config = merge_config(paths[0], paths[1:])
    merged = run_mergekit(config, tmp_path / "out")
    plain = merge_config(family.base, family.models)
    for name, tensor in run_mergekit(plain, tmp_path / "plain").items():
        assert_same_bits(merged[name], tensor)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main.main(
            ["export", str(tmp_path / "merge.yml"), str(tmp_path / "exported.yml")]
        )
    assert ended.value.code == 0


# ---- ways to run Python


def test_with_warnings_as_errors(family: Family, tmp_path: Path) -> None:
    """A warning of ours, or of what we import, would end the merge."""
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(merge_config(family.base, family.models)))
    theirs = "ignore:numpy.core is deprecated:DeprecationWarning"  # mergekit's
    done = run_process(
        [script("mergekit-metagpt"), "merge", file, tmp_path / "out", *QUIET],
        environment(PYTHONWARNINGS=f"error,{theirs}"),
    )
    assert_succeeded(done)
    assert_same_merge(tmp_path / "out", family, tmp_path)


# ---- what may be read and written


@pytest.fixture
def forks() -> Place:
    """A family, and a warm process that merges it in forks."""
    return shared_place()


@pytest.fixture
def open_work(forks: Place) -> Iterator[Path]:
    """A working folder that everybody may enter and write to."""
    forks.folder.chmod(0o755)
    for path in (forks.folder / "family").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with forks.work() as work:
        work.chmod(0o777)
        yield work


def as_somebody_else(forks: Place, **changes: str | None) -> Ended:
    """Merge as a user without rights and without a home; not as root, as oneself."""
    packages = Path(pytest.__file__).parents
    if os.geteuid() == 0 and not all(p.stat().st_mode & 0o001 for p in packages):
        pytest.skip(f"reason: {packages[0]} is closed to other users than root")
    job = forks.job("mergekit-metagpt")
    env = {**job.env, "HOME": None, "XDG_CACHE_HOME": None, **changes}
    (ended,) = forks.forks.run(replace(job, as_stranger=True, env=env))
    return ended


def assert_whole(forks: Place, out: Path) -> None:
    assert dict(snapshot(out)) == forks.reference["mergekit-metagpt"]


def test_inputs_that_are_read_only_and_no_home(forks: Place, open_work: Path) -> None:
    """The user has no entry in the password file either, so that nothing is cached."""
    family = forks.folder / "family"
    before = snapshot(family)
    paths = [family, *family.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        ended = as_somebody_else(forks, MERGEKIT_METAGPT_CACHE=None)
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert ended.status == 0, ended
    assert_whole(forks, open_work / "out")
    assert {path.name for path in open_work.iterdir()} == {"out"}
    assert snapshot(family) == before


@pytest.mark.parametrize("kind", ["read-only", "file", "below a file", "unreadable"])
def test_a_cache_that_is_of_no_use_is_done_without(
    kind: str, forks: Place, open_work: Path
) -> None:
    cache = open_work / "cache"
    if kind == "read-only":
        cache.mkdir(mode=0o555)
    elif kind == "unreadable":
        (ended,) = forks.forks.run(forks.job("mergekit-metagpt"))
        assert ended.status == 0, ended
        shutil.rmtree(open_work / "out")
        for entry in cache.glob("*.json"):
            entry.chmod(0)
        assert any(cache.iterdir())
        cache.chmod(0o777)
    else:
        cache.write_text("in the way")
        cache.chmod(0o666)
    place = cache / "deeper" if kind == "below a file" else cache
    ended = as_somebody_else(forks, MERGEKIT_METAGPT_CACHE=str(place))
    assert ended.status == 0, ended
    assert_whole(forks, open_work / "out")


def test_an_output_that_cannot_be_written_is_said_in_one_line(
    forks: Place, open_work: Path
) -> None:
    if os.geteuid() == 0:
        open_work.chmod(0o755)  # root's own
    else:
        open_work.chmod(0o555)
    try:
        ended = as_somebody_else(forks, MERGEKIT_METAGPT_CACHE="0")
    finally:
        open_work.chmod(0o777)
    assert ended.status == 2, ended
    assert ended.said.startswith("Error: ") and ended.said.count("\n") == 1
    assert "Permission denied" in ended.said and str(open_work / "out") in ended.said
    assert not any(open_work.iterdir())


def test_a_model_that_may_not_be_read_is_named(forks: Place, open_work: Path) -> None:
    (file,) = (forks.folder / "family" / "base").glob("*.safetensors")
    mode = file.stat().st_mode
    file.chmod(0)
    try:
        ended = as_somebody_else(forks, MERGEKIT_METAGPT_CACHE="0")
    finally:
        file.chmod(mode)
    assert ended.status == 2, ended
    assert str(file) in ended.said and ended.said.count("\n") == 1
    assert not any(open_work.iterdir())


# ---- another mergekit

OLDER = "0.0.6"
NEWER = "0.3.0"
WANTED = "0.1.5"


def stub_mergekit(folder: Path, version: str) -> Path:
    """A mergekit of another version, with a registry of another form."""
    package = folder / "mergekit"
    (package / "merge_methods").mkdir(parents=True)
    for file in ("__init__.py", "merge_methods/__init__.py"):
        (package / file).write_text("")
    (package / "merge_methods" / "registry.py").write_text(
        "METHODS = {'linear': sum}\n\n\ndef get(name):\n    return METHODS[name]\n"
    )
    (package / "merge_methods" / "__init__.py").write_text(
        "from mergekit.merge_methods.registry import get\n"
    )
    info = folder / f"mergekit-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n"
    )
    return folder


IMPORTS = """
import importlib.metadata, json
import torch
from mergekit.merge_methods import get
import mergekit_metagpt.autoload

print(json.dumps([
    torch.ones(2).sum().item(),
    get("linear")([1, 2]),
    importlib.metadata.version("mergekit"),
    mergekit_metagpt.autoload.failure,
]))
"""


@pytest.mark.parametrize("version", [OLDER, NEWER])
def test_torch_and_another_mergekit_work_on(version: str, tmp_path: Path) -> None:
    path = stub_mergekit(tmp_path, version)
    done = run_process(
        [sys.executable, "-c", IMPORTS], environment(PYTHONPATH=str(path))
    )
    assert_succeeded(done)
    total, linear, found, failure = json.loads(done.stdout)
    assert (total, linear, found) == (2.0, 3, version)
    assert failure and "\n" not in failure
    assert done.stderr == ""


@pytest.mark.parametrize(("command", "version"), [("inspect", OLDER), ("merge", NEWER)])
def test_our_commands_name_the_version_that_they_need(
    command: str, version: str, family: Family, tmp_path: Path
) -> None:
    path = stub_mergekit(tmp_path / "stub", version)
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(merge_config(family.base, family.models)))
    arguments = [file, tmp_path / "out"] if command == "merge" else [file]
    done = run_process(
        [script("mergekit-metagpt"), command, *arguments],
        environment(PYTHONPATH=str(path)),
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert f"Install mergekit {WANTED}" in done.stderr
    assert not (tmp_path / "out").exists()
