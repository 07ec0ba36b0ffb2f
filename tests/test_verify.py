"""`verify`: a merged model against its plan, its record, its inputs and a replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mergekit_metagpt.method.composed import COMPOSED, RANDOM
from tests.adapters import PEFT_WARNS, write_adapters
from tests.broken import snapshot
from tests.conftest import Cli, Family, make_family
from tests.families import (
    State,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
    tuned,
    write_model,
)
from tests.merges import write_merge
from tests.oracle import same_bits
from tests.stand_ins import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")

QUIET = ("--no-copy-tokenizer", "--quiet")
UP = "model.layers.1.mlp.up_proj.weight"
CHECKS = ["files", "tensors", "inputs", "coefficients", "values"]

Verify = Callable[..., dict[str, Any]]


@pytest.fixture
def verify(cli: Cli) -> Verify:
    """Run `verify`; check its exit status, and return what it writes as JSON."""

    def run(out: Path, *options: str, status: int = 0) -> dict[str, Any]:
        printed = cli("verify", out, "--json", "-", *options, status=status)
        found: dict[str, Any] = json.loads(printed.out)
        verdict = {0: "verified", 1: "different", 3: "not checked"}[status]
        assert found["verdict"] == verdict
        different = {c["name"] for c in found["checks"] if c["verdict"] == "different"}
        if status:
            subject = out if "inputs" not in different else f"the inputs of {out}"
            assert printed.err.splitlines()[-1].startswith(f"Error: {subject} ")
        found["of"] = {check["name"]: check for check in found["checks"]}
        return found

    return run


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {name: check["verdict"] for name, check in found["of"].items()}


def merge(
    folder: Path,
    base: Path,
    models: Sequence[Path | str],
    *options: str,
    **settings: Any,
) -> Path:
    """Merge by our command; return the folder of the result."""
    yml = write_merge(folder / "merge.yml", base, models, **settings)
    assert run_command("merge", yml, folder / "out", *QUIET, *options) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two fine-tunes, `merge.yml` and `out`, its merge."""
    folder = tmp_path_factory.mktemp("made")
    family = make_family(folder, count=2)
    merge(folder, family.base, family.models)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of it, for each test to spoil, with inputs named by their new place."""
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    for file in (folder / "merge.yml", folder / "out" / "mergekit_config.yml"):
        file.write_text(file.read_text().replace(str(made), str(folder)))
    return folder


def rewrite(folder: Path, change: Callable[[State], Any]) -> None:
    """Change the tensors of a model of one file."""
    state = read_model(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# --- models that are what they say ----------------------------------------------------


def test_the_file_that_was_written_is_named(
    copy: Path, tmp_path: Path, cli: Cli
) -> None:
    file = tmp_path / "found.json"
    said = cli("verify", copy / "out", "--json", file).err
    assert said.splitlines()[-1] == f"Wrote {file}"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"out_dtype": "float16"},
        {"dtype": "float32"},
        {"parameters": {"granularity": "tensor", "lambda": 0.7}},
        {"merge_method": "metagpt_ties", "parameters": {"density": 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("ours", [True, False], ids=["merge", "mergekit-yaml"])
def test_merges_by_both_commands_are_verified(
    ours: bool, settings: dict[str, Any], family: Family, tmp_path: Path, verify: Verify
) -> None:
    if ours:
        shards = ("--out-shard-size", "20K")
        merge(tmp_path, family.base, family.models[:2], *shards, **settings)
    else:
        config = merge_config(family.base, family.models, **settings)
        run_mergekit(config, tmp_path / "out")
    recorded = "verified" if ours else "not recorded"
    assert verdicts(verify(tmp_path / "out", "--full")) == {
        **dict.fromkeys(CHECKS, "verified"),
        **dict.fromkeys(("inputs", "coefficients"), recorded),
    }


def test_mixed_precisions_and_tied_embeddings(tmp_path: Path, verify: Verify) -> None:
    sizes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    base = llama_state(**sizes)
    half = {
        name: t.to(torch.bfloat16 if "mlp" in name else torch.float16)
        for name, t in tuned(base, 1).items()
    }
    for name, state in {"base": base, "a": tuned(base, 2), "half": half}.items():
        write_model(tmp_path / name, state, llama_config(**sizes))
    models = [tmp_path / name for name in ("a", "half")]
    verify(merge(tmp_path, tmp_path / "base", models), "--full")


def test_a_vocabulary_that_a_tokenizer_sets(tmp_path: Path, verify: Verify) -> None:
    words = ["<unk>", *(f"w{number}" for number in range(9))]
    whole = llama_state(vocab_size=11)
    for seed, name in enumerate(("base", "a", "b")):
        rows = 11 if name == "a" else 10
        state = tuned(whole, seed)
        for tokens in ("model.embed_tokens.weight", "lm_head.weight"):
            state[tokens] = state[tokens][:rows]
        folder = write_model(tmp_path / name, state, llama_config(vocab_size=rows))
        write_tokenizer(folder, words, ["<x>"] if name == "a" else [])
    yml = write_merge(
        tmp_path / "m.yml",
        tmp_path / "base",
        [tmp_path / "a", tmp_path / "b"],
        tokenizer_source="union",
    )
    assert run_command("merge", yml, tmp_path / "out", "--quiet") == 0
    assert len(read_model(tmp_path / "out")["lm_head.weight"]) == 11
    verify(tmp_path / "out", "--full")


@PEFT_WARNS
def test_adapters_need_their_cache(tmp_path: Path, verify: Verify) -> None:
    adapted = write_adapters(tmp_path)
    models = [f"{adapted.base}+{adapter}" for adapter in adapted.adapters]
    cache = ("--lora-merge-cache", str(tmp_path / "cache"))
    out = merge(tmp_path, adapted.base, models, *cache)
    verify(out, *cache)
    shutil.rmtree(tmp_path / "cache")
    verify(out, *cache)
    found = verify(out, status=3)
    assert "--lora-merge-cache" in found["of"]["inputs"]["details"]
    # All adapters are looked for before the first is merged.
    yml = out / "mergekit_config.yml"
    yml.write_text(yml.read_text().replace(str(adapted.adapters[-1]), "./none"))
    shutil.rmtree(tmp_path / "cache")
    found = verify(out, *cache, status=3)
    assert "./none does not exist" in found["of"]["inputs"]["details"]
    assert not (tmp_path / "cache").exists()


def test_relative_paths_hold_where_the_merge_was_run(
    copy: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    yml = copy / "out" / "mergekit_config.yml"
    yml.write_text(yml.read_text().replace(f"{copy}/", "./"))
    monkeypatch.chdir(copy)
    verify(Path("out"))
    monkeypatch.chdir(copy / "out")
    details = verify(copy / "out", status=3)["of"]["inputs"]["details"]
    assert "./base does not exist" in details and "run verify there" in details
    # Where some of the models are, a missing one has another reason.
    (copy / "out" / "base").mkdir()
    details = verify(copy / "out", status=3)["of"]["inputs"]["details"]
    assert "base holds no weights" in details and "run verify there" not in details


# --- random numbers -------------------------------------------------------------------


@pytest.mark.parametrize("method", COMPOSED)
def test_random_merges_are_replayed_with_their_seed(
    method: str, family: Family, tmp_path: Path, verify: Verify
) -> None:
    settings = {"merge_method": f"metagpt_{method}", "parameters": {"density": 0.5}}
    outs = []
    for seed in ("5", "6"):
        (tmp_path / seed).mkdir()
        options = ("--random-seed", seed)
        outs.append(
            merge(tmp_path / seed, family.base, family.models, *options, **settings)
        )
        assert "30 of 30" in verify(outs[-1])["of"]["values"]["details"]
    first, second = map(read_model, outs)
    differ = [n for n in first if not same_bits(first[n], second[n])]
    assert bool(differ) == (method in RANDOM)
    other = verify(outs[0], "--random-seed", "6", status=3 if differ else 0)
    said = other["of"]["values"]["details"]
    assert ("records the random seed 5, and 6 was given" in said) == bool(differ)
    (outs[0] / "metagpt.json").unlink()
    found = verify(outs[0], "--random-seed", "6", status=1 if differ else 0)
    values = found["of"]["values"]
    assert set(values["different"]) == set(differ)
    assert ("another seed" in values["details"]) == bool(differ)


def test_sums_are_split_among_as_many_threads(tmp_path: Path, verify: Verify) -> None:
    """DARE's sums over a whole tensor depend on them."""
    start = llama_state(vocab_size=8192)
    base, *models = (
        write_model(tmp_path / f"m{seed}", state, llama_config(vocab_size=8192))
        for seed, state in enumerate((start, tuned(start, 1), tuned(start, 2)))
    )
    torch.set_num_threads(2)
    out = merge(
        tmp_path,
        base,
        models,
        *("--random-seed", "5"),
        merge_method="metagpt_dare_linear",
        parameters={"density": 0.5, "rescale": True},
    )
    torch.set_num_threads(1)
    verify(out)
    assert torch.get_num_threads() == 1
    with_record(out, lambda report: report["options"].update(threads=1))
    verify(out, status=1)


