"""`inspect --remote`: few requests and bytes, bits of a local sample, clear errors."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from mergekit_metagpt.checkpoints import ranges
from mergekit_metagpt.scanning import cache, once, sampling
from mergekit_metagpt.scanning.sampling import BLOCK
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    run_command,
    tuned,
    write_model,
)
from tests.hub import Asked, Hub, point_to, serving

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SIZES = {
    "hidden_size": 128,
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NAMES = ("base", "math", "code", "chat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes in bfloat16, one of them in three shards."""
    home = tmp_path_factory.mktemp("models")
    base = llama_state(**SIZES)
    states = {"base": base}
    for seed, name in enumerate(NAMES[1:], 1):
        states[name] = tuned(base, seed, size=1e-2 * seed)
    return {
        name: write_model(
            home / name,
            cast(state, torch.bfloat16),
            llama_config(**SIZES),
            shards=3 if name == "code" else 1,
        )
        for name, state in states.items()
    }


@pytest.fixture
def hub(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """The family on a hub, a process that has measured nothing, and no long waits."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name in ("_PAIRS", "_REQUESTS", "_SAMPLES", "_FAILURES"):
        monkeypatch.setattr(once, name, {})
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(Hub()) as made:
        point_to(made.address, monkeypatch)
        for name, folder in folders.items():
            made.add(f"org/{name}", folder)
        yield made
        close_session()


FAMILY = ("--base", "org/base", "org/math", "org/code", "org/chat")


def inspect(*arguments: str | Path) -> int:
    return run_command("inspect", "--remote", *arguments)


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    assert inspect(*arguments, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run, and return the one line on stderr."""
    assert inspect(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("Error: ")


def of_weights(hub: Hub) -> list[Asked]:
    return [asked for asked in hub.asked if asked.path.startswith("/cdn")]


def test_headers_alone_cost_few_requests_and_bytes(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, *FAMILY, "--sample", "0")
    assert found["families"] == []
    assert hub.bytes_sent <= 1_000_000
    # Each repository: what is in it, its config.json, and each header by a redirect;
    # of the sharded one its index, too. (huggingface_hub asks for its own purposes.)
    asked = [at.path for at in hub.asked if not at.path.startswith("/api/agent")]
    assert len(asked) == 3 * (1 + 1 + 2) + (1 + 1 + 1 + 3 * 2)
    assert len(set(asked)) == len(asked)
    assert not [at for at in of_weights(hub) if at.range != "bytes=0-65535"]


def test_headers_tell_what_a_local_inspect_tells(
    hub: Hub, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, *FAMILY, "--sample", "0")["headers"]
    models = [str(folders[name]) for name in NAMES]
    assert run_command("inspect", "--base", *models, "--json", "-") == 0
    (local,) = json.loads(capsys.readouterr().out)["families"]
    for header, own in zip(found, [local["base"], *local["models"]], strict=True):
        assert header["parameters"] == own["parameters"]
        assert header["precisions"] == own["precisions"]
        assert header["download"] == sum(
            file["bytes"] for file in own["source"]["files"]
        )
        assert header["vocabulary"] == SIZES["vocab_size"]
        assert header["tied"] is header["quantised"] is header["misfit"] or (
            header["tied"] is False
        )
        assert header["not_written"] == {**own["not_written"], "share": None}
        if "not_in_base" in own:
            assert header["not_in_base"] == own["not_in_base"]
            assert header["only_in_base"] == own["only_in_base"]
    assert [header["base"] for header in found] == [None] + ["org/base"] * 3
    assert len({header["commit"] for header in found}) == 4


def test_headers_tell_what_a_merge_would_leave_out(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {**llama_state(**SIZES), "model.layers.2.mtp.weight": torch.ones(4, 4)}
    hub.add("org/extra", write_model(tmp_path / "m", extra, llama_config(**SIZES)))
    models = ("--base", "org/base", "org/extra", "--sample", "0")
    base, model = report(capsys, *models)["headers"]
    assert base["not_written"]["count"] == 0
    assert model["not_written"]["examples"] == ["model.layers.2.mtp.weight"]
    assert inspect(*models) == 0
    assert (
        ": 1 tensor (model.layers.2.mtp.weight; 0.0 MB) that mergekit leaves out"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("redirect", [True, False])
def test_a_remote_sample_has_the_bits_of_a_local_one(
    redirect: bool,
    hub: Hub,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.redirect = redirect
    (remote,) = report(capsys, *FAMILY, "--sample", "20%")["families"]
    monkeypatch.setenv(cache.VARIABLE, "0")
    models = [str(folders[name]) for name in NAMES]
    arguments = ["inspect", "--base", *models, "--sample", "20%", "--json", "-"]
    assert run_command(*arguments) == 0
    (local,) = json.loads(capsys.readouterr().out)["families"]
    for key in ("sample", "cosines", "cosines_se", "pools", "layers"):
        assert remote[key] == local[key], key
    for ours, theirs in zip(remote["models"], local["models"], strict=True):
        for key in ("sq_norm", "sq_norm_se", "coefficient", "coefficient_se"):
            assert ours[key] == theirs[key] and ours[key] > 0


def test_local_folders_may_stand_among_repositories(
    hub: Hub, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ("--base", "org/base", folders["math"], "org/code", folders["chat"])
    found = report(capsys, *mixed, "--sample", "20%")
    commits = [header["commit"] for header in found["headers"]]
    assert [commit is None for commit in commits] == [False, True, False, True]
    assert [h["download"] > 0 for h in found["headers"]] == [True, False, True, False]
    once._REQUESTS.clear()
    (all_remote,) = report(capsys, *FAMILY, "--sample", "20%")["families"]
    (family,) = found["families"]
    assert family["pools"] == all_remote["pools"]


def test_a_budget_bounds_what_is_sent(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = 4_000_000
    (family,) = report(capsys, *FAMILY, "--budget", "4MB")["families"]
    assert 0.9 * budget < family["sample"]["bytes_read"] <= budget
    assert family["sample"]["bytes_read"] < hub.bytes_sent <= 1.2 * budget
    # Once where the weights lie is known, blocks are read there: no more redirects.
    resolved = [a for a in hub.asked if a.path.endswith(".safetensors")]
    assert len(resolved) == 3 + 3


def test_the_number_of_requests_is_bounded(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "MOST_READS", 40)
    sizes = {**SIZES, "vocab_size": 8192, "num_hidden_layers": 1}
    base = llama_state(**sizes)
    for seed, name in enumerate(("long", "longer")):
        state = cast(tuned(base, seed, size=1e-3 * (seed + 1)), torch.bfloat16)
        folder = write_model(tmp_path / name, state, llama_config(**sizes))
        hub.add(f"org/{name}", folder)
    models = ("--base", "org/long", "org/longer")
    (family,) = report(capsys, *models, "--budget", "1.5MB")["families"]
    assert 1.2e6 < family["sample"]["bytes_read"] <= 1.5e6
    assert hub.bytes_sent <= 1.2 * 1.5e6
    lengths = [last + 1 - first for first, last in hub.ranges()]
    assert max(lengths) >= 2 * 4 * BLOCK
    # Beside the blocks, each model's header, its matrices that are read whole, and
    # heads that are compared with embeddings.
    whole = sum(t.numel() < sampling.WHOLE for t in base.values())
    assert len(lengths) <= 40 + 2 * (1 + whole) + 2 * sampling.COMPARED


def test_neighbouring_blocks_are_read_at_once(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    report(capsys, *FAMILY, "--sample", "50%")
    sizes = [last - first + 1 for first, last in hub.ranges()]
    assert any(size > 2 * BLOCK and size % (2 * BLOCK) == 0 for size in sizes)
    (family,) = report(capsys, *FAMILY, "--sample", "50%")["families"]
    blocks = family["sample"]["bytes_read"] / (2 * BLOCK)
    assert len(sizes) < 0.85 * blocks


def test_the_default_budget_reads_small_models_whole(
    hub: Hub, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, *FAMILY)
    (family,) = found["families"]
    assert family["sample"] is None
    models = [str(folders[name]) for name in NAMES]
    once._REQUESTS.clear()
    once._PAIRS.clear()
    cache.clear()
    assert run_command("inspect", "--base", *models, "--json", "-") == 0
    (local,) = json.loads(capsys.readouterr().out)["families"]
    assert family["pools"] == local["pools"]


def test_nothing_is_kept_but_estimates(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    report(capsys, *FAMILY, "--sample", "20%")
    assert not list(scratch.iterdir())
    assert not (tmp_path / "hub").exists()
    (entry,) = (tmp_path / "cache").iterdir()
    sent = len(of_weights(hub))
    report(capsys, *FAMILY, "--sample", "20%")
    assert len(of_weights(hub)) - sent == 6  # the headers, and no block
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_another_commit_is_measured_anew(
    hub: Hub,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tuned(llama_state(**SIZES), 9, size=5e-2)
    folder = write_model(
        tmp_path / "other", cast(other, torch.bfloat16), llama_config(**SIZES)
    )
    commit = hub.add("org/math", folder, "v2")
    models = ("org/math", "org/math@v2", f"org/math@{commit[:40]}")
    norms = []
    for model in models:
        found = report(capsys, "--base", "org/base", model, "--sample", "20%")
        norms.append(found["families"][0]["models"][0]["norm"])
        assert found["families"][0]["models"][0]["source"]["revision"]
    assert norms[1] > 3 * norms[0] and norms[1] == norms[2]
    said = refused(capsys, "--base", "org/base", "org/math@v3")
    assert "org/math@v3" in said and "no such revision" in said


def test_a_repository_that_is_not_there(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "--base", "org/base", "org/nothing")
    assert "org/nothing is not on " in said and "log in" in said


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository(
    token: str | None,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.gated.add("org/code")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refused(capsys, *FAMILY)
    assert "org/code is gated" in said and "hf auth login" in said


def test_the_users_token_opens_gates_and_stays_on_the_hub(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.update({"org/base", "org/code"})
    monkeypatch.setenv("HF_TOKEN", hub.token)
    report(capsys, *FAMILY, "--sample", "20%")
    blocks = [at for at in of_weights(hub) if at.range != "bytes=0-65535"]
    assert blocks and not [at for at in blocks if at.token]


def test_an_address_that_expires_is_asked_for_again(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def expire(asked: Asked) -> None:
        if len(of_weights(hub)) >= 30:  # of requests that run side by side
            hub.signature = "2"

    hub.trouble = expire
    (family,) = report(capsys, *FAMILY, "--sample", "20%")["families"]
    assert family["sample"] and hub.signature == "2"


def test_a_file_that_the_index_lists_and_nobody_has(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        if "00002-of" in asked.path:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return None

    hub.trouble = gone
    said = refused(capsys, *FAMILY)
    assert "org/code lacks a file" in said and "00002-of-00003" in said


def test_a_server_that_ignores_ranges_sends_next_to_nothing(
    hub: Hub, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folders["base"] / "model.safetensors").read_bytes()

    def ignore(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        return (200, {"ETag": '"x"'}, whole) if asked.range else None

    hub.trouble = ignore
    said = refused(capsys, *FAMILY)
    assert "ignores Range" in said and "Download the model" in said
    assert len([at for at in hub.asked if at.range]) == 1


def after_headers(hub: Hub, answer: Any) -> Any:
    """Trouble for requests of blocks."""

    def trouble(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        block = asked.range and asked.range != "bytes=0-65535"
        return answer(asked) if block else None

    return trouble


def test_a_file_that_changes_meanwhile(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(asked: Asked) -> tuple[int, dict[str, str], bytes]:
        _, headers, body = hub._part(asked, Path(asked.path.split("?")[0][4:]))
        return 206, {**headers, "ETag": '"another"'}, body

    hub.trouble = after_headers(hub, other)
    said = refused(capsys, *FAMILY)
    assert "has changed between two requests" in said and "org/" in said


def test_a_file_that_is_shorter_than_it_was(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.trouble = after_headers(hub, lambda asked: (416, {}, b""))
    said = refused(capsys, *FAMILY)
    assert "ends before byte" in said and "upload is incomplete" in said


def test_a_busy_server_is_given_the_time_that_it_asks_for(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ranges.time, "sleep", waits.append)
    busy = [(429, {"Retry-After": "7"}, b""), (503, {}, b"")]
    hub.trouble = after_headers(hub, lambda asked: busy.pop() if busy else None)
    report(capsys, *FAMILY, "--sample", "20%")
    assert sorted(waits) in ([0.01, 7.0], [0.02, 7.0])


@pytest.mark.parametrize("wait", ["1", "3600"])
def test_a_server_that_stays_busy(
    wait: str,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ranges.time, "sleep", waits.append)
    hub.trouble = after_headers(hub, lambda asked: (429, {"Retry-After": wait}, b""))
    said = refused(capsys, *FAMILY)
    assert "status 429" in said and "Try again later" in said
    assert (3600.0 in waits) is False and bool(waits) is (wait == "1")


def test_a_truncated_answer_is_asked_for_again(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [100, 0, 1]

    def cut(asked: Asked) -> int | None:
        return left.pop() if left and asked.path.startswith("/cdn") else None

    hub.cut = cut
    assert report(capsys, *FAMILY, "--sample", "20%")["families"][0]["sample"]
    hub.cut = lambda asked: 3 if asked.path.startswith("/cdn") else None
    said = refused(capsys, *FAMILY)
    assert "cannot be read" in said and "Try again later" in said


def test_an_upload_that_is_not_complete(
    hub: Hub,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    whole = (folders["math"] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "config.json").write_bytes((folders["math"] / "config.json").read_bytes())
    hub.add("org/half", folder)
    said = refused(capsys, "--base", "org/base", "org/half")
    assert "header promises" in said and "incomplete" in said
    (folder / "model.safetensors").write_bytes(b"<html>" * 1000)
    assert "not a safetensors file" in refused(capsys, "--base", "org/base", "org/half")


def test_a_long_header_takes_a_second_request(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {f"model.layers.{n}.{'x' * 300}": torch.ones(3) for n in range(400)}
    for name in ("long", "longer"):
        hub.add(f"org/{name}", write_model(tmp_path / name, base))
        base = {name: tensor + 1 for name, tensor in base.items()}
    found = report(capsys, "--base", "org/long", "org/longer", "--sample", "0")
    assert [header["parameters"] for header in found["headers"]] == [1200, 1200]
    assert len(of_weights(hub)) == 4


def test_no_network(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        assert "cannot be reached" in refused(capsys, *FAMILY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, *FAMILY)


def test_a_folder_without_its_dot_is_one_line_and_one_request(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without `--remote`; huggingface_hub itself would ask for half a minute.

    An adapter, too.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "maths").mkdir(parents=True)
    base = "models/Math"

    def said() -> str:
        lines = []
        for arguments in (("--base", base, "./code"), (base, "models/other")):
            capsys.readouterr()
            assert run_command("inspect", *arguments) == 2
            lines += capsys.readouterr().err.splitlines()
        line, of_adapter = lines
        assert line == of_adapter
        return line

    line = said()
    assert (
        f"models/Math is not a folder in {tmp_path} (did you mean ./models/maths?)"
        in (line)
    )
    assert "As a repository: " in line
    assert len(hub.asked) == 2  # one for each command
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        assert "cannot be reached" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said()


def write_odd(
    folder: Path, states: State, config: dict[str, Any] | None = None
) -> Path:
    """Change the configuration of a written model."""
    made = write_model(folder, states, llama_config(**SIZES))
    file = made / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    return made


def test_what_does_not_fit_is_named_with_the_reason(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = {f"other.{name}": t for name, t in llama_state(1, **SIZES).items()}
    hub.add("org/stranger", write_odd(tmp_path / "stranger", stranger))
    for extra in ((), ("--sample", "0")):
        assert inspect(*FAMILY, "org/stranger", *extra) == 2
        shown = capsys.readouterr()
        assert "org/stranger is not a fine-tune of org/base" in shown.out
        assert "org/stranger cannot be measured" in shown.err
        assert "||tau||" not in shown.out
    assert not [at for at in of_weights(hub) if at.range != "bytes=0-65535"]


def test_quantised_weights_and_configurations_are_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = llama_state(**SIZES)
    name = "model.layers.0.mlp.up_proj.weight"
    packed[name] = packed[name].to(torch.float8_e4m3fn)
    hub.add("org/fp8", write_odd(tmp_path / "fp8", packed))
    gptq = {"quantization_config": {"quant_method": "gptq"}}
    hub.add("org/gptq", write_odd(tmp_path / "gptq", llama_state(**SIZES), gptq))
    for repository, word in (("org/fp8", "F8_E4M3"), ("org/gptq", "'gptq'")):
        said = refused(capsys, "--base", "org/base", repository, "--sample", "0")
        assert word in said


def test_headers_alone_are_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = ("--plot", tmp_path / "f.png")
    said = refused(capsys, "--base", "org/base", "org/math", "--sample", "0", *figure)
    assert said == "--plot draws norms; expected a --sample above 0"


def test_a_tied_head_and_a_larger_vocabulary_are_shown(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    sizes = {**SIZES, "tie_word_embeddings": True}
    base = llama_state(**sizes)
    larger = tuned(base, 1)
    rows = larger["model.embed_tokens.weight"]
    larger["model.embed_tokens.weight"] = torch.cat([rows, rows[:64]])
    grown = llama_config(**{**sizes, "vocab_size": 2112})
    hub.add("org/tied", write_model(tmp_path / "tied", base, llama_config(**sizes)))
    hub.add("org/larger", write_model(tmp_path / "larger", larger, grown))
    found = report(capsys, "--base", "org/tied", "org/larger", "--sample", "30%")
    assert [header["tied"] for header in found["headers"]] == [True, True]
    assert [header["vocabulary"] for header in found["headers"]] == [2048, 2112]
    assert found["families"][0]["models"][0]["norm"] > 0
    assert inspect("--base", "org/tied", "org/larger", "--sample", "0") == 0
    assert "the embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "stores pickles (pytorch_model.bin)"),
        ("pytorch_model.bin.index.json", "stores pickles"),
        ("adapter_config.json", "adapter_config.json is corrupt"),
        ("README.md", "holds no weights"),
    ],
)
def test_what_cannot_be_read_remotely_is_named(
    file: str,
    words: str,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / file).write_bytes(b"x")
    hub.add("org/odd", tmp_path / "odd")
    assert words in refused(capsys, "--base", "org/base", "org/odd")


def test_adapters_and_names_that_are_none_are_refused(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "LoRA adapter" in refused(capsys, "--base", "org/base", "org/math+org/code")
    assert "./x does not exist" in refused(capsys, "--base", "org/base", "./x")
    said = refused(capsys, "--base", "org/base", "org/a/b")
    assert "not the name of a repository" in said


def test_nan_in_a_block_is_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        state = llama_state(**SIZES)
        state[name][:] = math.nan
        repository = f"org/nan-{len(name)}"
        folder = write_model(tmp_path / repository, state, llama_config(**SIZES))
        hub.add(repository, folder)
        said = refused(capsys, "--base", "org/base", repository, "--sample", "20%")
        assert f"{name} of {repository} holds NaN" in said


def test_an_index_that_names_other_files_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(
        tmp_path / "odd", llama_state(**SIZES), llama_config(**SIZES), shards=2
    )
    index = folder / "model.safetensors.index.json"
    for content, words in (
        ({"weight_map": {"a": "../../secret"}}, "'../../secret'"),
        ([], "is corrupt"),
        ({"weight_map": {}}, "is corrupt: it names no tensors"),
    ):
        index.write_text(json.dumps(content))
        hub.add("org/odd", folder)
        assert words in refused(capsys, "--base", "org/base", "org/odd")


def test_a_header_that_promises_gigabytes_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "huge"
    folder.mkdir()
    content = struct.pack("<Q", 1 << 40) + os.urandom(100)
    (folder / "model.safetensors").write_bytes(content)
    hub.add("org/huge", folder)
    assert "not a safetensors file" in refused(capsys, "--base", "org/base", "org/huge")


def test_a_yaml_may_name_repositories(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(
        "merge_method: task_arithmetic\nbase_model: org/base\nmodels:\n"
        "  - model: org/math\n    parameters: {weight: 0.3}\n"
        "  - model: org/code\n    parameters: {weight: 0.7}\n"
    )
    found = report(capsys, file, "--sample", "20%")
    assert len(found["headers"]) == 3 and found["refused"] is None
    hands = [model["weight_by_hand"] for model in found["families"][0]["models"]]
    assert hands == ["0.3", "0.7"]
