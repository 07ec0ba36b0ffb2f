"""`inspect --remote`: few requests and bytes, bits of a local sample, clear errors."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from mergekit_metagpt.checkpoints import ranges
from mergekit_metagpt.scanning import cache, sampling
from mergekit_metagpt.scanning.sampling import BLOCK
from tests.conftest import Cli
from tests.families import (
    State,
    cast,
    forget,
    llama_config,
    llama_state,
    run_command,
    tuned,
    write_model,
)
from tests.hub import Asked, Hub, point_to

pytestmark = pytest.mark.usefixtures("one_torch_thread", "hub")
SIZES = {
    "hidden_size": 128,
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NAMES = ("base", "math", "code", "chat")
FAMILY = ("--base", "org/base", "org/math", "org/code", "org/chat")
REMOTE = ("inspect", "--remote")
AGAINST_BASE = (*REMOTE, "--base", "org/base")
HEADER = "bytes=0-65535"

Answer = tuple[int, dict[str, str], bytes]
Report = Callable[..., Any]
Publish = Callable[..., str]


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
    folders: dict[str, Path],
    empty_hub: Hub,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Hub:
    """The family on a hub, and no long waits."""
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.01)
    for name, folder in folders.items():
        empty_hub.add(f"org/{name}", folder)
    return empty_hub


@pytest.fixture
def publish(hub: Hub, tmp_path: Path) -> Publish:
    """Put a model on the hub; return its name there."""

    def add(name: str, state: State, config: Any = None) -> str:
        config = config or llama_config(**SIZES)
        hub.add(f"org/{name}", write_model(tmp_path / name, state, config))
        return f"org/{name}"

    return add


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """The report of `inspect --remote`."""

    def run(*arguments: str | Path, command: tuple[str, ...] = REMOTE) -> Any:
        capsys.readouterr()
        assert run_command(*command, *arguments, "--json", "-") == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def local(report: Report, folders: dict[str, Path]) -> Report:
    """What a local `inspect` reports of the family."""

    def run(*options: str) -> Any:
        models = [folders[name] for name in NAMES]
        found = report("--base", *models, *options, command=("inspect",))
        return found["families"][0]

    return run


def of_weights(hub: Hub) -> list[Asked]:
    return [asked for asked in hub.asked if asked.path.startswith("/cdn")]


def of_blocks(hub: Hub) -> list[Asked]:
    return [asked for asked in of_weights(hub) if asked.range != HEADER]


# ---- headers


def test_headers_alone_cost_few_requests_and_bytes(hub: Hub, report: Report) -> None:
    assert report(*FAMILY, "--sample", "0")["families"] == []
    assert hub.bytes_sent <= 1_000_000
    # Each repository: what is in it, its config.json, and each header by a redirect;
    # of the sharded one its index, too. (huggingface_hub asks for its own purposes.)
    asked = [at.path for at in hub.asked if not at.path.startswith("/api/agent")]
    assert len(asked) == 3 * (1 + 1 + 2) + (1 + 1 + 1 + 3 * 2)
    assert len(set(asked)) == len(asked)
    assert not of_blocks(hub)


def test_headers_tell_what_a_local_inspect_tells(report: Report, local: Report) -> None:
    found = report(*FAMILY, "--sample", "0")["headers"]
    family = local()
    for header, own in zip(found, [family["base"], *family["models"]], strict=True):
        assert header["parameters"] == own["parameters"]
        assert header["precisions"] == own["precisions"]
        files = own["source"]["files"]
        assert header["download"] == sum(file["bytes"] for file in files)
        assert header["vocabulary"] == SIZES["vocab_size"]
        assert header["tied"] is False
        assert header["quantised"] is header["misfit"] is None
        assert header["not_written"] == {**own["not_written"], "share": None}
        if "not_in_base" in own:
            assert header["not_in_base"] == own["not_in_base"]
            assert header["only_in_base"] == own["only_in_base"]
    assert [header["base"] for header in found] == [None] + ["org/base"] * 3
    assert len({header["commit"] for header in found}) == 4


def test_headers_tell_what_a_merge_would_leave_out(
    publish: Publish, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.mtp.weight"
    extra = publish("extra", {**llama_state(**SIZES), name: torch.ones(4, 4)})
    models = ("--base", "org/base", extra, "--sample", "0")
    base, model = report(*models)["headers"]
    assert base["not_written"]["count"] == 0
    assert model["not_written"]["examples"] == [name]
    assert run_command(*REMOTE, *models) == 0
    assert f": 1 tensor ({name}; 0.0 MB)" in capsys.readouterr().out


def test_a_tied_head_and_a_larger_vocabulary_are_shown(
    publish: Publish,
    report: Report,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    sizes = {**SIZES, "tie_word_embeddings": True}
    base = llama_state(**sizes)
    larger = tuned(base, 1)
    rows = larger["model.embed_tokens.weight"]
    larger["model.embed_tokens.weight"] = torch.cat([rows, rows[:64]])
    models = (
        "--base",
        publish("tied", base, llama_config(**sizes)),
        publish("larger", larger, llama_config(**{**sizes, "vocab_size": 2112})),
    )
    found = report(*models, "--sample", "30%")
    assert [header["tied"] for header in found["headers"]] == [True, True]
    assert [header["vocabulary"] for header in found["headers"]] == [2048, 2112]
    assert found["families"][0]["models"][0]["norm"] > 0
    assert run_command(*REMOTE, *models, "--sample", "0") == 0
    assert "the embeddings" in capsys.readouterr().out


def test_a_long_header_takes_a_second_request(
    hub: Hub, publish: Publish, report: Report
) -> None:
    base = {f"model.layers.{n}.{'x' * 300}": torch.ones(3) for n in range(400)}
    other = {name: tensor + 1 for name, tensor in base.items()}
    models = (publish("long", base), publish("longer", other))
    found = report("--base", *models, "--sample", "0")
    assert [header["parameters"] for header in found["headers"]] == [1200, 1200]
    assert len(of_weights(hub)) == 4


def test_headers_alone_are_no_figure(cli: Cli, tmp_path: Path) -> None:
    figure = ("--plot", tmp_path / "f.png")
    said = cli.error(*AGAINST_BASE, "org/math", "--sample", "0", *figure)
    assert "--plot" in said and "--sample above 0" in said


# ---- samples


@pytest.mark.parametrize("redirect", [True, False])
def test_a_remote_sample_has_the_bits_of_a_local_one(
    redirect: bool,
    hub: Hub,
    report: Report,
    local: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.redirect = redirect
    (remote,) = report(*FAMILY, "--sample", "20%")["families"]
    monkeypatch.setenv(cache.VARIABLE, "0")
    expected = local("--sample", "20%")
    for key in ("sample", "cosines", "cosines_se", "pools", "layers"):
        assert remote[key] == expected[key], key
    for ours, theirs in zip(remote["models"], expected["models"], strict=True):
        for key in ("sq_norm", "sq_norm_se", "coefficient", "coefficient_se"):
            assert ours[key] == theirs[key] and ours[key] > 0


def test_local_folders_may_stand_among_repositories(
    folders: dict[str, Path], report: Report
) -> None:
    mixed = ("--base", "org/base", folders["math"], "org/code", folders["chat"])
    found = report(*mixed, "--sample", "20%")
    commits = [header["commit"] for header in found["headers"]]
    assert [commit is None for commit in commits] == [False, True, False, True]
    assert [h["download"] > 0 for h in found["headers"]] == [True, False, True, False]
    forget()
    (all_remote,) = report(*FAMILY, "--sample", "20%")["families"]
    assert found["families"][0]["pools"] == all_remote["pools"]


def test_a_budget_bounds_what_is_sent(hub: Hub, report: Report) -> None:
    budget = 4_000_000
    (family,) = report(*FAMILY, "--budget", "4MB")["families"]
    assert 0.9 * budget < family["sample"]["bytes_read"] <= budget
    assert family["sample"]["bytes_read"] < hub.bytes_sent <= 1.2 * budget
    # Once where the weights lie is known, blocks are read there: no more redirects.
    resolved = [a for a in hub.asked if a.path.endswith(".safetensors")]
    assert len(resolved) == 3 + 3


def test_the_number_of_requests_is_bounded(
    hub: Hub, publish: Publish, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_READS", 40)
    sizes = {**SIZES, "vocab_size": 8192, "num_hidden_layers": 1}
    base = llama_state(**sizes)
    models = [
        publish(
            name,
            cast(tuned(base, seed, size=1e-3 * (seed + 1)), torch.bfloat16),
            llama_config(**sizes),
        )
        for seed, name in enumerate(("long", "longer"))
    ]
    (family,) = report("--base", *models, "--budget", "1.5MB")["families"]
    assert 1.2e6 < family["sample"]["bytes_read"] <= 1.5e6
    assert hub.bytes_sent <= 1.2 * 1.5e6
    lengths = [last + 1 - first for first, last in hub.ranges()]
    assert max(lengths) >= 2 * 4 * BLOCK
    # Beside the blocks, each model's header, its matrices that are read whole, and
    # heads that are compared with embeddings.
    whole = sum(t.numel() < sampling.WHOLE for t in base.values())
    assert len(lengths) <= 40 + 2 * (1 + whole) + 2 * sampling.COMPARED


def test_neighbouring_blocks_are_read_at_once(hub: Hub, report: Report) -> None:
    (family,) = report(*FAMILY, "--sample", "50%")["families"]
    sizes = [last - first + 1 for first, last in hub.ranges()]
    assert any(size > 2 * BLOCK and size % (2 * BLOCK) == 0 for size in sizes)
    assert len(sizes) < 0.85 * family["sample"]["bytes_read"] / (2 * BLOCK)


def test_the_default_budget_reads_small_models_whole(
    report: Report, local: Report
) -> None:
    (family,) = report(*FAMILY)["families"]
    assert family["sample"] is None
    forget()
    cache.clear()
    assert family["pools"] == local()["pools"]


def test_nothing_is_kept_but_estimates(
    hub: Hub,
    own_cache: Path,
    tmp_path: Path,
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    report(*FAMILY, "--sample", "20%")
    assert not list(scratch.iterdir())
    assert not (tmp_path / "hub").exists()
    (entry,) = own_cache.iterdir()
    sent = len(of_weights(hub))
    report(*FAMILY, "--sample", "20%")
    assert len(of_weights(hub)) - sent == 6  # the headers, and no block
    assert list(own_cache.iterdir()) == [entry]


def test_another_commit_is_measured_anew(
    hub: Hub, tmp_path: Path, report: Report, cli: Cli
) -> None:
    other = cast(tuned(llama_state(**SIZES), 9, size=5e-2), torch.bfloat16)
    folder = write_model(tmp_path / "other", other, llama_config(**SIZES))
    commit = hub.add("org/math", folder, "v2")
    norms = []
    for model in ("org/math", "org/math@v2", f"org/math@{commit[:40]}"):
        found = report("--base", "org/base", model, "--sample", "20%")
        (measured,) = found["families"][0]["models"]
        norms.append(measured["norm"])
        assert measured["source"]["revision"]
    assert norms[1] > 3 * norms[0] and norms[1] == norms[2]
    said = cli.error(*AGAINST_BASE, "org/math@v3")
    assert "org/math@v3" in said and "no such revision" in said


def test_nan_in_a_block_is_named(publish: Publish, cli: Cli) -> None:
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        state = llama_state(**SIZES)
        state[name][:] = math.nan
        repository = publish(f"nan-{len(name)}", state)
        said = cli.error(*AGAINST_BASE, repository, "--sample", "20%")
        assert f"{name} of {repository} holds NaN" in said


def test_a_yaml_may_name_repositories(tmp_path: Path, report: Report) -> None:
    models = [
        {"model": "org/math", "parameters": {"weight": 0.3}},
        {"model": "org/code", "parameters": {"weight": 0.7}},
    ]
    config = {"merge_method": "task_arithmetic", "base_model": "org/base"}
    file = tmp_path / "merge.yml"
    file.write_text(json.dumps({**config, "models": models}))
    found = report(file, "--sample", "20%")
    assert len(found["headers"]) == 3 and found["refused"] is None
    hands = [model["weight_by_hand"] for model in found["families"][0]["models"]]
    assert hands == ["0.3", "0.7"]


# ---- what the hub does not give


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository(
    token: str | None, hub: Hub, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/code")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = cli.error(*REMOTE, *FAMILY)
    assert "org/code is gated" in said and "hf auth login" in said


def test_the_users_token_opens_gates_and_stays_on_the_hub(
    hub: Hub, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.update({"org/base", "org/code"})
    monkeypatch.setenv("HF_TOKEN", hub.token)
    report(*FAMILY, "--sample", "20%")
    blocks = of_blocks(hub)
    assert blocks and not [asked for asked in blocks if asked.token]


@contextmanager
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        yield


def test_no_network(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_network(monkeypatch):
        assert "cannot be reached" in cli.error(*REMOTE, *FAMILY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in cli.error(*REMOTE, *FAMILY)


def test_a_folder_without_its_dot_is_one_line_and_one_request(
    hub: Hub, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `--remote`; huggingface_hub itself would ask for half a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "maths").mkdir(parents=True)
    base = "models/Math"

    def said() -> str:
        of_base = cli.error("inspect", "--base", base, "./code")
        of_adapter = cli.error("inspect", base, "models/other")
        assert of_base == of_adapter
        return of_base

    assert f"{base} is not a folder in {tmp_path} (did you mean ./models/maths?)" in (
        said()
    )
    assert len(hub.asked) == 2  # one for each command
    with no_network(monkeypatch):
        assert "cannot be reached" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/nothing", "org/nothing is not on "),
        ("org/math+org/code", "LoRA adapter"),
        ("./x", "./x does not exist"),
        ("org/a/b", "not the name of a repository"),
    ],
)
def test_names_of_no_repository_are_refused(model: str, words: str, cli: Cli) -> None:
    assert words in cli.error(*AGAINST_BASE, model)


# ---- what goes wrong on the way


def after_headers(answer: Callable[[Asked], Answer | None]) -> Any:
    """Trouble for requests of blocks."""

    def trouble(asked: Asked) -> Answer | None:
        return answer(asked) if asked.range and asked.range != HEADER else None

    return trouble


def test_an_address_that_expires_is_asked_for_again(hub: Hub, report: Report) -> None:
    def expire(asked: Asked) -> None:
        if len(of_weights(hub)) >= 30:  # of requests that run side by side
            hub.signature = "2"

    hub.trouble = expire
    (family,) = report(*FAMILY, "--sample", "20%")["families"]
    assert family["sample"] and hub.signature == "2"


def test_a_file_that_the_index_lists_and_nobody_has(hub: Hub, cli: Cli) -> None:
    def gone(asked: Asked) -> Answer | None:
        if "00002-of" in asked.path:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return None

    hub.trouble = gone
    said = cli.error(*REMOTE, *FAMILY)
    assert "org/code lacks a file" in said and "00002-of-00003" in said


def test_a_server_that_ignores_ranges_sends_next_to_nothing(
    hub: Hub, folders: dict[str, Path], cli: Cli
) -> None:
    whole = (folders["base"] / "model.safetensors").read_bytes()
    hub.trouble = lambda asked: (200, {"ETag": '"x"'}, whole) if asked.range else None
    said = cli.error(*REMOTE, *FAMILY)
    assert "ignores Range" in said and "Download the model" in said
    assert len([at for at in hub.asked if at.range]) == 1


def test_a_file_that_changes_meanwhile(hub: Hub, cli: Cli) -> None:
    def other(asked: Asked) -> Answer:
        _, headers, body = hub._part(asked, Path(asked.path.split("?")[0][4:]))
        return 206, {**headers, "ETag": '"another"'}, body

    hub.trouble = after_headers(other)
    said = cli.error(*REMOTE, *FAMILY)
    assert "has changed between two requests" in said and "org/" in said


def test_a_file_that_is_shorter_than_it_was(hub: Hub, cli: Cli) -> None:
    hub.trouble = after_headers(lambda asked: (416, {}, b""))
    said = cli.error(*REMOTE, *FAMILY)
    assert "ends before byte" in said and "upload is incomplete" in said


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a busy server was given, none of which pass."""
    seconds: list[float] = []
    monkeypatch.setattr(ranges.time, "sleep", seconds.append)
    return seconds