def test_a_random_merge_without_a_seed(
    family: Family, tmp_path: Path, verify: Verify
) -> None:
    method = {"merge_method": "metagpt_dare_ties", "parameters": {"density": 0.5}}
    config = merge_config(family.base, family.models, **method)
    run_mergekit(config, tmp_path / "out", "--random-seed", "5")
    found = verify(tmp_path / "out", "--full", status=3)
    assert verdicts(found)["tensors"] == "verified"
    details = found["of"]["values"]["details"]
    assert "metagpt_dare_ties draws random numbers" in details
    assert "--random-seed" in details
    verify(tmp_path / "out", "--random-seed", "5")


def test_slices_and_gradients(family: Family, tmp_path: Path, verify: Verify) -> None:
    one, other = family.models[:2]
    gradient = {"parameters": {"weight": [0.5, 1.0, 2.0]}}
    slices = [
        {
            "sources": [
                {"model": str(model), "layer_range": layers, **settings}
                for model, settings in (
                    (family.base, {}),
                    (one, gradient),
                    (other, {}),
                )
            ]
        }
        for layers in ([0, 2], [1, 3])
    ]
    found = verify(merge(tmp_path, family.base, [], slices=slices))
    assert "39 of 39 tensors" in found["of"]["values"]["details"]
    assert " to " in found["of"]["coefficients"]["details"]


