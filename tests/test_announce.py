"""What a merge says, where and how often: lambda, tables, warnings, progress."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts

from mergekit_metagpt.scanning import threads
from tests.conftest import Family, make_family
from tests.families import (
    State,
    merge_config,
    run_mergekit,
    said,
    tuned,
)
from tests.oracle import assert_same_states, naive_coefficients, naive_sq_norms
from tests.processes import (
    assert_succeeded,
    environment,
    merge_command,
    mergekit_yaml,
)

LINE = "WARNING:mergekit_metagpt:coefficients of "
BAR = "measuring task vectors"


def screen(text: str) -> list[str]:
    """The rows that a terminal shows after this text, without wrapping."""
    rows, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[A)", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[A":
            row = max(row - 1, 0)
        elif part:
            old = rows[row].ljust(column)
            rows[row] = old[:column] + part + old[column + len(part) :]
            column += len(part)
    return [shown.rstrip() for shown in rows]


def test_screen() -> None:
    assert screen("one\rTW\n\nthree\x1b[A\rx\n") == ["TWe", "x", "three"]


def assert_names_lambda(line: str, family: Family) -> None:
    """Check that a line gives every model its coefficient, and nothing is left out."""
    expected = naive_coefficients(naive_sq_norms(family.base_state, family.states))
    for value, model in zip(expected.tolist(), family.models, strict=True):
        (number,) = re.findall(rf"(\S+) {re.escape(str(model))}(?=,| |$)", line)
        assert float(number) == pytest.approx(value, rel=1e-3)
    assert str(family.base) in line


def assert_row_of_its_own(shown: str, family: Family) -> None:
    """Check that what is seen on the line's row is the line, and nothing else."""
    (line,) = [row for row in screen(shown) if "coefficients" in row]
    assert line.startswith(LINE)
    assert line.endswith(f"(base {family.base})")


def assert_nothing_from_us(text: str) -> None:
    """Check that neither coefficients nor a bar nor our name is in what was printed."""
    assert not re.search(rf"coefficients|{BAR}|metagpt", text), text


# ---- through the real `mergekit-yaml`


def test_one_line_with_lambda(family: Family, tmp_path: Path) -> None:
    done = mergekit_yaml(merge_config(family.base, family.models), tmp_path / "out")
    assert_succeeded(done)
    assert_nothing_from_us(done.stdout)
    (line,) = [line for line in screen(done.stderr) if "coefficients" in line]
    assert_names_lambda(line, family)
    assert done.stderr.count("mergekit_metagpt:") == 1
    # mergekit's bar is in use when lambda is known: they must not share a row.
    assert_row_of_its_own(done.stderr, family)
    # Without a terminal, no progress of ours.
    assert "Executing graph" in done.stderr and BAR not in done.stderr


def test_table_at_info(family: Family, tmp_path: Path) -> None:
    config = merge_config(family.base, family.models)
    done = mergekit_yaml(config, tmp_path / "out", "-v", "--quiet")
    assert_succeeded(done)
    assert_nothing_from_us(done.stdout)
    assert sum(line.startswith(LINE) for line in done.stderr.splitlines()) == 1
    assert done.stderr.count("INFO:mergekit_metagpt:task vectors of") == 1
    sq_norms = naive_sq_norms(family.base_state, family.states)
    rows = zip(
        naive_coefficients(sq_norms).tolist(),
        sq_norms.sqrt().tolist(),
        family.models,
        strict=True,
    )
    for share, norm, model in rows:
        row = rf"^ +(\S+) +(\S+) +{re.escape(str(model))}$"
        (numbers,) = re.findall(row, done.stderr, re.MULTILINE)
        assert [float(n) for n in numbers] == pytest.approx([share, norm], rel=1e-4)


def test_quiet_silences_the_line_alone(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", sizes=(1e-3, 1e-3, 1e-1))
    config = merge_config(family.base, family.models)
    done = mergekit_yaml(
        config, tmp_path / "out", "--quiet", MERGEKIT_METAGPT_QUIET="1"
    )
    assert_succeeded(done)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("WARNING:mergekit_metagpt:") for line in lines)
    assert not any("coefficients of" in line for line in lines)
    assert any(f"{family.models[2]} moved " in line for line in lines)


