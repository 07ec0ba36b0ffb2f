"""Hostile YAML and cache entries: refused in one line or right; no hang, no bomb."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from mergekit_metagpt.commands import merging
from mergekit_metagpt.commands.cli import main
from mergekit_metagpt.merge_config import merge_yaml
from tests.long.contained import OPTIONS, SCAN, Place, assert_contained, opened, tree
from tests.long.hostile import MUTATIONS, good_state, write_good
from tests.support import (
    State,
    assert_same_bits,
    assert_within_bound,
    merge_config,
    naive_lambdas,
    naive_merge,
    naive_sq_norms,
    read_model,
    run_mergekit,
    tuned,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BASE = good_state()
TUNED = (tuned(BASE, seed=1), tuned(BASE, seed=2, size=2e-2))
NAMES = ("base", "tuned0", "tuned1")
LONGEST = 4000  # characters of an error's line
LONG_AGO = 1_600_000_000


def write_family(folder: Path) -> Path:
    """The base and its fine-tunes, old enough to be remembered."""
    for name, state in zip(NAMES, (BASE, *TUNED), strict=True):
        write_good(folder / name, state)
        for file in (folder / name).iterdir():
            os.utime(file, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the good models."""
    return write_family(tmp_path_factory.mktemp("models").resolve())


@pytest.fixture(scope="module")
def place(models: Path) -> Iterator[Place]:
    """A warm process that runs commands in forks."""
    with opened(models) as found:
        yield found


def good_config(models: Path, **settings: Any) -> dict[str, Any]:
    return merge_config(
        models / "base", [models / name for name in NAMES[1:]], **settings
    )


def each(names: Iterable[str], defects: Mapping[str, str]) -> list[Any]:
    """Names as parameters; those of known defects have to fail."""
    assert defects.keys() <= set(names)
    return [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(strict=True, reason=defects[name])]
            if name in defects
            else [],
        )
        for name in names
    ]


# ---- wrong types in the merge YAML

HUGE = "9" * 400

# By name, what stands in the YAML for a value.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "minus-zero": "-0.0",
    "one": "1",
    "minus-one": "-1",
    "three-halves": "1.5",
    "tiny": "1.0e-300",
    "large": "1.0e+300",
    "1e400": "1.0e+400",
    "1e400-without-a-point": "1e400",
    "huge-integer": HUGE,
    "negative-huge-integer": f"-{HUGE}",
    "5000-digits": "9" * 5000,
    "not-a-number": ".nan",
    "infinity": ".inf",
    "minus-infinity": "-.inf",
    "hexadecimal": "0x1F",
    "octal": "017",
    "sexagesimal": "1:30",
    "date": "2001-01-01",
    "time": "2001-01-01 00:00:00",
    "binary": "!!binary aGVsbG8=",
    "set": "!!set {a: null}",
    "empty-string": "''",
    "word": "word",
    "one-as-a-word": "'1'",
    "minus-one-as-a-word": "'-1'",
    "nan-as-a-word": "'nan'",
    "control-characters": '"\\0\\e[2J\\a"',
    "newlines": '"a\\n\\nError: b"',
    "markup": "'[bold]x[/bold] {0} %s'",
    "long-word": "x" * 1000,
    "empty-list": "[]",
    "nested-list": "[[]]",
    "list-of-null": "[null]",
    "list-of-numbers": "[1, 2]",
    "list-of-zeros": "[0, 0]",
    "mixed-list": "[1, x]",
    "list-with-nan": "[1, .nan]",
    "list-with-infinity": "[1, .inf]",
    "list-with-a-huge-integer": f"[1, {HUGE}]",
    "long-list": f"[{', '.join(['1'] * 5000)}]",
    "empty-mapping": "{}",
    "mapping": "{a: 1}",
    "value": "{value: 1}",
    "value-nested": "{value: {value: 1}}",
    "value-null": "[{value: null}]",
    "value-empty-list": "[{value: []}]",
    "filter": "[{filter: mlp, value: 1}, {value: 2}]",
    "filter-alone": "[{filter: mlp}]",
    "filter-of-a-number": "[{filter: 3, value: 1}]",
    "filter-of-a-list": "[{filter: [mlp], value: 1}]",
    "filter-beside-a-number": "[{filter: mlp, value: 1}, 1]",
    "number-for-a-key": "{1: 1}",
    "null-for-a-key": "{null: 1}",
    "list-for-a-key": "{[1]: 1}",
    "itself": "&a [*a]",
    "mapping-of-itself": "&a {a: *a}",
    "unknown-alias": "*unknown",
    "merged-key": "{<<: 3}",
    "python-call": "!!python/object/apply:os.mkdir [code-was-run]",
    "python-name": "!!python/name:os.system",
    "python-tuple": "!!python/tuple [1, 2]",
    "unknown-tag": "!unknown x",
    "our-granularity": "layer",
    "a-model": "MODEL",
}

