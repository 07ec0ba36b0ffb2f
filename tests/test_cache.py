"""What is kept of scans on disk: found again bit for bit, or measured anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from mergekit_metagpt.checkpoints.identity import fingerprint
from mergekit_metagpt.scanning import cache, once
from mergekit_metagpt.scanning.results import ScanResult
from tests.conftest import Family, make_family, write_family
from tests.families import forget, run_command
from tests.oracle import assert_same_bits, naive_sq_norms

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LONG_AGO = 1_600_000_000


Scans = list[list[str]]


@pytest.fixture
def aged(own_cache: Path, tmp_path: Path) -> Family:
    """A family whose files are old enough to be remembered, and an empty cache."""
    return age(make_family(tmp_path / "family"))


def age(family: Family) -> Family:
    for folder in family.paths:
        for number, file in enumerate(sorted(folder.iterdir())):
            os.utime(file, (LONG_AGO + number, LONG_AGO + number))
    return family


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    """The models of every scan that reads weights."""
    seen: Scans = []
    scan_files = once.scan_checkpoints

    def counted(base: Any, models: Any, **options: Any) -> Any:
        seen.append([model.label for model in models])
        return scan_files(base, models, **options)

    monkeypatch.setattr(once, "scan_checkpoints", counted)
    return seen


def scan(family: Family, *, gram: bool = False) -> ScanResult:
    """Scan as a new process would: nothing is known but what lies on disk."""
    forget()
    fingerprint.cache_clear()
    return mergekit_metagpt.scan(family.base, family.models, gram=gram)


def assert_same_results(first: ScanResult, second: ScanResult) -> None:
    assert first.names == second.names
    for attribute in ("sq_norms", "gram", "base_sq_norms"):
        one, other = getattr(first, attribute), getattr(second, attribute)
        assert (one is None) == (other is None), attribute
        if one is not None:
            assert_same_bits(one, other)


@pytest.mark.parametrize("gram", [False, True])
def test_a_second_scan_reads_no_weights_and_gives_the_same_bits(
    gram: bool, own_cache: Path, aged: Family, scans: Scans
) -> None:
    first = scan(aged, gram=gram)
    assert len(scans) == 1 and len(list(own_cache.iterdir())) == 3 + gram
    assert_same_results(first, scan(aged, gram=gram))
    assert len(scans) == 1


def test_a_merge_finds_what_inspect_measured(aged: Family, scans: Scans) -> None:
    assert run_command("inspect", "--base", *aged.paths) == 0
    scan(aged)
    assert len(scans) == 1


def test_only_new_models_are_scanned(aged: Family, scans: Scans) -> None:
    mergekit_metagpt.scan(aged.base, aged.models[:2])
    result = scan(aged)
    assert scans[1] == [str(aged.models[2])]
    expected = naive_sq_norms(aged.base_state, aged.states)
    found = result.pool("model").sq_norms
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def change_time(file: Path) -> None:
    os.utime(file, (LONG_AGO, LONG_AGO + 99))


def change_a_sample(file: Path) -> None:
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_time, change_a_sample])
@pytest.mark.parametrize("of_base", [True, False])
def test_a_changed_file_is_measured_anew(
    change: Callable[[Path], None],
    of_base: bool,
    aged: Family,
    scans: Scans,
) -> None:
    scan(aged)
    folder = aged.base if of_base else aged.models[1]
    change(next(folder.glob("*.safetensors")))
    scan(aged)
    expected = aged.models if of_base else aged.models[1:2]
    assert scans[1:] == [[str(model) for model in expected]]


def test_ties_of_the_configuration_are_part_of_the_key(
    aged: Family, scans: Scans
) -> None:
    scan(aged)
    file = aged.base / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "mistral"}))
    scan(aged)
    assert len(scans) == 2


def test_another_version_measures_anew(
    aged: Family, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(aged)
    monkeypatch.setattr(cache, "version", lambda package: "0.0.0")
    scan(aged)
    assert len(scans) == 2


def test_the_same_files_elsewhere_are_known(
    aged: Family, scans: Scans, tmp_path: Path
) -> None:
    first = scan(aged)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "family", moved)  # keeps modification times
    forget()
    models = [moved / model.name for model in aged.models]
    second = mergekit_metagpt.scan(moved / "base", models)
    assert len(scans) == 1
    assert_same_results(first, second)


def test_snapshots_of_the_hub_are_known_by_their_hashes_alone(
    aged: Family, scans: Scans, tmp_path: Path
) -> None:
    for folder in (aged.base, *aged.models):
        blobs = tmp_path / "hub" / folder.name / "blobs"
        blobs.mkdir(parents=True)
        for file in folder.glob("*.safetensors"):
            blob = blobs / sha256(file.read_bytes()).hexdigest()
            file.rename(blob)
            file.symlink_to(blob)
    scan(aged)
    for blob in tmp_path.glob("hub/*/blobs/*"):
        os.utime(blob, (LONG_AGO, LONG_AGO + 7))
    scan(aged)
    assert len(scans) == 1


def test_young_files_are_not_remembered(aged: Family, scans: Scans) -> None:
    next(aged.models[0].glob("*.safetensors")).touch()
    scan(aged)
    scan(aged)
    assert scans[1:] == [[str(aged.models[0])]]


def test_weights_whose_squares_exceed_float64_are_not_remembered(
    own_cache: Path, scans: Scans, tmp_path: Path
) -> None:
    """JSON has no infinity, which is the squared norm of the base."""
    base, model = (torch.tensor([1e200, x], dtype=torch.float64) for x in (0.0, 1.0))
    family = age(write_family(tmp_path / "huge", {"w": base}, [{"w": model}]))
    assert scan(family).sq_norms.tolist() == scan(family).sq_norms.tolist() == [[1.0]]
    assert len(scans) == 2 and not own_cache.exists()


def spoil(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Forge an entry whose checksum is right."""

    def spoiled(data: bytes) -> bytes:
        head, _, payload = data.partition(b"\n")
        content = json.loads(payload)
        change(content)
        payload = json.dumps(content).encode()
        entry = {**json.loads(head), "checksum": sha256(payload).hexdigest()}
        return json.dumps(entry).encode() + b"\n" + payload

    return spoiled


