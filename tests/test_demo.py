"""The demo's text, family, losses and merges, on a family trained in seconds."""

import ast
import math
import re
import shlex
from operator import add, mul, sub
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from mergekit_metagpt.commands import demo
from tests.broken import snapshot
from tests.families import run_command

SMALL = {"steps": (100, 20, 30, 40), "width": 32}
TINY = {"steps": (2, 1, 1, 1), "width": 32}
SAMPLE_ENDS = {
    "general": r"(?<=[.?]) ",
    "arithmetic": r"\n",
    "logs": r"\n",
    "code": r"\n\n",
}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory, said) -> demo.DemoResult:
    return demo.run(tmp_path_factory.mktemp("demo"), say=said.append, **SMALL)


def flat(path: Path) -> torch.Tensor:
    state = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


@pytest.mark.parametrize("domain", SAMPLE_ENDS)
def test_text_is_repeatable_and_held_out_samples_are_never_trained_on(domain):
    training = demo.text(domain, demo.TRAINING_BYTES)
    held_out = demo.text(domain, demo.HELD_OUT_BYTES, held_out=True)
    assert training == demo.text(domain, demo.TRAINING_BYTES)
    assert held_out == demo.text(domain, demo.HELD_OUT_BYTES, held_out=True)
    assert len(training) >= demo.TRAINING_BYTES
    assert training.isascii()
    unseen = set(re.split(SAMPLE_ENDS[domain], held_out)) - {""}
    assert len(unseen) > 100
    assert unseen.isdisjoint(re.split(SAMPLE_ENDS[domain], training))


def test_arithmetic_is_exact_and_code_parses():
    lines = demo.text("arithmetic", 20_000).splitlines()
    for equation in "; ".join(lines).split("; "):
        first, sign, second, _, answer = equation.split()
        exact = {"+": add, "-": sub, "*": mul}[sign](int(first), int(second))
        assert exact == int(answer)
    ast.parse(demo.text("code", 20_000))


def test_checkpoints_and_tokenizers_load_and_round_trip(result):
    family = result.family
    assert tuple(family.specialists) == demo.SPECIALTIES
    for path in (family.base, *family.specialists.values(), *result.merges.values()):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.bfloat16
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        words = "  def f(x):\n\treturn 'é' , x != 3 😀\r\n"
        tokens = tokenizer(words)["input_ids"]
        assert len(tokens) == len(words.encode())
        assert tokenizer.decode(tokens) == words
        assert tokenizer.decode([tokenizer.eos_token_id]) == demo.END
        assert model.config.vocab_size == len(tokenizer) == 257


def test_base_leads_at_general_text_and_each_specialist_in_its_domain(result):
    names = ["base", *result.family.specialists]
    for domain, best in zip(("general", *demo.SPECIALTIES), names, strict=True):
        losses = {name: result.losses[name][domain] for name in names}
        assert min(losses, key=losses.__getitem__) == best, (domain, losses)


def test_held_out_loss_is_the_mean_over_bytes(result):
    path = result.family.specialists["logs"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).float()
    corpus = demo.text("logs", demo.HELD_OUT_BYTES, held_out=True)
    ids = torch.tensor(tokenizer(corpus)["input_ids"])[: demo.HELD_OUT_BYTES]
    windows = ids.reshape(-1, demo.WINDOW)
    with torch.no_grad():
        log_p = model(windows[:, :-1]).logits.double().log_softmax(-1)
    naive = -log_p.gather(-1, windows[:, 1:, None]).mean().item()
    assert result.losses["logs"]["logs"] == pytest.approx(naive, rel=1e-5)