PLACEHOLDER = "PLACEHOLDER"
# Places whose value changes nothing in a merge.
IGNORED = ("unknown-parameter", "unknown-key", "unknown-key-of-a-model")
IGNORED += ("chat_template", "residual_weight")


def put(*path: str | int) -> Callable[[dict[str, Any]], None]:
    """Set one place of a configuration to the placeholder."""

    def change(config: dict[str, Any]) -> None:
        holder: Any = config
        for step, following in itertools.pairwise(path):
            if isinstance(holder, dict):
                holder = holder.setdefault(step, [] if following == 0 else {})
            else:
                holder = holder[step]
        holder[path[-1]] = PLACEHOLDER

    return change


def in_slices(change: Callable[[dict[str, Any]], None]) -> Any:
    """The same models as slices, then changed."""

    def apply(config: dict[str, Any]) -> None:
        names = [config["base_model"], *(m["model"] for m in config.pop("models"))]
        sources = [{"model": name, "layer_range": [0, 1]} for name in names]
        config["slices"] = [{"sources": sources}]
        change(config)

    return apply


# By name, the place in the YAML.
PLACES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{
        name: put("parameters", name)
        for name in ("granularity", "weight", "power", "lambda", "exclude")
    },
    "weight-of-a-model": put("models", 1, "parameters", "weight"),
    "parameters-of-a-model": put("models", 1, "parameters"),
    "parameters": put("parameters"),
    "unknown-parameter": put("parameters", "unknown"),
    "misspelt-parameter": put("parameters", "granularty"),
    "unknown-key": put("unknown"),
    "unknown-key-of-a-model": put("models", 1, "unknown"),
    "models": put("models"),
    "a-model": put("models", 1),
    "model": put("models", 1, "model"),
    "base_model": put("base_model"),
    "merge_method": put("merge_method"),
    "dtype": put("dtype"),
    "out_dtype": put("out_dtype"),
    "tokenizer_source": put("tokenizer_source"),
    "tokenizer": put("tokenizer"),
    "tokenizer-source": put("tokenizer", "source"),
    "chat_template": put("chat_template"),
    "slices": in_slices(put("slices")),
    "a-slice": in_slices(put("slices", 0)),
    "sources": in_slices(put("slices", 0, "sources")),
    "a-source": in_slices(put("slices", 0, "sources", 1)),
    "layer_range": in_slices(put("slices", 0, "sources", 1, "layer_range")),
    "end-of-layers": in_slices(put("slices", 0, "sources", 1, "layer_range", 1)),
    "residual_weight": in_slices(put("slices", 0, "residual_weight")),
    "base-of-a-slice": in_slices(put("slices", 0, "base_model")),
    "parameters-of-a-slice": in_slices(put("slices", 0, "parameters")),
    "weight-of-a-source": in_slices(
        put("slices", 0, "sources", 2, "parameters", "weight")
    ),
    "modules": put("modules"),
}


def hostile_text(models: Path, where: str, value: str) -> str:
    """The good configuration with that value in one place."""
    config = good_config(models)
    PLACES[where](config)
    text = yaml.safe_dump(config, sort_keys=False, width=10**6)
    assert text.count(PLACEHOLDER) == 1
    shown = VALUES[value].replace("MODEL", str(models / "tuned1"))
    return text.replace(PLACEHOLDER, shown)