def test_a_busy_server_is_given_the_time_that_it_asks_for(
    hub: Hub, report: Report, waits: list[float]
) -> None:
    busy = [(429, {"Retry-After": "7"}, b""), (503, {}, b"")]
    hub.trouble = after_headers(lambda asked: busy.pop() if busy else None)
    report(*FAMILY, "--sample", "20%")
    assert sorted(waits) in ([0.01, 7.0], [0.02, 7.0])


@pytest.mark.parametrize("wait", ["1", "3600"])
def test_a_server_that_stays_busy(
    wait: str, hub: Hub, cli: Cli, waits: list[float]
) -> None:
    hub.trouble = after_headers(lambda asked: (429, {"Retry-After": wait}, b""))
    said = cli.error(*REMOTE, *FAMILY)
    assert "status 429" in said and "Try again later" in said
    assert 3600.0 not in waits and bool(waits) is (wait == "1")


def test_a_truncated_answer_is_asked_for_again(
    hub: Hub, report: Report, cli: Cli
) -> None:
    left = [100, 0, 1]
    of_file = "/cdn"
    hub.cut = lambda at: left.pop() if left and at.path.startswith(of_file) else None
    assert report(*FAMILY, "--sample", "20%")["families"][0]["sample"]
    hub.cut = lambda at: 3 if at.path.startswith(of_file) else None
    said = cli.error(*REMOTE, *FAMILY)
    assert "cannot be read" in said and "Try again later" in said


