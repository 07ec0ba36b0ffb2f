"""Estimates from a sample: unbiased, honest about their errors, and deterministic."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_metagpt.arithmetic import standard_errors
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.files import Readers
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.checkpoints.pairs import align
from mergekit_metagpt.scanning import cache, once, sampling
from mergekit_metagpt.scanning.groups import groups_of
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.sampling import BLOCK, Sample, sample_checkpoints
from tests.families import State, forget, run_command, write_model
from tests.oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread")
DRAWS = 200
Draw = torch.Generator
Noise = Callable[[str, torch.Tensor, int, Draw], torch.Tensor]
Shapes = dict[str, tuple[int, int]]


def random(name: str, base: torch.Tensor, model: int, draw: Draw) -> torch.Tensor:
    return 0.01 * (model + 1) * torch.randn(base.shape, generator=draw)


def heavy_rows(name: str, base: torch.Tensor, model: int, draw: Draw) -> torch.Tensor:
    """One row in fifteen moved ten times as far as the others."""
    heavy = torch.rand(base.shape[0], generator=draw) < 1 / 15
    return random(name, base, model, draw) * (1 + 9 * heavy.float())[:, None]


def by_expert(name: str, base: torch.Tensor, model: int, draw: Draw) -> torch.Tensor:
    """Experts that saw very different numbers of tokens."""
    size = math.exp(float(torch.randn((), generator=draw)))
    return size * random(name, base, model, draw)


def low_rank(name: str, base: torch.Tensor, model: int, draw: Draw) -> torch.Tensor:
    """Rank two, in a third of the matrices."""
    if int(name.split(".")[2]) % 3 != model % 3:
        return torch.zeros_like(base)
    left = torch.randn(base.shape[0], 2, generator=draw)
    return 0.01 * left @ torch.randn(2, base.shape[1], generator=draw)


CASES: dict[str, tuple[Shapes, Noise, float]] = {
    "random": (
        {f"model.layers.{n}.mlp.up_proj.weight": (256, 640) for n in range(4)},
        random,
        0.1,
    ),
    "heavy rows": ({"model.embed_tokens.weight": (8192, 128)}, heavy_rows, 0.2),
    "experts": (
        {f"model.layers.0.experts.{n}.w1.weight": (256, 1280) for n in range(8)},
        by_expert,
        0.2,
    ),
    "low rank": (
        {f"model.layers.{n}.mlp.up_proj.weight": (1024, 512) for n in range(6)},
        low_rank,
        0.25,
    ),
}


def states_of(shapes: Shapes, noise: Noise) -> list[State]:
    draw = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    common = {n: 0.005 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
    return [base] + [
        {n: t + common[n] + noise(n, t, model, draw) for n, t in base.items()}
        for model in range(3)
    ]


def write(folder: Path, states: list[State], shards: int = 1) -> list[Checkpoint]:
    return [
        open_checkpoint(write_model(folder / f"m{at}", state, shards=shards))
        for at, state in enumerate(states)
    ]


PAIRS = ([0, 0, 1], [1, 2, 2])  # of three models


def truth(states: list[State]) -> dict[str, torch.Tensor]:
    """What is estimated, by one-liners in float64."""
    base, *models = (
        torch.cat([state[name].double().flatten() for name in sorted(states[0])])
        for state in states
    )
    taus = torch.stack([model - base for model in models])
    gram = taus @ taus.T
    n = gram.diagonal()
    return {
        "sq_norms": n,
        "norms": n.sqrt(),
        "relative": (n / (base @ base)).sqrt(),
        "coefficients": n / n.sum(),
        "cosines": (gram / torch.outer(n, n).sqrt())[PAIRS],
    }


def estimates(result: ScanResult) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The estimates of a whole model, each with its standard errors."""
    pooled: Any = result.pool("model")
    n = pooled.sq_norms
    shares = n / n.sum()
    of_shares = standard_errors.of_coefficients(
        n, pooled.covariances.sq_norms, shares, 2.0
    )
    relative = (n / pooled.base_sq_norms).sqrt()
    return {
        "sq_norms": (n, pooled.sq_norm_errors),
        "norms": (n.sqrt(), pooled.norm_errors),
        "relative": (relative, pooled.relative_norm_errors),
        "coefficients": (shares, of_shares),
        "cosines": (pooled.cosines[PAIRS], pooled.cosine_errors[PAIRS]),
    }