def invoke(*arguments: str | Path) -> Result:
    """Run our command as a new process would."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(done: Result) -> str | None:
    """What is wrong with a refusal: None for one line, status 2 and no output."""
    if not isinstance(done.exception, SystemExit):
        return f"raised {done.exception!r}"[:400]
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    if done.exit_code != 2 or done.stdout or len(lines) != 1 or errors != lines:
        return f"status {done.exit_code}: {done.stdout[:200]!r} {done.stderr[:400]!r}"
    return None


def wanted_lambdas(config: Any, name: str) -> torch.Tensor | None:
    """The coefficients that a configuration asks for, where constants do.

    None too where the formula, taken literally, exceeds float64.
    """
    shared = {"weight": 1.0, "power": 2.0, "lambda": 1.0, "granularity": "model"}
    shared |= {"exclude": "", **(config.parameters or {})}
    entries = config.models or []
    if [
        Path(str(m)).name for m in (config.base_model, *(e.model for e in entries))
    ] != (list(NAMES)):
        return None
    weights = [
        (entry.parameters or {}).get("weight", shared["weight"]) for entry in entries
    ]
    numbers = [*weights, shared["power"], shared["lambda"]]
    if not entries or any(isinstance(value, list) for value in numbers):
        return None
    if any(hasattr(v, "value") for v in numbers) or hasattr(shared["exclude"], "value"):
        return None
    if isinstance(shared["exclude"], list) or isinstance(shared["granularity"], list):
        return None
    parts = [part.strip() for part in shared["exclude"].split(",")]
    found = naive_lambdas(
        name,
        BASE,
        TUNED,
        granularity=shared["granularity"],
        exclude=[part for part in parts if part],
        weight=[float(weight) for weight in weights],
        power=float(shared["power"]),
        scale=float(shared["lambda"]),
    )
    return found if bool(torch.isfinite(found).all()) else None


def assert_near(
    merged: torch.Tensor,
    base: torch.Tensor,
    models: list[torch.Tensor],
    lambdas: torch.Tensor,
) -> None:
    """Check the bound; where the exact sum is beyond the dtype's range, infinity."""
    nearest = naive_merge(base, models, lambdas).to(merged.dtype)
    fits = nearest.isfinite()
    assert torch.equal(merged[~fits], nearest[~fits])
    fitting = [model[fits] for model in models]
    assert_within_bound(merged[fits], base[fits], fitting, lambdas)


def assert_right(config: Any, text: str, merged: State, folder: Path) -> None:
    """Check a merge against mergekit's, and float64 where settings are constants."""
    for name, tensor in merged.items():
        lambdas = wanted_lambdas(config, name)
        if lambdas is not None and tensor.dtype == torch.float32 and not config.dtype:
            others = [state[name] for state in TUNED]
            assert_near(tensor, BASE[name], others, lambdas)
    theirs = run_mergekit(yaml.safe_load(text), folder / "theirs")
    assert merged.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(merged[name], tensor)


def wrong_in(
    where: str, value: str, models: Path, folder: Path, known: set[str]
) -> str:
    """Inspect, export and merge one text; return what was wrong, or nothing."""
    text = hostile_text(models, where, value)
    file, out = folder / "merge.yml", folder / "out"
    file.write_text(text)
    before = tree(folder)
    inspected = invoke("inspect", file)
    exported = invoke("export", file, "-")
    if exported.exit_code == 0 and inspected.exit_code:
        return f"exported, not inspected: {inspected.stderr[:300]}"
    for done in (inspected, exported):
        if done.exit_code and (wrong := refused(done)):
            return wrong
    if exported.exit_code == 0:
        # Merged once for all texts that mean the same.
        meaning = where if where in IGNORED else merge_yaml.read(text).model_dump_json()
        if meaning in known:
            return "" if tree(folder) == before else "left something"
        known.add(meaning)
    merged = invoke("merge", file, out, *OPTIONS)
    if merged.exit_code:
        wrong = refused(merged)
        left = tree(folder) != before
        return wrong or ("left something" if left else "")
    if exported.exit_code:
        return f"merged, not exported: {exported.stderr[:300]}"
    try:
        assert_right(merge_yaml.read(text), text, read_model(out), folder)
    except Exception as error:
        return f"merged, but {error!r}"[:400]
    finally:
        shutil.rmtree(out)
        for path in folder.glob("theirs*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return ""


# Places and values that are to be mended.
TYPE_DEFECTS: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Configurations that were merged before."""
    return set()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", PLACES)
def test_wrong_types_are_refused_or_right(
    where: str,
    models: Path,
    tmp_path: Path,
    known: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_METAGPT_CACHE", "0")
    # Drawing takes longer than all else, and shows nothing that is not in the report.
    monkeypatch.setattr(merging, "report_figure", lambda report, file: file.touch())
    wrong = {
        value: found
        for value in VALUES
        if (where, value) not in TYPE_DEFECTS
        and (found := wrong_in(where, value, models, tmp_path, known))
    }
    assert not wrong, "\n".join(f"{value}: {found}" for value, found in wrong.items())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        pytest.param(*pair, marks=pytest.mark.xfail(strict=True, reason=reason))
        for pair, reason in TYPE_DEFECTS.items()
    ],
)
def test_wrong_types_that_are_to_be_mended(
    where: str, value: str, models: Path, tmp_path: Path
) -> None:
    assert not wrong_in(where, value, models, tmp_path, set())


# ---- texts that are more than they seem


def laughs(levels: int, width: int = 10) -> str:
    """A text of `levels` lines that stands for width^levels words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{names}]")
    return "\n".join(lines) + "\n"