def on_a_terminal(command: Sequence[str | Path]) -> tuple[str, str]:
    """Run a command with stderr on a terminal of 160 columns: stdout and stderr."""
    fcntl = pytest.importorskip("fcntl", reason="needs pseudo-terminals")
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))
    shown = b""
    with subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(),
        cwd=sys.prefix,
    ) as process:
        os.close(theirs)
        try:
            while data := os.read(ours, 1 << 16):
                shown += data
        except OSError:  # Linux says so when the other end is closed
            pass
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return out, shown.decode().replace("\r\n", "\n")


def test_progress_on_a_terminal(family: Family, tmp_path: Path) -> None:
    config = merge_config(family.base, family.models)
    out, shown = on_a_terminal(merge_command(config, tmp_path / "out"))
    assert_nothing_from_us(out)
    states = [family.base_state, *family.states]
    size = sum(tensor.nbytes for state in states for tensor in state.values())
    bars = [part for part in re.split(r"[\r\n]", shown) if BAR in part]
    assert bars
    assert f"0.00/{size / 1000:.0f}k [00:00<" in bars[0]
    assert "B/s]" in bars[0]
    assert not [row for row in screen(shown) if BAR in row], "the bar is left behind"
    (line,) = [row for row in screen(shown) if "coefficients" in row]
    assert_names_lambda(line, family)
    assert_row_of_its_own(shown, family)


# ---- progress