def test_pickles(family: Family, tmp_path: Path, verify: Verify) -> None:
    config = merge_config(family.base, family.models)
    out = tmp_path / "out"
    run_mergekit(config, out, "--no-safe-serialization")
    verify(out)
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    state[UP][0, 0] += 1
    torch.save(state, out / "pytorch_model.bin")
    assert verify(out, status=1)["of"]["values"]["different"] == [UP]


def test_several_gpus_draw_in_no_order(
    family: Family, tmp_path: Path, verify: Verify
) -> None:
    method = {"merge_method": "metagpt_della", "parameters": {"density": 0.5}}
    seed = ("--random-seed", "5")
    out = merge(tmp_path, family.base, family.models, *seed, **method)
    with_record(out, lambda report: report["options"].update(multi_gpu=True))
    found = verify(out, status=3)
    assert "metagpt_della drew random numbers" in found["of"]["values"]["details"]
    assert verdicts(found)["coefficients"] == "verified"


def test_a_device_that_is_not_here(copy: Path, verify: Verify) -> None:
    with_record(copy / "out", lambda report: report["options"].update(device="xpu"))
    details = verify(copy / "out", status=3)["of"]["values"]["details"]
    assert "cannot be replayed: the merge was made on xpu" in details


# --- models that are not what they say ------------------------------------------------


