"""Faults of people's own files that would go unseen: said, refused, or put right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import PEFT_WARNS, write_adapters
from tests.broken import snapshot
from tests.conftest import Cli
from tests.families import (
    State,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.layouts import ORIGINAL, save_trio
from tests.merges import write_merge
from tests.oracle import assert_same_bits
from tests.stand_ins import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")

QUIET = ("--no-copy-tokenizer", "--quiet")
MERGE = ("merge", "c.yml", "out", *QUIET)
MODELS = ("./a", "./b")
CONFIG = merge_config("./base", MODELS)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `base`, `a` and `b`, and `c.yml` that merges them."""
    base = llama_state()
    for name, state in (("base", base), ("a", tuned(base, 1)), ("b", tuned(base, 2))):
        write_model(tmp_path / name, state)
    monkeypatch.chdir(tmp_path)
    write_merge(tmp_path / "c.yml", "./base", MODELS)
    return tmp_path


def report_of(*arguments: str) -> Any:
    assert run_command("inspect", *arguments, "--json", "report.json", "--force") == 0
    return json.loads(Path("report.json").read_text())


def warnings_of(*arguments: str) -> list[str]:
    found: list[str] = report_of(*arguments)["families"][0]["warnings"]
    return found


# ---- one model under two names


@pytest.mark.parametrize("spelling", ["./a/", "{work}/a", "./link", "./hard"])
@pytest.mark.parametrize("of", ["a", "base"])
def test_one_model_under_two_names(
    spelling: str, of: str, work: Path, cli: Cli
) -> None:
    (work / "link").symlink_to(work / of)
    shutil.copytree(work / of, work / "hard", copy_function=os.link)
    other = spelling.format(work=work).replace("/a", f"/{of}")
    write_merge(work / "c.yml", "./base", [*MODELS, other])
    for command in (["inspect", "c.yml"], ["export", "c.yml", "-"]):
        assert other in cli.error(*command)
    assert ("the base" if of == "base" else "the same files") in cli.error(*MERGE)
    with pytest.raises(ValueError, match=r"another name|the same files"):
        run_mergekit(merge_config("./base", [*MODELS, other]), work / "theirs")


