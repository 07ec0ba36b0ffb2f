"""mergekit's own test-suite, run with our plugin loaded: we break nothing of the host.

The tests come from mergekit's sdist, fetched from the package index and kept in
`.cache/`. The sdist lacks the `tests/common.py` that they import, so ours is put there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMON = ROOT / "tests" / "host_suite" / "common.py"
CACHE = ROOT / ".cache" / "host_suite"
LIMIT_S = 300  # below the timeout of pyproject.toml, so that the output is shown

VERSION = importlib.metadata.version("mergekit")
# Tests of mergekit's sdist, by version, that pass on a CPU without our plugin.
PASSED = {"0.1.5": 518}
# Why a test of theirs may be skipped, and how many of 0.1.5 are on a machine without.
SKIPPED = {
    "CUDA unavailable": 78,  # `torch.cuda.is_available()` is false
    "MPS unavailable": 4,  # not on a Mac
}
# mergekit runs this over every registered method, hence over ours.
OVER_METHODS = (
    "tests.test_merge_method_regressions::"
    "test_state_dict_methods_accept_strided_weights_without_mutation"
)

# Says what was registered when the last test ended. Imports nothing of ours: the
# plugin has to have come by itself.
CONFTEST = """
import json
import sys

import pytest
from mergekit import merge_methods


@pytest.fixture(scope="session", autouse=True)
def what_is_registered(record_testsuite_property):
    yield
    names = sorted(method.spec.name for method in merge_methods.registered_methods())
    autoload = sys.modules.get("mergekit_metagpt.autoload")
    said = "never imported" if autoload is None else autoload.failure
    record_testsuite_property("registered", json.dumps(names))
    record_testsuite_property("autoload", said)
"""

PLANTED = """
def test_that_fails():
    assert not "planted"
"""


@dataclass(frozen=True)
class HostRun:
    """What one run of pytest over mergekit's tests left behind."""

    returncode: int | None  # None: stopped after LIMIT_S
    output: str = field(repr=False)
    passed: frozenset[str] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)  # test: reason
    registered: frozenset[str]
    autoload: str  # why the plugin did not load; "None" if it knows of no reason

    @property
    def tail(self) -> str:
        return "\n".join(["", *self.output.splitlines()[-60:]])

    @property
    def ours(self) -> set[str]:
        return {name for name in self.registered if name.startswith("metagpt")}


