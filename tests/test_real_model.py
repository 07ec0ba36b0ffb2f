"""The experiment on a real model: rivals by their formulas, its steps on a tiny one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EXPERIMENTS = Path(__file__).resolve().parents[1] / "docs" / "experiments"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the scripts importable by their own names, as Python has them when run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in [path.stem for path in EXPERIMENTS.glob("*.py")]:
        sys.modules.pop(name, None)


# ---- rivals, by their formulas on small matrices


@pytest.fixture(params=[(6, 9), (9, 6), (7, 7)], ids=str)
def matrices(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(request.param, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def test_tsv_keeps_the_top_directions_and_makes_them_orthonormal(
    matrices: list[torch.Tensor],
) -> None:
    from real_rivals import tsv_merge

    us, values, vhs = [], [], []
    for u, s, vh in map(svd, matrices):
        us.append(u[:, :2])  # a third of 6 or 7
        values.append(s[:2])
        vhs.append(vh[:2])
    left, _, left_h = svd(torch.cat(us, 1))
    right, _, right_h = svd(torch.cat(vhs))
    wanted = left @ left_h @ torch.diag(torch.cat(values)) @ right @ right_h
    torch.testing.assert_close(tsv_merge(matrices), wanted)


def test_tsv_of_one_matrix_is_that_matrix(matrices: list[torch.Tensor]) -> None:
    from real_rivals import tsv_merge

    torch.testing.assert_close(tsv_merge(matrices[:1]), matrices[0])


def test_iso_levels_the_singular_values_of_the_sum(
    matrices: list[torch.Tensor],
) -> None:
    from real_rivals import iso_merge

    total = torch.stack(matrices).sum(0)
    u, s, vh = svd(total)
    merged = iso_merge(matrices)
    torch.testing.assert_close(merged, s.mean() * (u @ vh))
    torch.testing.assert_close(svd(merged)[1], s.mean().expand(len(s)))


def test_wudi_is_stationary(matrices: list[torch.Tensor]) -> None:
    from real_rivals import wudi_merge

    merged = wudi_merge(matrices).requires_grad_()
    loss = torch.stack(
        [((merged - d) @ d.T).square().sum() / d.square().sum() for d in matrices]
    ).sum()
    loss.backward()
    assert merged.grad is not None
    assert merged.grad.abs().max() < 1e-9 * loss.detach()
    covariances = [d.T @ d / d.square().sum() for d in matrices]
    total = sum(d @ c for d, c in zip(matrices, covariances, strict=True))
    by_formula = total @ torch.linalg.pinv(sum(covariances))
    torch.testing.assert_close(merged.detach(), by_formula)


def test_low_rank_matrices_are_merged_too() -> None:
    from real_rivals import iso_merge, tsv_merge, wudi_merge

    a = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 5)).double()
    for merge in (tsv_merge, iso_merge, wudi_merge):
        assert merge([a, 2 * a]).isfinite().all()
    torch.testing.assert_close(wudi_merge([a, a]), a)


def test_magic_restores_the_mean_length() -> None:
    from real_rivals import gram, magic_length, weighted

    generator = torch.Generator().manual_seed(2)
    taus = [{"x": torch.randn(3, 4, generator=generator)} for _ in range(2)]
    lambdas = torch.tensor([0.3, 0.7], dtype=torch.float64)
    factor = magic_length(lambdas, gram(taus))
    merged = weighted(taus, (factor * lambdas).tolist())
    lengths = [float(tau["x"].norm()) for tau in taus]
    wanted = 0.3 * lengths[0] + 0.7 * lengths[1]
    assert float(merged["x"].norm()) == pytest.approx(wanted, rel=1e-6)


def test_lines_rises_with_depth() -> None:
    from real_rivals import lines

    names = ["embed_tokens.weight", *(f"layers.{k}.w" for k in range(3)), "norm.weight"]
    scaled = lines({name: torch.ones(1) for name in names}, 3, 0.5, 1.5)
    assert [float(part) for part in scaled.values()] == [0.5, 0.5, 1.0, 1.5, 1.5]


def test_prior_moves_from_the_first_model_to_the_second() -> None:
    from real_rivals import decaying_prior

    first, second = decaying_prior(3, 2.0)
    assert first == pytest.approx([1.0, 0.36787944, 0.13533528])
    assert [a + b for a, b in zip(first, second, strict=True)] == [1.0] * 3


def test_only_matrices_of_layers_are_decomposed() -> None:
    from real_rivals import by_matrix

    tau = {
        name: torch.full((2, 2), 4.0)
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    } | {"model.layers.0.input_layernorm.weight": torch.full((2,), 4.0)}
    merged = by_matrix([tau, tau], lambda matrices: matrices[0] * 0, 1.0)
    assert [float(part.mean()) for part in merged.values()] == [4.0, 0.0, 4.0]


# ---- the committed results


def test_results_name_their_setting() -> None:
    from real_family import PLANS
    from real_merges import FEW, MIXTURES
    from real_results import EQUAL, all_seeds, real

    results = real()
    assert [plan["steps"] for plan in results.setting["plans"]] == [
        plan.steps for plan in PLANS
    ]
    named = {name: list(models) for name, models in MIXTURES.items()}
    assert results.mixtures == named
    assert {*EQUAL} < {*MIXTURES}
    for of_seed in all_seeds():
        assert all(of_seed.has(mixture, *FEW) for mixture in named)
    for mixture, models in named.items():
        kinds = [results.domains[model] for model in models]
        assert len(set(kinds)) == len(kinds), f"{mixture} has a domain twice"


def test_the_repeated_seed_agrees_with_the_first() -> None:
    from real_results import real, repeated

    mixtures = {mixture for mixture, _ in repeated().merges}
    assert mixtures == {*real().mixtures} - {"two equal", "three equal"}
    close = {"code and worked", "worked short", "all five", "code short"}
    for mixture in mixtures:
        again, first = (
            results.difference(mixture, "metagpt", "average")[0]
            for results in (repeated(), real())
        )
        # As the page says; a long training amplifies what another processor rounds.
        assert abs(again - first) < (0.001 if mixture in close else 0.005)
    losses = {m: real().ald(m, "average") for m in real().mixtures}
    assert min(losses, key=losses.__getitem__) == "code and worked"


def test_precision_is_finer_than_the_effects() -> None:
    """Differences of losses under bfloat16 against float32, and a step of training."""
    from real_results import real

    setting = real().setting
    losses = setting["precision"]["losses"]
    by_kind = {
        kind: [
            tuned - base
            for tuned, base in zip(
                losses[f"code {kind}"], losses[f"base {kind}"], strict=True
            )
        ]
        for kind in ("float32", "bfloat16")
    }
    errors = [
        abs(low - high)
        for low, high in zip(by_kind["bfloat16"], by_kind["float32"], strict=True)
    ]
    assert max(errors) < 0.005
    low, high = setting["precision"]["step"]
    assert abs(low - high) < 0.01
    assert setting["precision"]["gradient_cosine"] > 0.9
    # One unit in the last place of the largest weights, which are those of norms.
    assert setting["file_minus_memory"] <= 2.0**-13


def test_words_on_the_real_model() -> None:
    from statistics import fmean

    from real_results import EQUAL, all_seeds, comparisons, ratio
    from results import Results

    for results in all_seeds():
        for mixture in results.mixtures:
            by_metagpt, by_power_1 = (
                results.difference(mixture, method, "average")[0]
                for method in ("metagpt", "power 1")
            )
            if mixture == "code short":
                assert by_power_1 < by_metagpt < 0
            else:
                assert 0 < by_power_1 < 0.5 * by_metagpt
            if mixture in EQUAL:
                assert ratio(results.norms(mixture)) < 1.3
        for name, domain in results.domains.items():
            own, base = (
                fmean(results.models[model]["loss"][domain]) for model in (name, "base")
            )
            assert own < base
        least = {d: results.models["base"]["loss"][d] for d in results.domains.values()}
        gains = {
            name: fmean(least[domain]) - fmean(results.models[name]["loss"][domain])
            for name, domain in results.domains.items()
        }
        assert min(gains, key=gains.__getitem__) == "code_short"
        for names in results.mixtures.values():
            if "legal_lora" in names:
                farthest = max(names, key=lambda n: results.models[n]["sq_norm"])
                assert farthest == "legal_lora"
    small = Results.read(EXPERIMENTS / "results.json")
    assert all(gap > 0 for n, gap in comparisons(small)["real"] if ratio(n) <= 2)
    prepared = all_seeds()[0].setting["prepared"]
    assert prepared["kept"] == 19_433 and prepared["parameters"] == 112_763_136


def test_the_readme_counts_as_the_results_do() -> None:
    from real_results import of_all_seeds

    better = of_all_seeds("average", "metagpt", "all")
    milder = of_all_seeds("power 1", "metagpt", "all")
    counts = [
        f"{sum(d < 0 for d in pairs)} of {len(pairs)}" for pairs in (better, milder)
    ]
    text = " ".join((EXPERIMENTS.parents[1] / "README.md").read_text().split())
    assert f"the plain average was better in {counts[0]} runs" in text
    assert f"a lower loss than MetaGPT in {counts[1]}, and" in text


def test_a_rule_is_judged_by_what_it_chooses() -> None:
    from real_results import excess, gamma, judged, ratio

    assert ratio([4.0, 9.0]) == pytest.approx(1.5)
    assert excess([1.0, 3.0]) == pytest.approx(1.5)
    # By hand: logs 1 and 3 have the mean 2 and the variance 1.
    assert gamma([2.718281828, 20.085536923]) == pytest.approx(0.25)
    pairs = [([1.0, 1.0], -0.2), ([1.0, 4.0], 0.4), ([1.0, 9.0], -0.1)]
    right, gain = judged(pairs, ratio, 1.5)
    assert (right, gain) == (2, pytest.approx(-0.2 / 3))


# ---- the steps on a tiny model


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A prepared folder with a tiny Gemma and random text; plans of a few steps."""
    import real_family
    import real_merges
    import real_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    places = real_family.Folders(tmp_path / "out")
    model.save_pretrained(places.base)
    texts = {
        f"{domain} {side}": torch.randint(4, 64, (600,))
        for domain in real_family.DOMAINS
        for side in ("training", "held out")
    }
    torch.save(texts, places.tokens)
    (places.out / "prepared.json").write_text("{}")
    plans = (
        real_family.Plan("code", {"code": 1, "code_long": 2}),
        real_family.Plan("worked", {"worked": 1}, lora_rank=2),
    )
    for module in (real_family, real_model):
        monkeypatch.setattr(module, "PLANS", plans)
    for module in (real_family, real_merges):
        monkeypatch.setattr(module, "LAYERS", 2)
    mixtures = {"two equal": ("code", "worked"), "long": ("code_long", "worked")}
    for module in (real_merges, real_model):
        monkeypatch.setattr(module, "MIXTURES", mixtures)
    monkeypatch.setattr(real_model, "SEEDS", (0, 1))
    return places


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_steps_run_and_go_on(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import real_merges
    import real_model

    # What `main` sets for its process, this one gets back.
    monkeypatch.setenv("MERGEKIT_METAGPT_QUIET", "0")
    log = logging.getLogger("mergekit_metagpt")
    monkeypatch.setattr(log, "setLevel", lambda level: None)
    written = tmp_path / "results.json"
    for step in ("train", "evaluate", "evaluate", "write"):
        command = ["real_model.py", step, str(folders.out), "--to", str(written)]
        monkeypatch.setattr(sys, "argv", command)
        real_model.main()
    results = json.loads(written.read_text())
    assert results["setting"]["file_minus_memory"] < 1e-6
    first, second = results["seeds"]
    rows = [(r["mixture"], r["method"]) for r in first["merges"]]
    assert len(rows) == len(set(rows)) > 30
    assert ("long", "metagpt") in rows
    assert {"TSV-M", "Iso-C", "WUDI", "FRANK's prior"} <= {m for _, m in rows}
    for record in first["merges"]:
        assert len(record["loss"]["code"]) == results["setting"]["chunks"]
    # Nothing was learnt in a step from random text, so nothing is far from the base.
    by_row = {r["method"]: r for r in first["merges"] if r["mixture"] == "two equal"}
    base = first["models"][0]["loss"]["code"]
    assert by_row["average"]["loss"]["code"] == pytest.approx(base, abs=0.1)
    # The other seed has specialists of its own, and few methods.
    assert second["models"][0] == first["models"][0]
    assert second["models"][1]["loss"] != first["models"][1]["loss"]
    assert {r["method"] for r in second["merges"]} == {*real_merges.FEW}