@pytest.mark.parametrize(
    ("case", "most_reads"), [*((case, 10**6) for case in CASES), ("heavy rows", 120)]
)
def test_standard_errors_hold_what_they_promise(
    case: str, most_reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where few reads are allowed, and blocks are twice as long."""
    monkeypatch.setattr(sampling, "MOST_READS", most_reads)
    shapes, noise, share = CASES[case]
    states = states_of(shapes, noise)
    base, *models = write(tmp_path, states)
    draws = []
    for seed in range(DRAWS):
        sample = Sample(share=share, seed=seed)
        found = sample_checkpoints(base, models, sample, gram=True, workers=1)
        draws.append(estimates(found))
    for what, value in truth(states).items():
        columns = zip(*(draw[what] for draw in draws), strict=True)
        estimate, error = (torch.stack(column) for column in columns)
        covered = ((estimate - value).abs() <= 2 * error).double().mean(dim=0)
        assert covered.min() >= 0.9, (what, covered)
        of_mean = estimate.std(dim=0) / math.sqrt(DRAWS)
        assert bool(((estimate.mean(dim=0) - value).abs() <= 3 * of_mean).all()), what
        assert bool((error > 0).all()), what


def test_errors_of_parts_and_pools_hold_too(tmp_path: Path) -> None:
    """By tensor, an estimate is off by as much as its standard error says."""
    shapes, noise, _ = CASES["random"]
    states = states_of(shapes, noise)
    base, *models = write(tmp_path, states)
    exact = scan_checkpoints(base, models).pool("tensor").sq_norms
    scores = []
    for seed in range(DRAWS):
        sample = Sample(share=0.5, seed=seed)
        pooled = sample_checkpoints(base, models, sample, workers=1).pool("tensor")
        assert pooled.sq_norm_errors is not None
        scores.append((pooled.sq_norms - exact) / pooled.sq_norm_errors)
    spread = torch.stack(scores).square().mean()
    assert 0.8 < float(spread) < 1.6


def small_family(folder: Path) -> tuple[list[State], list[Checkpoint]]:
    """Large and small tensors, one with a tail, one with rows that one model lacks."""
    shapes = {
        "model.embed_tokens.weight": (1100, 200),
        "model.layers.0.mlp.up_proj.weight": (300, 301),
        "model.layers.0.norm.weight": (300, 1),
    }
    states = states_of(shapes, random)
    states[2]["model.embed_tokens.weight"] = states[2]["model.embed_tokens.weight"][
        :1000
    ]
    return states, write(folder, states)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("sample", [Sample(share=1.0), Sample(budget=10**9)])
def test_a_sample_of_all_weights_is_an_exact_scan(
    sample: Sample, gram: bool, tmp_path: Path
) -> None:
    _, (base, *models) = small_family(tmp_path)
    exact = scan_checkpoints(base, models, gram=gram)
    whole = sample_checkpoints(base, models, sample, gram=gram)
    assert whole.sampled is None
    assert_same_bits(whole.sq_norms, exact.sq_norms)
    assert_same_bits(whole.base_sq_norms, exact.base_sq_norms)
    if exact.gram is not None and whole.gram is not None:
        assert_same_bits(whole.gram, exact.gram)


def assert_same(first: ScanResult, second: ScanResult) -> None:
    assert first.names == second.names
    assert first.sampled is not None and second.sampled is not None
    assert_same_bits(first.sq_norms, second.sq_norms)
    assert_same_bits(first.base_sq_norms, second.base_sq_norms)
    assert first.gram is not None and second.gram is not None
    assert_same_bits(first.gram, second.gram)
    covariances = (vars(result.sampled.covariances) for result in (first, second))
    for one, other in zip(*(found.values() for found in covariances), strict=True):
        assert_same_bits(one, other)


def test_the_same_bits_for_any_number_of_workers_and_shards(tmp_path: Path) -> None:
    states, (base, *models) = small_family(tmp_path / "one")
    first = sample_checkpoints(base, models, Sample(share=0.3), gram=True, workers=1)
    again = sample_checkpoints(base, models, Sample(share=0.3), gram=True, workers=5)
    assert_same(first, again)
    base, *models = write(tmp_path / "three", states, shards=3)
    assert_same(first, sample_checkpoints(base, models, Sample(share=0.3), gram=True))
    other = sample_checkpoints(base, models, Sample(share=0.3, seed=1), gram=True)
    assert not torch.equal(first.sq_norms, other.sq_norms)


def test_only_large_tensors_are_estimated(tmp_path: Path) -> None:
    states, (base, *models) = small_family(tmp_path)
    result = sample_checkpoints(base, models, Sample(share=1e-6), gram=True)
    assert result.sampled is not None
    varies = result.sampled.covariances.sq_norms.diagonal(dim1=1, dim2=2) > 0
    assert result.names[2] == "model.layers.0.norm.weight"
    assert varies.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    norm = states[1]["model.layers.0.norm.weight"]
    tau = norm.double() - states[0]["model.layers.0.norm.weight"].double()
    assert float(result.sq_norms[2, 0]) == pytest.approx(float(tau.square().sum()))
    # Two blocks and the tail of each of three overlaps, of base and models.
    tails = [1100 * 200 % BLOCK, 1000 * 200 % BLOCK, 300 * 301 % BLOCK]
    longer, common, matrix = (2 * BLOCK + tail for tail in tails)
    read = longer * 3 + common * 4 + matrix * 4 + 300 * 4
    assert result.sampled.bytes_read == read * 4


def test_samples_of_different_overlaps_do_not_covary(tmp_path: Path) -> None:
    _, (base, *models) = small_family(tmp_path)
    result = sample_checkpoints(base, models, Sample(share=0.3), gram=True)
    assert result.sampled is not None
    embedding = result.sampled.covariances.sq_norms[0]
    assert embedding[0, 2] != 0
    assert embedding[0, 1] == embedding[1, 2] == embedding[1, 0] == 0
    assert_same_bits(embedding, embedding.T.contiguous())


@pytest.mark.parametrize("budget", [200_000, 1_000_000, 2_000_000])
def test_a_budget_is_used_and_not_exceeded(budget: int, tmp_path: Path) -> None:
    shapes, noise, _ = CASES["heavy rows"]
    base, *models = write(tmp_path, states_of(shapes, noise))
    result = sample_checkpoints(base, models, Sample(budget=budget))
    assert result.sampled is not None
    assert budget - BLOCK * 16 < result.sampled.bytes_read <= budget


def test_a_budget_that_buys_nothing_is_refused(tmp_path: Path) -> None:
    _, (base, *models) = small_family(tmp_path)
    with pytest.raises(ValueError, match=r"budget of 1,000 bytes.*Give at least"):
        sample_checkpoints(base, models, Sample(budget=1000))


def test_nan_that_is_read_is_an_error(tmp_path: Path) -> None:
    states = states_of(*CASES["random"][:2])
    name = "model.layers.2.mlp.up_proj.weight"
    states[2][name][:] = math.nan
    base, *models = write(tmp_path, states)
    with pytest.raises(ValueError, match=f"{name} of .*m2 holds NaN"):
        sample_checkpoints(base, models, Sample(share=0.1))


def test_infinities_that_all_share_are_no_learning(tmp_path: Path) -> None:
    states = states_of(*CASES["random"][:2])
    name = "model.layers.2.mlp.up_proj.weight"
    for state in states:
        state[name] = torch.full_like(state[name], -math.inf)
    base, *models = write(tmp_path, states)
    result = sample_checkpoints(base, models, Sample(share=0.1), gram=True)
    assert result.sq_norms[result.names.index(name)].tolist() == [0.0, 0.0, 0.0]


def test_a_head_that_is_its_embedding_counts_once(tmp_path: Path) -> None:
    states = states_of(*CASES["heavy rows"][:2])
    for state in states:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    base, *models = write(tmp_path, states)
    result = sample_checkpoints(base, models, Sample(share=0.1))
    assert result.names == ("model.embed_tokens.weight",)
    states[1]["lm_head.weight"] = states[1]["lm_head.weight"] + 1
    base, *models = write(tmp_path / "untied", states)
    assert len(sample_checkpoints(base, models, Sample(share=0.1)).names) == 2


def test_the_delta_method_by_a_small_step() -> None:
    """Errors of coefficients, against their derivatives by finite differences."""
    draw = torch.Generator().manual_seed(3)
    n = torch.rand(4, generator=draw, dtype=torch.float64) + 0.5
    root = torch.randn(4, 4, generator=draw, dtype=torch.float64) * 0.01
    for power in (2.0, 1.0, -1.0):

        def shares(values: torch.Tensor, p: float = power) -> torch.Tensor:
            return values ** (p / 2) / (values ** (p / 2)).sum()

        step = 1e-6 * torch.eye(4, dtype=torch.float64)
        slopes = torch.stack([(shares(n + s) - shares(n - s)) / 2e-6 for s in step]).T
        covariance = root @ root.T
        expected = (slopes @ covariance @ slopes.T).diagonal().sqrt()
        found = standard_errors.of_coefficients(n, covariance, shares(n), power)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def old_family(folder: Path) -> list[Path]:
    states, _ = small_family(folder)
    for at in range(len(states)):
        for file in (folder / f"m{at}").iterdir():
            os.utime(file, (1_600_000_000 + at, 1_600_000_000 + at))
    return [folder / f"m{at}" for at in range(len(states))]


def test_the_cache_tells_a_sample_from_a_scan(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = map(open_checkpoint, old_family(tmp_path / "family"))
    sample = Sample(share=0.3)
    first = once.measure(base, models, gram=True, sample=sample)
    (entry,) = cache.entries()
    assert entry.kind == "sample"
    read: list[Sample] = []

    def counted(*given: object, **options: object) -> ScanResult:
        read.append(given[2])  # type: ignore[arg-type]
        return sample_checkpoints(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(once, "sample_checkpoints", counted)
    assert once.measure(base, models, gram=True, sample=sample) is first
    once._SAMPLES.clear()
    assert_same(first, once.measure(base, models, gram=True, sample=sample))
    assert not read
    other = Sample(share=0.3, seed=1)
    assert once.measure(base, models, gram=True, sample=other).sampled is not None
    assert read == [other]
    exact = once.measure(base, models, gram=True)
    assert exact.sampled is None
    for anew in (False, True):  # what this process holds, then what the disk does
        if anew:
            forget()
        served = once.measure(base, models, gram=True, sample=Sample(share=0.2))
        assert served.sampled is None
        assert_same_bits(served.sq_norms, exact.sq_norms)
    assert read == [other]


def test_a_refused_budget_does_not_refuse_a_scan(
    own_cache: Path, tmp_path: Path
) -> None:
    _, (base, *models) = small_family(tmp_path / "family")
    with pytest.raises(ValueError, match="budget"):
        once.measure(base, models, sample=Sample(budget=1))
    assert once.measure(base, models).sampled is None


def test_inspect_prints_estimates_with_their_errors(
    own_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    base, *models = old_family(tmp_path / "family")
    file, figure = tmp_path / "report.json", tmp_path / "figure.svg"
    arguments = ["inspect", "--base", base, *models, "--sample", "30%"]
    assert run_command(*arguments, "--json", file, "--plot", figure) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())["families"][0]
    assert report["sample"]["share"] == 0.3
    assert report["sample"]["bytes_read"] < report["sample"]["bytes_stored"]
    assert figure.stat().st_size > 0
    smallest = min(model["coefficient_se"] for model in report["models"])
    digits = -math.floor(math.log10(smallest))
    for model, row in zip(report["models"], (1, 2, 3), strict=True):
        error = model["coefficient_se"]
        cell = f"{model['coefficient']:.{digits}f} ± {error:.{digits}f}"
        (line,) = (
            x
            for x in printed.splitlines()
            if x.startswith(f"{row}  ") and f"m{row} " in x
        )
        assert cell in line
        assert set(model["parts_se"]) == set(model["parts"])
    assert "± is one standard error" in printed
    assert not re.search(r"± [0.]+(?![\d.])", printed)
    parts = printed.partition("Share of each part")[2]
    for model, line in zip(
        report["models"], re.findall(r"(?m)^\d  .*%$", parts), strict=True
    ):
        assert line.count("±") == sum(e > 0 for e in model["parts_se"].values()) > 0
    cosines = re.findall(r"[+-]\d\.(\d+) ± ", printed)
    assert len(cosines) == 6 and len({*map(len, cosines)}) == 1
    for number in (
        "||theta_0||",
        "has a length of",
        "would multiply it by",
        "Norms are",
    ):
        assert f"{number} about " in printed
    assert run_command(*arguments, "--weight", "m3=1000") == 0
    assert "Warning: by this sample, " in capsys.readouterr().out
    assert run_command("inspect", "--base", base, *models, "--json", "-") == 0
    exact = json.loads(capsys.readouterr().out)["families"][0]
    assert exact["sample"] is None and exact["cosines_se"] is None
    for model, estimated in zip(exact["models"], report["models"], strict=True):
        assert model["coefficient_se"] is model["parts_se"] is None
        gap = abs(model["coefficient"] - estimated["coefficient"])
        assert 0 < gap < 5 * estimated["coefficient_se"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "0"], "--sample is '0'"),
        (["--sample", "150%"], "--sample is '150%'"),
        (["--sample", "few"], "--sample is 'few'"),
        (["--budget", "-1"], "--budget is '-1'"),
        (["--budget", "nan"], "--budget is 'nan'"),
        (["--sample", "1%", "--budget", "1MB"], "both given"),
    ],
)
def test_other_shares_and_budgets_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("inspect", "--base", "./a", "./b", *options) == 2
    assert message in capsys.readouterr().err


def lengths_of(sample: Sample, *checkpoints: Checkpoint) -> dict[str, int]:
    """Elements of a block of each tensor that is sampled."""
    base, *models = checkpoints
    groups = groups_of([align(base, model, Readers()) for model in models], gram=False)
    plan = sampling._plan(sample, groups)
    assert plan.reads(groups) <= max(sampling.MOST_READS, 2 * 2 * 4 * len(groups))
    return {at.name: plan.length(at) for at in groups if plan.count(at)}


@pytest.mark.parametrize("sample", [Sample(share=0.1), Sample(budget=2_000_000)])
def test_blocks_grow_where_reads_would_be_too_many(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to 64 blocks of each tensor: a matrix keeps shorter ones than embeddings."""
    large, small = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    shapes = {large: (8192, 128), small: (256, 1280)}
    family = write(tmp_path, states_of(shapes, random))
    assert lengths_of(sample, *family) == {large: BLOCK, small: BLOCK}
    monkeypatch.setattr(sampling, "MOST_READS", 60)
    assert lengths_of(sample, *family) == {large: 4 * BLOCK, small: BLOCK}
    result = sample_checkpoints(family[0], family[1:], sample)
    assert result.sampled is not None
    if sample.budget is not None:
        assert 0.8 * sample.budget < result.sampled.bytes_read <= sample.budget


def test_a_share_reads_the_same_blocks_with_inner_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_READS", 30)
    _, (base, *models) = small_family(tmp_path)
    with_gram, without = (
        sample_checkpoints(base, models, Sample(share=0.3), gram=gram)
        for gram in (True, False)
    )
    torch.testing.assert_close(with_gram.sq_norms, without.sq_norms, rtol=1e-9, atol=0)


def test_blocks_fill_whole_pieces() -> None:
    assert sampling.PIECE % BLOCK == 0