def test_one_bit_is_found(copy: Path, verify: Verify) -> None:
    def flip(state: State) -> None:
        state[UP].view(torch.int16)[3, 4] ^= 1

    before = read_model(copy / "out")[UP]
    rewrite(copy / "out", flip)
    after = read_model(copy / "out")[UP]
    found = verify(copy / "out", "--full", status=1)
    values = found["of"]["values"]
    assert values["different"] == [UP]
    assert f"{UP} differs in 1 of {before.numel():,}" in values["details"]
    largest = float((after.double() - before.double()).abs().max())
    assert values["largest_difference"] == largest > 0
    others = {name: of for name, of in verdicts(found).items() if name != "values"}
    assert set(others.values()) == {"verified"}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (UP, None, "is missing"),
        (UP, torch.zeros(64, 32), "is float32, expected bfloat16"),
        (UP, torch.zeros(32, 64).bfloat16(), "is [32, 64], expected [64, 32]"),
        ("model.extra.weight", torch.ones(2), "is not in the plan"),
    ],
)
def test_other_tensors_are_named(
    name: str, tensor: torch.Tensor | None, words: str, copy: Path, verify: Verify
) -> None:
    def change(state: State) -> None:
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor

    rewrite(copy / "out", change)
    tensors = verify(copy / "out", status=1)["of"]["tensors"]
    assert tensors["different"] == [name]
    assert f"{name} {words}" in tensors["details"]


def test_a_truncated_file_and_a_missing_shard(
    family: Family, tmp_path: Path, verify: Verify
) -> None:
    config = merge_config(family.base, family.models)
    run_mergekit(config, tmp_path / "out", "--out-shard-size", "20K")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    found = verify(tmp_path / "out", status=1)
    assert verdicts(found) == {"files": "different"}
    assert shard.name in found["of"]["files"]["details"]
    shard.unlink()
    details = verify(tmp_path / "out", status=1)["of"]["files"]["details"]
    assert f"{shard.name} is missing" in details
    shard.write_bytes(whole)
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["base", "tuned1"])
def test_inputs_that_have_changed(name: str, copy: Path, verify: Verify) -> None:
    again = tuned(read_model(copy / name), 9)
    shutil.rmtree(copy / name)
    write_model(copy / name, again)
    found = verify(copy / "out", status=1)
    assert found["of"]["inputs"]["different"] == [str(copy / name)]
    assert verdicts(found)["coefficients"] == "different"
    assert verdicts(found)["values"] == "different"


def test_another_base_in_the_yaml(copy: Path, verify: Verify, cli: Cli) -> None:
    shutil.copytree(copy / "base", copy / "other")
    base = read_model(copy / "base")
    write_model(copy / "other", tuned(base, 7, 1e-3))
    yml = copy / "out" / "mergekit_config.yml"
    config = yaml.safe_load(yml.read_text())
    config["base_model"] = str(copy / "other")
    yml.write_text(yaml.safe_dump(config))
    found = verify(copy / "out", status=1)
    assert found["of"]["inputs"]["different"] == [str(copy / "other")]
    # Without a record, the values alone tell.
    (copy / "out" / "metagpt.json").unlink()
    assert "nobody can tell" in cli("verify", copy / "out", status=1).err
    values = verify(copy / "out", status=1)["of"]["values"]
    assert values["verdict"] == "different"
    assert "on the CPU by 1 thread is assumed" in values["details"]