# ---- repositories that cannot be measured


def test_an_upload_that_is_not_complete(
    hub: Hub, folders: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    whole = (folders["math"] / "model.safetensors").read_bytes()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    hub.add("org/half", tmp_path / "half")
    said = cli.error(*AGAINST_BASE, "org/half")
    assert "header promises" in said and "incomplete" in said


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("pytorch_model.bin", b"x", "stores pickles (pytorch_model.bin)"),
        ("pytorch_model.bin.index.json", b"x", "stores pickles"),
        ("adapter_config.json", b"x", "adapter_config.json is corrupt"),
        ("README.md", b"x", "holds no weights"),
        (WEIGHTS, b"<html>" * 1000, "not a safetensors file"),
        (WEIGHTS, struct.pack("<Q", 1 << 40) + bytes(100), "not a safetensors file"),
        (INDEX, b'{"weight_map": {"a": "../../secret"}}', "'../../secret'"),
        (INDEX, b"[]", "is corrupt"),
        (INDEX, b'{"weight_map": {}}', "is corrupt: it names no tensors"),
    ],
    ids=[
        *("a pickle", "pickles in shards", "a corrupt adapter", "no weights"),
        *("an HTML page", "a header of a terabyte"),
        *("an index of files elsewhere", "a corrupt index", "an empty index"),
    ],
)
def test_what_cannot_be_read_remotely_is_named(
    file: str, content: bytes, words: str, hub: Hub, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / file).write_bytes(content)
    hub.add("org/odd", tmp_path / "odd")
    assert words in cli.error(*AGAINST_BASE, "org/odd")


def test_what_does_not_fit_is_named_with_the_reason(
    hub: Hub, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"other.{name}": t for name, t in llama_state(1, **SIZES).items()}
    stranger = publish("stranger", state)
    for extra in ((), ("--sample", "0")):
        assert run_command(*REMOTE, *FAMILY, stranger, *extra) == 2
        shown = capsys.readouterr()
        assert f"{stranger} is not a fine-tune of org/base" in shown.out
        assert f"{stranger} cannot be measured" in shown.err
        assert "||tau||" not in shown.out
    assert not of_blocks(hub)


def test_quantised_weights_and_configurations_are_named(
    publish: Publish, cli: Cli
) -> None:
    state = llama_state(**SIZES)
    name = "model.layers.0.mlp.up_proj.weight"
    fp8 = {**state, name: state[name].to(torch.float8_e4m3fn)}
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for repository, word in (
        (publish("fp8", fp8), "F8_E4M3"),
        (publish("gptq", state, llama_config(**SIZES, **gptq)), "'gptq'"),
    ):
        assert word in cli.error(*AGAINST_BASE, repository, "--sample", "0")