class Terminal(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


def slow_task() -> torch.Tensor:
    time.sleep(0.12)
    return torch.zeros(())


@pytest.mark.parametrize("stderr", [Terminal(), io.StringIO()], ids=["tty", "file"])
def test_bytes_rate_and_time_left(
    stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert len(threads.run([(3_000_000, slow_task)] * 5, 1)) == 5
    shown = stderr.getvalue()
    if not stderr.isatty():
        assert shown == ""
        return
    assert "0.00/15.0M [00:00<?, ?B/s]" in shown
    assert re.search(r"[369]\.00M?/15\.0M \[00:00<00:00, [12]\d\.\dMB/s\]", shown)
    assert screen(shown) == [""]


# ---- in one process

Merge = Callable[..., State]


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Merge a family in this process, with weights of its first models."""

    def merged(
        family: Family, *weights: Any, fresh: bool = True, **settings: Any
    ) -> State:
        config = merge_config(family.base, family.models, **settings)
        for entry, weight in zip(config["models"], weights, strict=False):
            entry["parameters"] = {"weight": weight}
        return run_mergekit(config, tmp_path / "out", fresh=fresh)

    return merged


def test_level_above_warning_silences_all(
    family: Family, merge: Merge, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("mergekit_metagpt")
    logger.setLevel(logging.ERROR)
    try:
        merge(family)
    finally:
        logger.setLevel(logging.NOTSET)
    assert_nothing_from_us("".join(capfd.readouterr()))


@pytest.mark.parametrize("fresh", [True, False], ids=["reopened", "kept open"])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_lambda_once_a_merge(
    granularity: str,
    fresh: bool,
    family: Family,
    merge: Merge,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for count in (1, 2):
        merge(family, fresh=fresh, parameters={"granularity": granularity})
        assert len(said(caplog, "coefficients of ")) == count


def test_ordinary_merge_warns_of_nothing(
    family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    merge(family)
    (line,) = said(caplog, "")
    assert "coefficients of the whole model (power 2): " in line
    assert_names_lambda(line, family)


def test_other_merge_with_the_same_base_has_its_own_line(
    family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    for models in (family.models[:2], family.models[1:], family.models[:2]):
        caplog.clear()
        merge(replace(family, models=models), fresh=False)
        (line,) = said(caplog, "coefficients of ")
        assert [str(model) in line for model in family.models] == [
            model in models for model in family.models
        ]


def test_no_task_vector_is_said_once(
    tmp_path: Path, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    family = make_family(tmp_path, sizes=(0.0,))
    for count in (1, 2):
        merged = merge(family)
        (*_, warning) = said(caplog, "no model differs from the base")
        assert len(said(caplog, "")) == count
        assert str(family.base) in warning
        assert_same_states(merged, family.base_state)


def test_in_memory_merge_shows_no_line(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    """Its caller has the tensors at hand; perils are said, once per call."""
    states = {"base": family.base_state, "a": family.states[0]}
    states["b"] = tuned(family.base_state, 7, size=1.0)
    for count in (1, 2):
        merge_state_dicts(states, "metagpt", base="base")
        assert not said(caplog, "coefficients of ")
        assert len(said(caplog, "of the merge")) == count


def test_a_model_without_weight_is_no_degenerate_result(
    family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    merge(family, 0)
    assert "Usual causes" not in caplog.text


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ({"lambda": 0.5}, ", their sum scaled by lambda 0.5 (base"),
        ({"power": 1.0, "exclude": "mlp"}, " (power 1, without mlp): "),
        ({"granularity": "layer"}, "; -v lists all pools)"),
        ({"granularity": "tensor"}, "; -v lists all pools)"),
    ],
)
def test_the_line_tells_what_it_leaves_out(
    parameters: dict[str, object],
    expected: str,
    family: Family,
    merge: Merge,
    caplog: pytest.LogCaptureFixture,
) -> None:
    merge(family, parameters=parameters)
    (line,) = said(caplog, "coefficients of")
    assert expected in line


@pytest.mark.parametrize("weight", [[1.0, 2.0], [{"filter": "mlp", "value": 2.0}]])
def test_the_line_says_that_it_holds_for_its_tensor_only(
    weight: Any, family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    merge(family, weight)
    (line,) = said(caplog, "coefficients of")
    assert "others elsewhere" in line and "mergekit-metagpt inspect" in line


def test_slices_of_different_models_set_nothing_by_tensor(
    tmp_path: Path, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    slices = [
        {
            "sources": [
                {"model": str(model), "layer_range": layers}
                for model in (family.base, *models)
            ]
        }
        for layers, models in (([0, 2], family.models), ([2, 3], family.models[:2]))
    ]
    run_mergekit(merge_config(family.base, [], slices=slices), tmp_path / "out")
    assert said(caplog, "coefficients of") and not said(caplog, "others elsewhere")


def test_degenerate_warning_says_which_way_a_weight_must_go(
    tmp_path: Path, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    """More in test_perils.py; once a merge: test_sq_norm_rules.py."""
    merge(make_family(tmp_path / "far", sizes=(1e-2, 1e-2, 1e-1)))
    assert re.search(
        r"tuned2 moved (9\.9\d|10) times more than \S+ and takes", caplog.text
    )
    assert "weight: 0.01 for " in caplog.text


def test_weights_of_the_yaml_are_said(
    family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight left over from another recipe counts; whoever reads the line sees it."""
    merge(family, 1e-3)
    (line,) = said(caplog, "coefficients of")
    assert f"{family.models[0]} (weight 0.001), " in line
    assert line.count("weight") == 1
    (warning,) = said(caplog, "of the merge")
    assert "Usual causes: a weight left over in the YAML, a LoRA" in warning
    caplog.clear()
    merge(family, 2, 2, 2)
    assert said(caplog, "coefficients of")[0].count("(weight 2)") == len(family.models)
    assert "left over" not in caplog.text


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_an_exclude_that_names_nothing_is_an_error(
    granularity: str, family: Family, merge: Merge
) -> None:
    parameters = {"exclude": "embed_token_s, lm_head", "granularity": granularity}
    with pytest.raises(ValueError, match=r"exclude: embed_token_s is in no tensor"):
        merge(family, parameters=parameters)
    merge(family, parameters={**parameters, "exclude": "embed_tokens,lm_head"})


def test_no_warning_is_repeated_that_was_logged_before_the_merge(
    family: Family, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    with merge_methods.get("metagpt").watch.already_warned():
        merge(family, 1e-3)
    assert not said(caplog, "of the merge") and said(caplog, "coefficients of")
    merge(family, 1e-3)
    assert said(caplog, "of the merge")