def test_copies_are_called_identical(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(work / "a", work / "copy")
    models = [*MODELS, "./copy"]
    write_merge(work / "c.yml", "./base", models)
    warnings = warnings_of("c.yml")
    assert any("./a and ./copy are identical" in text for text in warnings)
    run_mergekit(merge_config("./base", models), work / "out")
    assert len(said(caplog, "./a and ./copy are identical")) == 1
    assert not said(caplog, "./b and")


# ---- a wrong base


def test_a_base_that_was_trained_apart(
    work: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(work / "stranger", llama_state(seed=7))
    write_merge(work / "c.yml", "./stranger", MODELS)
    for command in (MERGE, ("export", "c.yml", "e.yml")):
        message = cli.error(*command)
        assert "./stranger" in message and "--allow-crimes" in message
        assert not Path(command[2]).exists()
        assert run_command(*command, "--allow-crimes") == 0
    caplog.clear()
    run_mergekit(merge_config("./stranger", MODELS), work / "theirs")
    for model in MODELS:
        assert len(said(caplog, f"of {model} are typically 1.")) == 1


# ---- what counts without being written


def test_layers_that_are_not_written_and_count(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = llama_state() | {"model.layers.3.proj.weight": torch.ones(64, 64)}
    for name, size in (("base", 0.0), ("a", 0.01), ("b", 0.01)):
        state = tuned(base, len(name), size)
        if name == "a":
            state["model.layers.3.proj.weight"] += 0.1
        write_model(work / name, state)
    warnings = warnings_of("c.yml")
    (text,) = (text for text in warnings if "does not write" in text and "./a" in text)
    exclude = text.rpartition("exclude: ")[2]
    assert exclude == "model.layers.3."
    run_mergekit(CONFIG, work / "out")
    assert said(caplog, "./a, and count") == [text]
    without = warnings_of("c.yml", "--exclude", exclude)
    assert not any("does not write" in text for text in without)


# ---- embeddings, whatever they are called


def test_embeddings_are_known_by_the_architecture(work: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        architectures=["GPTNeoXForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = {
            name: tensor.detach().clone()
            for name, tensor in GPTNeoXForCausalLM(config).state_dict().items()
        }
    moved = tuned(base, 1, 1e-4)
    moved["gpt_neox.embed_in.weight"] = base["gpt_neox.embed_in.weight"].flip(0)
    states: dict[str, State] = {"base": base, "a": moved, "b": tuned(base, 2, 1e-4)}
    for name, state in states.items():
        write_model(work / name, state, config)
    warnings = warnings_of("c.yml")
    (text,) = (text for text in warnings if "embeddings hold" in text)
    assert text.endswith("exclude: embed_in")


# ---- infinities and NaN


def test_infinities_that_base_and_models_share(work: Path) -> None:
    """GPT-NeoX's masks of -1e9 are infinite in float16; nothing is learned there."""
    base = llama_state()
    mask = {"model.layers.0.self_attn.masked_bias": torch.tensor(-torch.inf)}
    expected = report_of("c.yml")["families"][0]["models"]
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        state = tuned(base, seed) if seed else base
        write_model(work / name, {**state, **mask})
    for options in ((), ("--exclude", "masked_bias")):
        found = report_of("c.yml", *options)["families"][0]["models"]
        assert [m["sq_norm"] for m in found] == [m["sq_norm"] for m in expected]


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_infinities_are_kept_where_mergekit_writes_them(
    granularity: str, work: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    states = {"base": llama_state()}
    states |= {"a": tuned(states["base"], 1), "b": tuned(states["base"], 2)}
    for model, state in states.items():
        state[name] = torch.full_like(state[name], -torch.inf)
        write_model(work / model, state)
    settings = {"granularity": granularity}
    write_merge(work / "c.yml", "./base", MODELS, parameters=settings)
    assert run_command(*MERGE) == 0
    assert_same_bits(read_model(work / "out")[name], states["base"][name])


@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
def test_an_overflow_is_refused(method: str, work: Path, cli: Cli) -> None:
    """`rescale` divides by what is left: float16 ends at 65504."""
    base = {n: t.to(torch.float16) for n, t in llama_state().items()}
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        state = tuned(base, seed, 0.01)
        if seed:
            state["lm_head.weight"] += 30000.0
        write_model(work / name, state)
    options = {"merge_method": method, "parameters": {"lambda": 3.0}}
    write_merge(work / "c.yml", "./base", MODELS, **options)
    message = cli.error(*MERGE, "--allow-crimes")
    assert "lm_head.weight" in message and "dtype: float32" in message
    assert not Path("out").exists()


# ---- tokenizers


OF_A = {"kind": "model_token", "model": "./a"}


@pytest.mark.parametrize(
    ("token", "source", "said"),
    [
        ("3", "./c", "./c"),
        ("3", {**OF_A, "token": "?"}, "?"),
        ("3", {**OF_A, "token_id": 999}, "999"),
        ("3", {**OF_A, "token_id": 5}, ""),
        ("new", {**OF_A, "token_id": 5}, "KeyError"),
    ],
)
def test_tokens_that_are_not_there(
    token: str, source: Any, said: str, work: Path, cli: Cli
) -> None:
    """A token that no model has is a defect of mergekit: it has no id in any."""
    for name in ("base", "a", "b"):
        write_tokenizer(work / name, ["<unk>", *map(str, range(95))], [])
    tokens = {token: {"source": source, "force": True}}
    tokenizer = {"source": "base", "tokens": tokens}
    write_merge(work / "c.yml", "./base", MODELS, tokenizer=tokenizer)
    if not said:
        assert run_command("merge", "c.yml", "out", "--quiet") == 0
        return
    before = snapshot(work)
    message = cli.error("merge", "c.yml", "out", "--quiet")
    assert "cannot make the tokenizer" in message and said in message
    assert snapshot(work) == before


# ---- errors of mergekit that are no RuntimeError


def test_an_error_of_another_type_is_called_mergekits(
    tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    """mergekit's definition of BertModel ends in a TypeError."""
    base, *models = save_trio(tmp_path / "trio", "BERT encoder").folders[ORIGINAL]
    file = write_merge(tmp_path / "c.yml", base, models)
    message = cli.error("merge", file, tmp_path / "out", *QUIET)
    assert message.startswith("Error: mergekit: TypeError: ")
    assert run_command("inspect", str(file)) == 0
    assert "mergekit: TypeError: " in capsys.readouterr().out


# ---- adapters


@PEFT_WARNS
def test_a_retrained_adapter_and_one_that_does_not_fit(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapted = write_adapters(tmp_path)
    first, second = (f"{adapted.base}+{adapter}" for adapter in adapted.adapters)
    cache = ("--lora-merge-cache", "cache")
    write_merge(Path("merge.yml"), adapted.base, [first, second])
    command = ("export", "merge.yml", "-", *cache)
    assert run_command(*command) == 0
    assert run_command(*command) == 0
    weights = adapted.adapters[0] / "adapter_model.safetensors"
    other = adapted.adapters[1] / "adapter_model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    shutil.copy(other, tmp_path / "new")
    os.utime(tmp_path / "new", ns=times)
    (tmp_path / "new").replace(weights)  # as rsync does
    assert run_command("inspect", "merge.yml") == 0  # from the adapter as it is now
    message = cli.error(*command)
    assert first in message and "Remove that folder" in message
    (stale,) = (p for p in Path("cache").iterdir() if str(p) in message)
    shutil.rmtree(stale)
    assert run_command(*command) == 0

    weights.write_bytes(b"damaged")
    shutil.rmtree(stale)
    for _ in range(2):
        assert first in cli.error(*command)
        assert not stale.exists()


@PEFT_WARNS
def test_a_copy_that_mergekit_made_of_an_older_adapter(tmp_path: Path) -> None:
    adapted = write_adapters(tmp_path)
    models = [f"{adapted.base}+{adapter}" for adapter in adapted.adapters]
    config = merge_config(str(adapted.base), models)
    options = ("--lora-merge-cache", str(tmp_path / "cache"))
    run_mergekit(config, tmp_path / "out", *options)
    os.utime(adapted.adapters[1] / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="as it was earlier"):
        run_mergekit(config, tmp_path / "again", *options)


# ---- a model that was quantised once


def test_a_dequantised_model_is_merged_and_its_configuration_warned_of(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = llama_config(quantization_config={"quant_method": "gptq", "bits": 4})
    write_model(work / "base", llama_state(), config)
    assert run_command(*MERGE) == 0
    assert len(said(caplog, "quantization_config")) == 1
    caplog.clear()
    run_mergekit(CONFIG, work / "theirs")
    assert len(said(caplog, "quantization_config")) == 1
    assert not any(t.isnan().any() for t in read_model(work / "theirs").values())


# ---- the day after


def test_a_merged_folder_tells_its_coefficients(work: Path) -> None:
    run_mergekit(CONFIG, work / "out")
    assert report_of("./out") == report_of("./out/mergekit_config.yml")


def test_a_model_that_changed_after_the_merge_is_named(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*MERGE) == 0
    assert run_command("inspect", "out") == 0
    assert "after this merge" not in capsys.readouterr().out
    write_model(work / "b", tuned(llama_state(), seed=9))
    assert run_command("inspect", "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("./b changed after this merge: out/metagpt.json has")
    # As a model itself, the merged folder is measured, and not what it was made of.
    assert run_command("inspect", "--base", "./base", "./out") == 0
    assert "after this merge" not in capsys.readouterr().out


def test_in_a_merged_folder_the_earlier_measurements_are_named(
    work: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    assert run_command(*MERGE) == 0
    monkeypatch.chdir(work / "out")
    message = cli.error("inspect", "mergekit_config.yml")
    assert "metagpt.json has the earlier measurements" in message


def test_a_merged_folder_in_the_place_of_its_yaml(work: Path, cli: Cli) -> None:
    run_mergekit(CONFIG, work / "out")
    message = cli.error("export", "out", "plain.yml")
    assert "out is a folder" in message
    assert message.endswith("Did you mean out/mergekit_config.yml?")


def test_inspect_tells_of_a_chat_template_that_merge_would_refuse(
    work: Path, cli: Cli
) -> None:
    write_merge(work / "c.yml", "./base", MODELS, chat_template="chatlm")
    reason = report_of("c.yml")["refused"]
    assert "chatml" in reason
    assert reason in cli.error(*MERGE)


# ---- layers that are not there


@pytest.mark.parametrize("layers", [[0, -1], [0, 40], [2, 1]])
def test_layers_that_are_not_there(layers: list[int], work: Path, cli: Cli) -> None:
    everyone = ("./base", *MODELS)
    sources = [{"model": name, "layer_range": layers} for name in everyone]
    write_merge(work / "c.yml", "./base", [], slices=[{"sources": sources}])
    message = cli.error(*MERGE)
    assert f"is {layers}; expected two numbers from 0 to 3" in message
    assert report_of("c.yml")["refused"] in message


# ---- inputs that mergekit loses between the threads of --multi-gpu


@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_tensor_that_a_model_has_is_not_merged_without_it(
    method: str, name: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit.io.tasks import LoadTensor

    execute = LoadTensor.execute

    def lossy(self: Any) -> torch.Tensor | None:
        lost = self.tensor == name and str(self.model) == "./b"
        return None if lost else execute(self)

    monkeypatch.setattr(LoadTensor, "execute", lossy)
    with pytest.raises(RuntimeError, match=rf"lost {name} of \./b"):
        run_mergekit({**CONFIG, "merge_method": method}, work / "out")
