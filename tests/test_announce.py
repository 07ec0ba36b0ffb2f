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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts

from mergekit_metagpt.scanning import threads
from tests.conftest import Family, make_family
from tests.families import (
    cast,
    llama_state,
    merge_config,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.oracle import assert_same_bits, naive_coefficients, naive_sq_norms
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


@pytest.fixture(scope="module")
def in_a_file(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """A merge whose stdout and stderr go to files."""
    out = tmp_path_factory.mktemp("in_a_file") / "out"
    done = mergekit_yaml(merge_config(family.base, family.models), out)
    assert_succeeded(done)
    return done


def test_one_line_with_lambda(
    in_a_file: subprocess.CompletedProcess[str], family: Family
) -> None:
    assert_nothing_from_us(in_a_file.stdout)
    (line,) = [line for line in screen(in_a_file.stderr) if "coefficients" in line]
    assert_names_lambda(line, family)
    assert in_a_file.stderr.count("mergekit_metagpt:") == 1


def test_no_progress_without_a_terminal(
    in_a_file: subprocess.CompletedProcess[str],
) -> None:
    assert "Executing graph" in in_a_file.stderr
    assert BAR not in in_a_file.stderr


def test_the_line_has_a_row_of_its_own(
    in_a_file: subprocess.CompletedProcess[str], family: Family
) -> None:
    """mergekit's bar is in use when lambda is known: they must not share a row."""
    assert_row_of_its_own(in_a_file.stderr, family)


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


@pytest.fixture(scope="module")
def in_a_terminal(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """What a merge on a terminal writes to stdout and to stderr."""
    out = tmp_path_factory.mktemp("in_a_terminal") / "out"
    return on_a_terminal(merge_command(merge_config(family.base, family.models), out))


def test_progress_on_a_terminal(in_a_terminal: tuple[str, str], family: Family) -> None:
    out, shown = in_a_terminal
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


def test_the_line_has_a_row_of_its_own_on_a_terminal(
    in_a_terminal: tuple[str, str], family: Family
) -> None:
    assert_row_of_its_own(in_a_terminal[1], family)


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


def test_level_above_warning_silences_all(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("mergekit_metagpt")
    logger.setLevel(logging.ERROR)
    try:
        run_mergekit(merge_config(family.base, family.models), tmp_path / "out")
    finally:
        logger.setLevel(logging.NOTSET)
    assert_nothing_from_us("".join(capfd.readouterr()))


@pytest.mark.parametrize("fresh", [True, False], ids=["reopened", "kept open"])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_lambda_once_a_merge(
    granularity: str,
    fresh: bool,
    family: Family,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parameters = {"granularity": granularity}
    config = merge_config(family.base, family.models, parameters=parameters)
    for count in (1, 2):
        run_mergekit(config, tmp_path / f"out{count}", fresh=fresh)
        assert len(said(caplog, "coefficients of ")) == count


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1e-2, 1e-2, 1e-1), r"and takes 98\.\d\d% of the merge"),
        ((1e-3, 5e-2, 5e-2), r"and gets only 0\.0\d% of the merge"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["reopened", "kept open"])
def test_degenerate_merge_is_said_once(
    sizes: tuple[float, ...],
    words: str,
    fresh: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = make_family(tmp_path / "family", sizes=sizes)
    config = merge_config(family.base, family.models)
    for count in (1, 2):
        run_mergekit(config, tmp_path / f"out{count}", fresh=fresh)
        warnings = said(caplog, "of the merge")
        assert len(warnings) == count
        assert re.search(words, warnings[-1])
        for way_out in ("weight: ", "LoRA", "wrong base"):
            assert way_out in warnings[-1]


def test_ordinary_merge_warns_of_nothing(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_mergekit(merge_config(family.base, family.models), tmp_path / "out")
    assert said(caplog, "") == said(
        caplog, "coefficients of the whole model (power 2): "
    )
    assert_names_lambda(said(caplog, "")[0], family)


def test_other_merge_with_the_same_base_has_its_own_line(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for models in (family.models[:2], family.models[1:], family.models[:2]):
        caplog.clear()
        run_mergekit(merge_config(family.base, models), tmp_path / "out", fresh=False)
        (line,) = said(caplog, "coefficients of ")
        assert [str(model) in line for model in family.models] == [
            model in models for model in family.models
        ]


def test_no_task_vector_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = cast(llama_state(), torch.bfloat16)
    base, *copies = (write_model(tmp_path / f"same{k}", state) for k in range(3))
    config = merge_config(base, copies)
    for count in (1, 2):
        merged = run_mergekit(config, tmp_path / f"out{count}")
        (*_, warning) = said(caplog, "no model differs from the base")
        assert len(said(caplog, "")) == count
        assert str(base) in warning
        for name, tensor in merged.items():
            assert_same_bits(tensor, state[name])


def test_left_out_model_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A negative power has no value for a model that equals the base."""
    whole = llama_state()
    states = [whole, whole, tuned(whole, 1), tuned(whole, 2)]
    base, same, *moved = (
        write_model(tmp_path / f"model{k}", state) for k, state in enumerate(states)
    )
    config = merge_config(base, [same, *moved], parameters={"power": -1.0})
    for count in (1, 2):
        run_mergekit(config, tmp_path / f"out{count}")
        warnings = said(caplog, "left out")
        assert len(warnings) == count
        assert str(same) in warnings[-1]
        assert not any(str(model) in warnings[-1] for model in moved)


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
    tmp_path: Path, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config(family.base, family.models)
    config["models"][0]["parameters"] = {"weight": 0}
    run_mergekit(config, tmp_path / "out")
    assert "Usual causes" not in caplog.text


@pytest.mark.parametrize(
    "parameters, wanted",
    [
        ({"lambda": 0.5}, ", their sum scaled by lambda 0.5 (base"),
        ({"power": 1.0, "exclude": "mlp"}, " (power 1, without mlp): "),
        ({"granularity": "layer"}, "; -v lists all pools)"),
        ({"granularity": "tensor"}, "; -v lists all pools)"),
    ],
)
def test_the_line_tells_what_it_leaves_out(
    parameters: dict[str, object],
    wanted: str,
    tmp_path: Path,
    family: Family,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = merge_config(family.base, family.models, parameters=parameters)
    run_mergekit(config, tmp_path / "out")
    (line,) = (m for m in caplog.messages if m.startswith("coefficients of"))
    assert wanted in line


@pytest.mark.parametrize("weight", [[1.0, 2.0], [{"filter": "mlp", "value": 2.0}]])
def test_the_line_says_that_it_holds_for_its_tensor_only(
    weight: Any, tmp_path: Path, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config(family.base, family.models)
    config["models"][0]["parameters"] = {"weight": weight}
    run_mergekit(config, tmp_path / "out")
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
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = make_family(tmp_path / "far", sizes=(1e-2, 1e-2, 1e-1))
    run_mergekit(merge_config(far.base, far.models), tmp_path / "out")
    assert re.search(r"tuned2 moved 10 times more than \S+ and takes", caplog.text)
    assert "weight: 0.01 for " in caplog.text
    caplog.clear()
    near = make_family(tmp_path / "near", sizes=(1e-4, 1e-2, 1e-2))
    run_mergekit(merge_config(near.base, near.models), tmp_path / "out2")
    found = re.search(r"tuned0 moved (\d+) times less than \S+ and gets", caplog.text)
    weight = re.search(r"weight: (\d+) for \S*tuned0 ", caplog.text)
    assert found and weight
    # An equal share of three, beside two alike.
    assert float(weight[1]) == pytest.approx(float(found[1]) ** 2, rel=0.05)


def test_weights_of_the_yaml_are_said(
    tmp_path: Path, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight left over from another recipe counts; whoever reads the line sees it."""
    config = merge_config(family.base, family.models)
    config["models"][0]["parameters"] = {"weight": 1e-3}
    run_mergekit(config, tmp_path / "out")
    (line,) = said(caplog, "coefficients of")
    assert f"{family.models[0]} (weight 0.001), " in line
    assert line.count("weight") == 1
    (warning,) = said(caplog, "of the merge")
    assert "Usual causes: a weight left over in the YAML, a LoRA" in warning
    caplog.clear()
    for model in config["models"]:
        model["parameters"] = {"weight": 2}
    run_mergekit(config, tmp_path / "alike")
    assert said(caplog, "coefficients of")[0].count("(weight 2)") == len(family.models)
    assert "left over" not in caplog.text


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_an_exclude_that_names_nothing_is_an_error(
    granularity: str, family: Family, tmp_path: Path
) -> None:
    parameters = {"exclude": "embed_token_s, lm_head", "granularity": granularity}
    config = merge_config(family.base, family.models, parameters=parameters)
    with pytest.raises(ValueError, match=r"exclude: embed_token_s is in no tensor"):
        run_mergekit(config, tmp_path / "out")
    parameters["exclude"] = "embed_tokens,lm_head"
    run_mergekit(config, tmp_path / "well")


def test_no_warning_is_repeated_that_was_logged_before_the_merge(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = merge_methods.get("metagpt")
    config = merge_config(family.base, [family.base, family.models[0]])
    config["models"].append(
        {"model": str(family.models[1]), "parameters": {"weight": 0.01}}
    )
    with method.watch.already_warned():
        run_mergekit(config, tmp_path / "out")
    assert not said(caplog, " takes ") and said(caplog, "coefficients of")
    run_mergekit(config, tmp_path / "again")
    assert said(caplog, " takes ")