def test_numbers_agree_with_naive_recomputations(result):
    base, *tuned = map(flat, (result.family.base, *result.family.specialists.values()))
    taus = torch.stack(tuned) - base
    norms = (taus**2).sum(1)
    torch.testing.assert_close(result.sq_norms, norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.lambdas, norms / norms.sum(), rtol=1e-6, atol=0)
    assert result.lambdas.sum().item() == pytest.approx(1, abs=1e-12)
    cosines = torch.nn.functional.cosine_similarity(taus[:, None], taus[None], dim=-1)
    torch.testing.assert_close(result.cosines, cosines, rtol=0, atol=1e-6)

    weights = {
        "metagpt": result.lambdas,
        "average": torch.full((3,), 1 / 3, dtype=torch.float64),
        "task_arithmetic": torch.full((3,), 0.3, dtype=torch.float64),
    }
    assert list(result.merges) == list(weights)
    for name, path in result.merges.items():
        expected = base + weights[name] @ taus
        # One rounding to bfloat16, of 8 significant bits.
        torch.testing.assert_close(flat(path), expected, rtol=2**-8, atol=1e-7)


def test_ald_is_the_mean_loss_above_the_specialists(result):
    losses = result.losses
    assert list(losses) == ["base", *demo.SPECIALTIES, *result.merges]
    assert result.ald.keys() == result.merges.keys()
    for name, ald in result.ald.items():
        a, b, c = (losses[name][t] - losses[t][t] for t in demo.SPECIALTIES)
        assert ald == pytest.approx((a + b + c) / 3)
        assert math.isfinite(ald)


def test_recipes_work_from_any_folder(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = result.family.base.parent
    for name in result.merges:
        recipe = yaml.safe_load((folder / f"{name}.yml").read_text())
        paths = [Path(source["model"]) for source in recipe["models"]]
        assert paths == list(result.family.specialists.values())
        assert all(path.is_absolute() and path.is_dir() for path in paths)


def test_the_comparison_that_the_demo_prints_runs(result, monkeypatch, capsys):
    folder = result.family.base.parent
    monkeypatch.setattr(demo, "run", lambda where, say: result)
    assert run_command("demo", folder) == 0
    (line,) = re.findall(r"^\(cd .* compare .*\)$", capsys.readouterr().out, re.M)
    cd, place, then, program, *arguments = shlex.split(line.strip("()"))
    assert (cd, then, program) == ("cd", "&&", "mergekit-metagpt")
    monkeypatch.chdir(place)
    assert run_command(*arguments) == 0
    shown = capsys.readouterr().out
    for name in demo.SPECIALTIES:
        held_out = demo.text(name, demo.HELD_OUT_BYTES, held_out=True)
        assert Path(f"{name}.txt").read_text() == held_out[: demo.HELD_OUT_BYTES]
        loss = re.search(rf"^ ?{name} .*", shown.partition("Loss on each")[2], re.M)
        assert loss and len(loss[0].split()) == 1 + len(demo.SPECIALTIES)
    assert "Best on these texts: " in shown


def test_stages_are_said_in_order(result, said):
    starts = ["training"] * 4 + ["merging"] * 3 + ["evaluating"]
    assert [line.split()[0] for line in said] == starts


def test_same_family_every_time_quietly_and_without_a_trace(tmp_path, capfd):
    def settings():
        logging = transformers.utils.logging
        return (
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    families = [tmp_path / "first", tmp_path / "second"]
    for folder in families:
        demo.held_out_losses(demo.make_family(folder, **TINY).base)
        torch.rand(())  # the second family starts from another random state
        torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    first, second = map(snapshot, families)
    assert first == second
    assert {"base/model.safetensors", "code/tokenizer.json"} <= first.keys()


@pytest.mark.parametrize("make", [demo.make_family, demo.run])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (".", "is not an empty folder; name a new"),
        ("notes.txt", "is not an empty folder; name a new"),
        ("a+b", r"contains '\+' or '@'"),
        ("a@b", r"contains '\+' or '@'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_left_alone(make, name, problem, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=problem):
        make(tmp_path / name, say=pytest.fail)
    assert snapshot(tmp_path) == {"notes.txt": b"mine"}