def with_record(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = out / "metagpt.json"
    report = json.loads(file.read_text())
    change(report)
    file.write_text(json.dumps(report))


def test_coefficients_that_were_changed(copy: Path, verify: Verify) -> None:
    def change(report: dict[str, Any]) -> None:
        report["families"][0]["models"][1]["coefficient"] += 0.25

    with_record(copy / "out", change)
    found = verify(copy / "out", status=1)
    coefficients = found["of"].pop("coefficients")
    assert coefficients["different"] == [str(copy / "tuned1")]
    assert coefficients["largest_difference"] == pytest.approx(0.25)
    assert set(verdicts(found).values()) == {"verified"}


def test_coefficients_by_layer_are_compared(
    family: Family, tmp_path: Path, verify: Verify
) -> None:
    models, by_layer = family.models, {"granularity": "layer"}
    out = merge(tmp_path, family.base, models, parameters=by_layer)
    verify(out)

    def change(report: dict[str, Any]) -> None:
        report["families"][0]["pools"][2]["coefficients"][0] += 0.01

    with_record(out, change)
    details = verify(out, status=1)["of"]["coefficients"]["details"]
    assert f"{models[0]} in model.layers.1 is recorded as" in details


# --- what cannot be checked -----------------------------------------------------------


YAML = "out/mergekit_config.yml"


@pytest.mark.parametrize(
    ("spoil", "check", "words"),
    [
        (lambda at: shutil.rmtree(at / "base"), "inputs", "base does not exist"),
        (lambda at: (at / YAML).unlink(), "configuration", "config.yml is missing"),
        (
            lambda at: write_merge(at / YAML, "b", ["m"], merge_method="linear"),
            "configuration",
            "is 'linear'; verify takes",
        ),
    ],
    ids=["no inputs", "no YAML", "another method"],
)
def test_what_cannot_be_checked(
    spoil: Callable[[Path], Any],
    check: str,
    words: str,
    copy: Path,
    verify: Verify,
    cli: Cli,
) -> None:
    spoil(copy)
    assert words in verify(copy / "out", status=3)["of"][check]["details"]
    printed = cli("verify", copy / "out", status=3)
    assert printed.err.count("\n") == 1 and printed.err.endswith(f"see {check}\n")
    assert printed.out.count(words) == 1


def test_a_damaged_report_leaves_the_values_to_check(
    copy: Path, verify: Verify, cli: Cli
) -> None:
    (copy / "out" / "metagpt.json").write_text("{")
    of = verify(copy / "out", status=3)["of"]
    assert "metagpt.json is damaged" in of["inputs"]["details"]
    assert of["values"]["verdict"] == "verified"
    said = cli("verify", copy / "out", status=3).err
    assert said.endswith("see inputs, coefficients\n")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "is missing"), ("{", "is damaged")]
)
def test_a_config_that_is_not_whole(
    content: str | None, words: str, copy: Path, verify: Verify
) -> None:
    file = copy / "out" / "config.json"
    file.unlink()
    if content:
        file.write_text(content)
    details = verify(copy / "out", status=1)["of"]["files"]["details"]
    assert f"{file} {words}" in details


def test_wrong_usage(made: Path, tmp_path: Path, cli: Cli) -> None:
    """More in test_cli.py."""
    cli("verify", made / "out", "--json", tmp_path, status=2)
    record = made / "out" / "metagpt.json"
    said = cli.refused("verify", made / "out", "--json", record, "--force")
    assert "metagpt.json is a file of a model" in said


# --- the sample -----------------------------------------------------------------------


def test_the_sample(
    copy: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_metagpt.commands import verifying
    from mergekit_metagpt.merge_config import replaying

    result = replaying.open_result(copy / "out")
    names = set(result.headers)
    assert names == read_model(copy / "out").keys()

    def sample(seed: int, most: int) -> set[str]:
        return replaying.sample(result, names, most, seed)

    # 9 kinds in each of 3 layers, embeddings, head and the last norm.
    kinds = sample(0, 0)
    assert len(kinds) == 12 and {"lm_head.weight", "model.norm.weight"} < kinds
    assert kinds == sample(0, 0)
    assert len({frozenset(sample(seed, 0)) for seed in range(9)}) > 1
    some = sample(3, result.size(kinds) + 3_000)
    assert some == sample(3, result.size(kinds) + 3_000)
    assert len(some) > 12 and result.size(some) <= result.size(kinds) + 3_000
    assert sample(0, 10**9) == names

    # Only what is in the sample is replayed.
    monkeypatch.setattr(verifying, "SAMPLE", 0)
    left = min(names - kinds)
    rewrite(copy / "out", lambda state: state.update({left: state[left] + 1}))
    details = verify(copy / "out")["of"]["values"]["details"]
    assert "12 of 30 tensors" in details and "sampled with seed 0" in details
    full = verify(copy / "out", "--full", status=1)
    assert full["of"]["values"]["different"] == [left]
    status = 1 if left in sample(4, 0) else 0
    assert verify(copy / "out", "--seed", "4", status=status)["seed"] == 4


def test_nothing_is_written(copy: Path, verify: Verify) -> None:
    before = snapshot(copy)
    verify(copy / "out", "--full")
    assert snapshot(copy) == before