def fetch_sdist(version: str, cache: Path) -> Path:
    """Return mergekit's sdist, from the cache or else from the package index.

    Args:
        version: version of mergekit.
        cache: folder to look in and to keep it in.

    Returns:
        Path of the `.tar.gz`.

    Raises:
        OSError: it is not in the cache, and pip cannot fetch it.
    """
    sdist = cache / f"mergekit-{version}.tar.gz"
    if sdist.exists():
        return sdist
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    command = [sys.executable, "-m", "pip", "download", f"mergekit=={version}"]
    # Not `:all:`, which would build the build tools from source too.
    command += ["--no-deps", "--no-binary", "mergekit"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # saves fetching it a second time
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = subprocess.run(
            [*command, "--dest", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found = [*Path(folder).glob("*.tar.gz")]
        if pip.returncode != 0 or len(found) != 1:
            raise OSError(
                f"mergekit {version}: its sdist, whose tests we run, is not in {cache} "
                "and pip could not fetch it. Connect to the package index once, or put "
                f"{sdist.name} there. pip said:\n{pip.stdout}"
            )
        found[0].replace(sdist)
    return sdist


def lay_out(sdist: Path, folder: Path) -> None:
    """Put mergekit's tests and pytest settings, with what they lack, into `folder`.

    The package itself stays out: the tests are to import the installed mergekit.
    """
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (source,) = Path(unpacked).iterdir()
        shutil.copytree(source / "tests", folder / "tests")
        shutil.copy(source / "pyproject.toml", folder)
    shutil.copy(COMMON, folder / "tests")
    (folder / "tests" / "__init__.py").touch()
    (folder / "conftest.py").write_text(CONFTEST)


def run_host_suite(folder: Path, *args: str, autoload: bool = True) -> HostRun:
    """Run pytest over the tests laid out in `folder`, in a process of its own.

    Args:
        folder: as `lay_out` leaves it.
        *args: further arguments of pytest.
        autoload: whether our plugin may load itself.

    Returns:
        The outcome of every test, and what mergekit's registry held at the end.
    """
    switches = {"MERGEKIT_METAGPT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in switches and not name.startswith("PYTEST_")
    }
    env["HF_HUB_OFFLINE"] = "1"  # a test that asks the Hub is to fail
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if not autoload:
        env["MERGEKIT_METAGPT_AUTOLOAD"] = "0"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["--basetemp=tmp", "--junitxml=report.xml", *args]
    with (folder / "log").open("w") as log:
        try:
            returncode = subprocess.run(
                command,
                cwd=folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            returncode = None
    output = (folder / "log").read_text(errors="replace")
    return _read_report(folder / "report.xml", returncode, output)


def _read_report(report: Path, returncode: int | None, output: str) -> HostRun:
    passed: set[str] = set()
    skipped: dict[str, str] = {}
    said: dict[str, str] = {}
    # Without a report pytest did not get to its end, and `output` says why.
    if report.exists():
        tree = ET.parse(report)
        said = {p.attrib["name"]: p.attrib["value"] for p in tree.iter("property")}
        for case in tree.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            outcome = {child.tag: child for child in case}
            if "skipped" in outcome:
                skipped[name] = outcome["skipped"].attrib["message"]
            elif not outcome.keys() & {"failure", "error"}:
                passed.add(name)
    return HostRun(
        returncode=returncode,
        output=output,
        passed=frozenset(passed),
        skipped=skipped,
        registered=frozenset(json.loads(said.get("registered", "[]"))),
        autoload=said.get("autoload", "no report"),
    )


def assert_all_passed(run: HostRun) -> None:
    assert run.returncode == 0, f"pytest ended with {run.returncode}:{run.tail}"


def assert_registered(run: HostRun) -> None:
    assert "metagpt" in run.registered, (
        f"mergekit's tests ran without our plugin: autoload.failure is {run.autoload}; "
        f"registered are {sorted(run.registered)}:{run.tail}"
    )


@pytest.fixture(scope="module")
def sdist() -> Path:
    return fetch_sdist(VERSION, CACHE)


@pytest.fixture(scope="module")
def run(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> HostRun:
    folder = tmp_path_factory.mktemp("host_suite")
    lay_out(sdist, folder)
    return run_host_suite(folder)


def test_everything_passes_with_the_plugin(run: HostRun) -> None:
    assert_all_passed(run)
    assert_registered(run)


def test_nothing_is_left_out(run: HostRun) -> None:
    count = len(run.passed - {f"{OVER_METHODS}[{name}]" for name in run.ours})
    assert VERSION in PASSED, (
        f"mergekit {VERSION}: {count} of its tests pass, and PASSED here knows only "
        f"{sorted(PASSED)}. Add it if without the plugin it is as many."
    )
    assert count >= PASSED[VERSION], run.tail
    for reason in {*run.skipped.values()}:
        names = [name for name, why in run.skipped.items() if why == reason]
        assert len(names) <= SKIPPED.get(reason, 0), f"{reason}: {names}"


def test_their_test_over_all_methods_covers_ours(run: HostRun) -> None:
    assert_registered(run)
    assert {f"{OVER_METHODS}[{name}]" for name in run.ours} <= run.passed, run.tail


def test_a_failure_and_a_missing_plugin_are_seen(sdist: Path, tmp_path: Path) -> None:
    lay_out(sdist, tmp_path)
    planted = tmp_path / "tests" / "test_planted.py"
    planted.write_text(PLANTED)
    run = run_host_suite(tmp_path, str(planted), autoload=False)
    with pytest.raises(AssertionError, match=r'ended with 1:(.|\n)*"planted"'):
        assert_all_passed(run)
    with pytest.raises(AssertionError, match="ran without our plugin"):
        assert_registered(run)
    assert run.registered and not run.ours


def test_without_cache_and_index_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="Connect to the package index once"):
        fetch_sdist(VERSION, tmp_path)
    assert not [*tmp_path.rglob("*.tar.gz")]