def with_laughs(line: str = "") -> Callable[[str], str]:
    """The bomb before the text, and a line after it that has a LAUGH in it."""
    return lambda text: laughs(12) + text + line.replace("LAUGH", "*a11") + "\n"


BOMBS: dict[str, Callable[[str], str | bytes]] = {
    "deep-lists": lambda text: text + "x: " + "[" * 10_000 + "]" * 10_000,
    "deep-open-lists": lambda text: text + "x: " + "[" * 100_000,
    "deep-mappings": lambda text: text + "x: " + "{a: " * 10_000 + "}" * 10_000,
    "deep-blocks": lambda text: (
        text + "x:\n" + "\n".join(" " * n + "a:" for n in range(1, 3000))
    ),
    "deep-sequences": lambda text: text + "x:\n " + "- " * 10_000 + "a",
    "deep-900": lambda text: text + "x: " + "[" * 300 + "]" * 300,
    "laughs-unused": with_laughs(),
    "laughs-in-an-unknown-key": with_laughs("unknown: LAUGH"),
    "laughs-in-parameters": with_laughs("parameters: {weight: LAUGH}"),
    "laughs-in-an-unknown-parameter": with_laughs("parameters: {unknown: LAUGH}"),
    "laughs-in-tokenizer": with_laughs("tokenizer: {tokens: {x: LAUGH}}"),
    "laughs-in-modules": with_laughs("modules: {default: {models: LAUGH}}"),
    "laughs-for-a-method": lambda text: (
        laughs(12) + text.replace("merge_method: metagpt", "merge_method: *a11")
    ),
    "quadratic": lambda text: (
        f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 20_000)}]\n{text}"
    ),
    "itself": lambda text: f"a: &a\n  b: *a\n{text}",
    "itself-as-models": lambda text: text + "slices: &s\n- sources: *s\n",
    "merge-keys": lambda text: (
        "a0: &a0 {k0: v}\n"
        + "".join(
            f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n"
            for n in range(1, 9)
        )
        + text
    ),
    "a-megabyte-of-digits": lambda text: f"{text}x: {'9' * 1_000_000}\n",
    "a-megabyte-of-text": lambda text: f"{text}x: '{'x' * 1_000_000}'\n",
    "sexagesimal-digits": lambda text: f"{text}x: {':'.join(['1'] * 20_000)}\n",
    "20000-keys": lambda text: text + "".join(f"k{n}: 1\n" for n in range(20_000)),
    "20000-parameters": lambda text: (
        text + "parameters:\n" + "".join(f"  k{n}: 1\n" for n in range(20_000))
    ),
    "2000-models": lambda text: (
        text + "".join(f"- model: /missing/{n}\n" for n in range(2000))
    ),
    "two-documents": lambda text: f"{text}---\n{text}",
    "no-document": lambda text: "---\n...\n",
    "zeros": lambda text: text + "\0" * 100,
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-32": lambda text: text.encode("utf-32"),
    "utf-7": lambda text: b"+ADw-" + text.encode(),
    "latin-1": lambda text: f"{text}# \xe9".encode("latin-1"),
    "lone-surrogate": lambda text: text.encode() + b"x: \xed\xa0\x80",
    "overlong": lambda text: text.encode() + b"x: \xc0\xaf",
    "control-characters": lambda text: f"{text}x: \x07\x1b[2J\n",
    "binary": lambda text: bytes(range(256)) * 100,
    "a-checkpoint": lambda text: b"\x90\x01\0\0\0\0\0\0" + b'{"a": 1}' * 1000,
}
# Whatever is said of these, the rest of the text is a good configuration.
FINE = {"deep-900", "laughs-unused", "quadratic", "itself", "merge-keys"}
FINE |= {"20000-keys", "20000-parameters", "a-megabyte-of-text"}