def first_norm(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["sq_norms"].update(
        {next(iter(content["sq_norms"])): value}
    )


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "binary": lambda data: bytes(range(256)) * 9,
    "not JSON": lambda data: data.replace(b"{", b"("),
    "deep": lambda data: b"[" * 100_000,
    "a list": lambda data: b"[]\n[]",
    "of another format": lambda data: data.replace(b'"format":', b'"format":1'),
    "of another kind": lambda data: data.replace(b'"pair"', b'"gram"'),
    "negative": spoil(first_norm(-1.0)),
    "not finite": spoil(first_norm(float("nan"))),
    "a word": spoil(first_norm("much")),
    "unknown keys": spoil(lambda content: content.update(run="code")),
    "missing keys": spoil(lambda content: content.pop("layers")),
    "wrong names": spoil(lambda content: content.update(sq_norms=[1.0])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_measured_anew_and_replaced(
    damage: str, own_cache: Path, aged: Family, scans: Scans
) -> None:
    first = scan(aged)
    kept = {file: file.read_bytes() for file in own_cache.iterdir()}
    for file, data in kept.items():
        file.write_bytes(DAMAGE[damage](data))
    assert_same_results(first, scan(aged))
    assert len(scans) == 2
    assert {file: file.read_bytes() for file in own_cache.iterdir()} == kept


def test_a_damaged_gram_matrix_is_measured_anew(
    own_cache: Path, aged: Family, scans: Scans
) -> None:
    first = scan(aged, gram=True)
    for file in own_cache.iterdir():
        data = file.read_bytes()
        if b'"kind":"gram"' in data:
            file.write_bytes(spoil(lambda content: content["gram"].popitem())(data))
    assert_same_results(first, scan(aged, gram=True))
    assert len(scans) == 2


def test_an_entry_that_is_too_large_is_not_read(
    own_cache: Path, aged: Family, scans: Scans
) -> None:
    scan(aged)
    for file in own_cache.iterdir():
        with file.open("r+b") as stream:
            stream.truncate(cache.MOST_BYTES + 1)  # sparse
    scan(aged)
    assert len(scans) == 2


@pytest.mark.parametrize("value", ["0", "/dev/null/no/folder"])
def test_without_a_cache_everything_works(
    value: str, aged: Family, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, value)
    assert_same_results(scan(aged), scan(aged))
    assert len(scans) == 2


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "mergekit-metagpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "mergekit-metagpt"
    monkeypatch.setattr(
        Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    assert cache.folder() is None


def test_many_writers_at_once(own_cache: Path, aged: Family, scans: Scans) -> None:
    def scan_once(number: int) -> ScanResult:
        return mergekit_metagpt.scan(aged.base, aged.models)

    with ThreadPoolExecutor(8) as executor:
        results = list(executor.map(scan_once, range(16)))
    for result in results[1:]:
        assert_same_results(results[0], result)
    assert len(list(own_cache.iterdir())) == 3, "no temporary file is left"
    scan(aged)
    assert len(list(own_cache.glob("*.json"))) == 3


def test_the_oldest_entries_go(
    own_cache: Path, aged: Family, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_ENTRIES", 2)
    scan(aged)
    assert len(list(own_cache.iterdir())) == 2


def test_what_killed_writes_left_goes_in_time(
    own_cache: Path, aged: Family, scans: Scans
) -> None:
    """A young one may belong to a process at work; what is not ours stays."""
    own_cache.mkdir(mode=0o700)
    old, young, foreign = (
        own_cache / name
        for name in (f"{cache.UNFINISHED}a", f"{cache.UNFINISHED}b", ".netrc")
    )
    for file in (old, young, foreign):
        file.write_text("half of an entry")
    for file in (old, foreign):
        os.utime(file, (LONG_AGO, LONG_AGO))
    scan(aged)
    assert not old.exists() and young.exists() and foreign.exists()
    assert cache.clear() == 3
    assert [file.name for file in own_cache.iterdir()] == [foreign.name]


def test_entries_are_private_and_small_and_hold_no_weights(
    own_cache: Path, aged: Family, scans: Scans
) -> None:
    scan(aged, gram=True)
    assert own_cache.stat().st_mode & 0o077 == 0
    assert sum(file.stat().st_size for file in own_cache.iterdir()) < 20_000
    for file in own_cache.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_the_command_shows_and_clears(
    own_cache: Path,
    aged: Family,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")

    def said(*arguments: str) -> str:
        assert run_command("cache", *arguments) == 0
        return capsys.readouterr().out

    assert said() == f"{own_cache}: 0 entries, 0.0 MB\n"
    scan(aged, gram=True)
    (own_cache / f"{'0' * 64}.json").write_text("damaged")
    (own_cache / "foreign.json").write_text("not ours")
    shown = said()
    assert shown.startswith(f"{own_cache}: 5 entries, 0.0 MB\n")
    assert shown.count("squared norms") == 3 and shown.count("inner products") == 1
    assert str(aged.models[2]) in shown and "not readable" in shown
    assert said("--clear") == f"Removed 5 entries from {own_cache}.\n"
    assert (own_cache / "foreign.json").exists()
    assert said() == f"{own_cache}: 0 entries, 0.0 MB\n"


def test_the_command_says_that_the_cache_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "0")
    assert run_command("cache") == 0
    assert capsys.readouterr().out == "The cache is off.\n"