BOMB_DEFECTS: dict[str, str] = {}


@pytest.mark.parametrize("name", each(BOMBS, BOMB_DEFECTS))
def test_bombs_are_refused_or_right(name: str, place: Place, tmp_path: Path) -> None:
    """In 30 s and 4 GiB, by each command that reads a YAML, all at once."""
    work = tmp_path.resolve()
    text = yaml.safe_dump(good_config(place.folder), sort_keys=False)
    content = BOMBS[name](text)
    data = content.encode() if isinstance(content, str) else content
    (work / "merge.yml").write_bytes(data)
    file, out = str(work / "merge.yml"), work / "out"
    before = tree(work)
    inspected, exported, merged = place.forks.run(
        place.job(work, "inspect", file),
        place.job(work, "export", file, "-"),
        place.job(work, "merge", file, str(out), *OPTIONS),
    )
    statuses = {ended.status for ended in (inspected, exported, merged)}
    for ended in (inspected, exported, merged):
        assert_contained(ended)
        if ended.status:
            assert ended.status == 2, ended.said
            lines = ended.said.splitlines()
            assert len(lines) == 1 and lines[0].startswith("Error: "), ended.said[:2000]
    assert len(statuses) == 1, (inspected.said, exported.said, merged.said)
    if merged.status == 0:
        assert name in FINE, "accepted"
        lambdas = naive_lambdas("", BASE, TUNED)
        for tensor_name, tensor in read_model(out).items():
            others = [state[tensor_name] for state in TUNED]
            assert_within_bound(tensor, BASE[tensor_name], others, lambdas)
        shutil.rmtree(out)
    assert tree(work) == before


@pytest.mark.parametrize("where", ["granularity", "merge_method", "model"])
def test_errors_are_short(
    where: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = hostile_text(models, where, "word").replace(": word", f": {'x' * 100_000}")
    (tmp_path / "merge.yml").write_text(text)
    # `inspect` takes the YAML of any method.
    words = ("export", "merge.yml", "-") if where == "merge_method" else ()
    done = invoke(*(words or ("inspect", "merge.yml")))
    assert refused(done) is None
    assert len(done.stderr) <= LONGEST


# ---- the cache

# Runs first in a job: a cache of its own, below the folder that it may write to.
WITH_CACHE = "os.environ['MERGEKIT_METAGPT_CACHE'] = ALLOWED + '/cache'"


def forged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An entry of other content whose checksum is right."""

    def make(file: Path) -> None:
        head, _, payload = file.read_bytes().partition(b"\n")
        content = json.loads(payload)
        found = change(content)
        content = content if found is None else found
        payload = json.dumps(content).encode()
        entry = {**json.loads(head), "checksum": sha256(payload).hexdigest()}
        file.write_bytes(json.dumps(entry).encode() + b"\n" + payload)

    return make


def with_head(**changes: Any) -> Callable[[Path], None]:
    """An entry that says other things of itself."""

    def make(file: Path) -> None:
        head, _, payload = file.read_bytes().partition(b"\n")
        entry = {**json.loads(head), **changes}
        file.write_bytes(json.dumps(entry).encode() + b"\n" + payload)

    return make


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of the entry."""

    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def of_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def of_another_pair(file: Path) -> None:
    """Every entry gets the content of the next one, which is whole."""
    files = sorted(file.parent.glob("*.json"))
    following = files[(files.index(file) + 1) % len(files)]
    kept = file.parent / f".{following.stem}"
    if not kept.exists():
        for each in files:
            shutil.copy(each, file.parent / f".{each.stem}")
    shutil.copy(kept, file)


def first_name(content: dict[str, Any]) -> str:
    return sorted(content["sq_norms"])[0]


ENTRIES: dict[str, Callable[[Path], None]] = {
    "folder": instead(lambda file: file.mkdir()),
    "full-folder": instead(lambda file: (file / "x").mkdir(parents=True)),
    "pipe": instead(os.mkfifo),
    "loop": instead(lambda file: file.symlink_to(file.name)),
    "dangling-link": instead(lambda file: file.symlink_to("nowhere")),
    "link-to-zeros": instead(lambda file: file.symlink_to("/dev/zero")),
    "link-to-nothing": instead(lambda file: file.symlink_to("/dev/null")),
    "link-to-its-folder": instead(lambda file: file.symlink_to(".")),
    "link-to-a-model": instead(
        lambda file: file.symlink_to("../base/model.safetensors")
    ),
    "of-another-pair": of_another_pair,
    "deep": of_bytes(lambda data: b"[" * 1_000_000),
    "deep-payload": of_bytes(
        lambda data: data.partition(b"\n")[0] + b"\n" + b"[" * 10**6
    ),
    "lines": of_bytes(lambda data: b"\n" * 1_000_000),
    "20-megabytes": of_bytes(lambda data: b"[" + b"0," * 10_000_000 + b"0]"),
    "20-megabytes-of-payload": of_bytes(
        lambda data: data.partition(b"\n")[0] + b"\n[" + b"0," * 10_000_000 + b"0]"
    ),
    "not-utf-8": of_bytes(lambda data: data.replace(b"{", b"{\xff", 1)),
    "utf-16": of_bytes(lambda data: data.decode().encode("utf-16")),
    "kind-of-a-path": with_head(kind="../../pair"),
    "kind-of-a-number": with_head(kind=3),
    "format-of-a-word": with_head(format="1"),
    "format-huge": with_head(format=10**400),
    "models-of-numbers": with_head(models=[1, 2]),
    "models-many": with_head(models=["x"] * 1_000_000),
    "base-of-a-list": with_head(base=["x"]),
    "checksum-null": with_head(checksum=None),
    "norms-null": forged(lambda content: content.update(sq_norms=None)),
    "norms-a-list": forged(lambda content: content.update(sq_norms=[1.0])),
    "norm-nan": forged(lambda c: c["sq_norms"].update({first_name(c): math.nan})),
    "norm-infinite": forged(lambda c: c["sq_norms"].update({first_name(c): math.inf})),
    "norm-negative": forged(lambda c: c["sq_norms"].update({first_name(c): -1.0})),
    "norm-huge": forged(lambda c: c["sq_norms"].update({first_name(c): 10**400})),
    "norm-a-word": forged(lambda c: c["sq_norms"].update({first_name(c): "1"})),
    "norm-null": forged(lambda c: c["sq_norms"].update({first_name(c): None})),
    "norm-a-list": forged(lambda c: c["sq_norms"].update({first_name(c): [1.0]})),
    "counted-as-null": forged(lambda content: content.update(counted_as=None)),
    "counted-as-a-list": forged(lambda c: c.update(counted_as={"a": ["b"]})),
    "layers-of-numbers": forged(lambda content: content.update(layers={"a": 1})),
    "a-list": forged(lambda content: [content]),
    "a-number": forged(lambda content: 3),
}
# What holds after each but these, which are to be mended.
ENTRY_DEFECTS: dict[str, str] = {}
# Whole entries that say what is not so: their writer is trusted (docs/security.md).
FORGED: dict[str, Callable[[Path], None]] = {
    "nothing-counts": forged(lambda content: content.update(sq_norms={})),
    "one-norm-less": forged(lambda c: c["sq_norms"].pop(first_name(c)) and None),
    "one-norm-more": forged(lambda content: content["sq_norms"].update(more=1.0)),
    "a-norm-renamed": forged(
        lambda c: c["sq_norms"].update({"../x": c["sq_norms"].pop(first_name(c))})
    ),
    "counted-as-an-unknown-name": forged(
        lambda c: c["counted_as"].update({first_name(c): "unknown"})
    ),
    "20000-norms-more": forged(
        lambda content: content["sq_norms"].update(
            {f"more.{n}": 1.0 for n in range(20_000)}
        )
    ),
}


@pytest.fixture
def cached(place: Place, tmp_path: Path) -> Path:
    """A folder with models of its own, and a cache of what was measured of them."""
    work = write_family(tmp_path.resolve())
    (ended,) = place.forks.run(place.job(work, code=f"{WITH_CACHE}\n{scan_code(work)}"))
    assert ended.status == 0, ended
    assert_right_norms(ended.said)
    assert len(entries_of(work)) == len(TUNED)
    return work


def scan_code(work: Path) -> str:
    return f"MODELS = {[str(work / name) for name in NAMES]!r}\n{SCAN}"


def entries_of(work: Path) -> list[Path]:
    return sorted((work / "cache").glob("*.json"))


def assert_right_norms(said: str) -> None:
    found = json.loads(said.splitlines()[-1])
    assert "sq_norms" in found, found
    sq_norms = torch.tensor(found["sq_norms"], dtype=torch.float64)
    torch.testing.assert_close(
        sq_norms, naive_sq_norms(BASE, TUNED), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", each(ENTRIES, ENTRY_DEFECTS))
def test_a_hostile_entry_is_measured_anew(
    name: str, place: Place, cached: Path
) -> None:
    for file in entries_of(cached):
        ENTRIES[name](file)
    models = [str(cached / model) for model in NAMES]
    before: Mapping[str, object] = {
        path: seen for path, seen in tree(cached).items() if "/cache" not in path
    }
    scanned, inspected, shown = place.forks.run(
        place.job(cached, code=f"{WITH_CACHE}\n{scan_code(cached)}"),
        place.job(cached, "inspect", "--base", *models, "--csv", "-", code=WITH_CACHE),
        place.job(cached, "cache", code=WITH_CACHE),
    )
    for ended in (scanned, inspected, shown):
        assert_contained(ended)
        assert ended.status == 0, ended.said
        assert "Traceback" not in ended.said
    assert_right_norms(scanned.said)
    norms = [line.split(",")[3] for line in inspected.said.splitlines()[-2:]]
    assert [float(norm) for norm in norms] == pytest.approx(
        naive_sq_norms(BASE, TUNED).tolist(), rel=1e-12
    )
    (cleared,) = place.forks.run(place.job(cached, "cache", "--clear", code=WITH_CACHE))
    assert_contained(cleared)
    assert cleared.status in (0, 2), cleared.said
    after = {path: seen for path, seen in tree(cached).items() if "/cache" not in path}
    assert after == before


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_entry_is_used_or_not_but_breaks_nothing(
    name: str, place: Place, cached: Path
) -> None:
    for file in entries_of(cached):
        FORGED[name](file)
    models = [str(cached / model) for model in NAMES]
    for ended in place.forks.run(
        place.job(cached, code=f"{WITH_CACHE}\n{scan_code(cached)}"),
        place.job(cached, "inspect", "--base", *models, code=WITH_CACHE),
        place.job(cached, "cache", code=WITH_CACHE),
    ):
        assert_contained(ended)
        assert ended.status in (0, 2), ended.said
        assert "Traceback" not in ended.said


def assert_printable(said: str) -> None:
    """Check for no character that could move a terminal's cursor, or worse."""
    odd = {char for char in said if ord(char) < 32 or 127 <= ord(char) < 160}
    assert odd <= {"\n"}, odd


def test_entries_are_shown_without_control_characters(
    place: Place, cached: Path
) -> None:
    for file in entries_of(cached):
        with_head(base="\x1b[2J\x07\n\r[bold]x", models=["\x9b31m", "a\tb"])(file)
    (shown,) = place.forks.run(place.job(cached, "cache", code=WITH_CACHE))
    assert shown.status == 0, shown.said
    assert_printable(shown.said)
    assert "[bold]x" in shown.said


def test_names_of_tensors_are_shown_without_control_characters(
    place: Place, tmp_path: Path
) -> None:
    """A model that was downloaded must not write to the terminal as it likes."""
    work = write_family(tmp_path.resolve())
    MUTATIONS["another-tensor-escape"].spoil(work / "tuned1")
    MUTATIONS["renamed-to-escape"].spoil(work / "tuned0")
    models = [str(work / model) for model in NAMES]
    for ended in place.forks.run(
        place.job(work, "inspect", "--base", models[0], models[2]),
        place.job(work, "inspect", "--base", models[0], models[1]),
    ):
        assert_contained(ended)
        assert_printable(ended.said)


def test_there_are_hundreds() -> None:
    assert len(PLACES) * len(VALUES) > 1000
    assert len(BOMBS) > 30 and len({**ENTRIES, **FORGED}) > 40
