"""The seven rules of n_t of the method.

What merges of every kind of checkpoint show is in test_inputs.py, of slices and layouts
in test_architectures.py.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.scanning import groups
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    relatives,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.oracle import (
    GRANULARITIES,
    ORDER,
    assert_same_bits,
    assert_same_states,
    assert_within_bound,
    common_part,
    exact_sq_norm,
    naive_coefficients,
    naive_lambdas,
    naive_merge,
    naive_sq_norm,
    naive_sq_norms,
    solved_coefficients,
)

States = tuple[State, ...]
Log = pytest.LogCaptureFixture

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_pair = pytest.mark.parametrize(
    ("of_base", "of_model"), list(itertools.permutations(ORDER, 2)), ids=str
)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = [f"model.layers.{index}" for index in range(3)]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base() -> State:
    """Random weights in float32. Tests make changed copies."""
    return llama_state()


@pytest.fixture(scope="module")
def models(base: State) -> tuple[State, State, State]:
    """Three fine-tunes of it, of different distances."""
    a, b, c = (tuned(base, k, size) for k, size in enumerate((1e-2, 2e-2, 3e-2), 1))
    return a, b, c


def written(folder: Path, *states: State, **options: Any) -> list[Path]:
    """Store each state as a checkpoint of its own."""
    return [
        write_model(folder / f"model{k}", state, **options)
        for k, state in enumerate(states)
    ]


def scanned(folder: Path, *states: State, **options: Any) -> torch.Tensor:
    """n_t of all states but the first, which is the base, from stored checkpoints."""
    first, *others = written(folder, *states, **options)
    return mergekit_metagpt.scan(first, others).pool("model").sq_norms


def assert_close(
    found: torch.Tensor, expected: torch.Tensor | Sequence[float], rtol: float = 1e-7
) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def sources(models: Iterable[Path], start: int, stop: int, **more: Any) -> Any:
    """One slice of a configuration, the same layers of every model."""
    entries = [{"model": str(m), "layer_range": [start, stop]} for m in models]
    return {"sources": entries, **more}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of bases and task vectors that the scan's kernel measures, by call."""
    counts: list[int] = []
    kernel = squared_norms.flat_sq_norms

    def counting(
        base: torch.Tensor, tuned: Sequence[torch.Tensor], *, own: bool = False
    ) -> list[float]:
        own_too = (base,) if own else ()
        counts.append(sum(tensor.numel() for tensor in (*own_too, *tuned)))
        return kernel(base, tuned, own=own)

    monkeypatch.setattr(squared_norms, "flat_sq_norms", counting)
    return counts


def elements(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


# 1. A property of a pair (base, model), not of the plan.


def test_1_a_property_of_the_pair_not_of_the_other_models(
    tmp_path: Path, base: State, models: States
) -> None:
    first, *others = written(tmp_path, base, *models)
    together = mergekit_metagpt.scan(first, others).pool("model").sq_norms
    for k, other in enumerate(others):
        alone = mergekit_metagpt.scan(first, [other]).pool("model").sq_norms
        assert_same_bits(together[k : k + 1], alone)


@every_granularity
def test_1_measured_as_stored_or_under_tensor_as_handed_over(
    tmp_path: Path, base: State, granularity: str
) -> None:
    # A model that bfloat16 cannot tell from the base, and one that it can.
    coarse = cast(cast(base, torch.bfloat16), torch.float32)
    near = {name: tensor * (1 + 2.0**-10) for name, tensor in coarse.items()}
    far = {name: tensor.clone() for name, tensor in coarse.items()}
    for name in (name for name in far if "proj" in name):
        far[name].view(-1)[::512] *= 1.125
    first, *others = written(tmp_path, coarse, near, far)
    config = merge_config(first, others, dtype="bfloat16")
    config["parameters"] = {"granularity": granularity}
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in merged.items():
        if granularity == "tensor":
            if "proj" in name:
                assert_same_bits(tensor, far[name].bfloat16())
            continue
        lambdas = naive_lambdas(name, coarse, [near, far], granularity=granularity)
        assert 0.4 < lambdas[1] < 0.8 or "proj" not in name
        handed = [cast(state, torch.bfloat16)[name] for state in (coarse, near, far)]
        assert_within_bound(tensor, handed[0], handed[1:], lambdas)


def test_1_every_floating_point_tensor_that_base_and_model_share(
    tmp_path: Path, base: State, models: States
) -> None:
    ids, ones = torch.arange(64), torch.ones(9)
    wide = {**base, "model.position_ids": ids, f"{LAYERS[1]}.only_in_base": ones}
    wider = [{**model, "model.position_ids": ids + 1000} for model in models]
    wider[0][f"{LAYERS[1]}.only_in_model"] = ones
    assert_close(scanned(tmp_path, wide, *wider), naive_sq_norms(base, models))


def test_1_memoised_per_pair(
    tmp_path: Path, base: State, models: States, measured: list[int]
) -> None:
    paths = written(tmp_path, base, *models)
    # Two slices, twelve layers' tensors, and still each pair once.
    slices = [sources(paths[:3], 0, 1), sources(paths[:3], 1, 3)]
    run_mergekit(merge_config(paths[0], [], slices=slices), tmp_path / "one")
    # Of each scan the base's norm too.
    assert sum(measured) == (2 + 1) * elements(base)
    run_mergekit(merge_config(paths[0], [paths[2], paths[3]]), tmp_path / "two")
    assert sum(measured) == (3 + 2) * elements(base)
    # Another base is another pair.
    run_mergekit(merge_config(paths[3], [paths[0], paths[2]]), tmp_path / "three")
    assert sum(measured) == (5 + 3) * elements(base)


def test_1_memo_belongs_to_the_files(
    tmp_path: Path, base: State, models: States
) -> None:
    paths = written(tmp_path, base, *models)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    run_mergekit(config, tmp_path / "one")
    shutil.rmtree(paths[1])
    changed = [tuned(base, 9, 5e-2), *models[1:]]
    write_model(paths[1], changed[0])
    merged = run_mergekit(config, tmp_path / "two")
    expected = naive_coefficients(naive_sq_norms(base, changed))
    assert_close(solved_coefficients(merged, base, changed), expected)


# 2. A weight counts once.


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != HEAD}


def with_copied_head(state: State) -> State:
    return {**state, HEAD: state[EMBED].clone()}


def test_2_a_head_that_differs_in_one_bit_is_its_own(
    tmp_path: Path, base: State, models: States
) -> None:
    first, second = map(with_copied_head, (base, models[0]))
    second[HEAD].view(torch.int32)[7, 7] ^= 1
    expected = naive_sq_norms(first, [second])
    assert_close(scanned(tmp_path, first, second), expected)


def test_2_names_come_from_mergekits_tied_names(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, architectures=["GPT2LMHeadModel"])
    rng = torch.Generator().manual_seed(0)
    embed, norm = torch.randn(60, 8, generator=rng), torch.randn(8, generator=rng)
    shift = torch.randn(60, 8, generator=rng)
    # mergekit knows both spellings, and both of them as what a head is tied to.
    short = {"wte.weight": embed, "ln_f.weight": norm}
    long = {
        "transformer.wte.weight": embed + shift,
        "transformer.ln_f.weight": norm + 1,
        HEAD: embed + shift,
    }
    twice, own = {**short, HEAD: embed}, {**long, HEAD: embed - shift}
    once = naive_sq_norm(embed, embed + shift) + naive_sq_norm(norm, norm + 1)
    with_own = once + naive_sq_norm(embed, embed - shift)
    pairs = [(short, long), (long, short), (twice, long), (short, own), (twice, own)]
    for number, (first, second) in enumerate(pairs):
        found = scanned(tmp_path / str(number), first, second, config=config)
        assert_close(found, [with_own if second is own else once])


def test_2_equal_tensors_that_nothing_ties_count_each(
    tmp_path: Path, base: State
) -> None:
    norms = [f"{layer}.input_layernorm.weight" for layer in LAYERS]
    model = base | {name: base[name] + 0.5 for name in norms}
    assert_close(scanned(tmp_path, base, model), [3 * 32 * 0.25])


# 3. Measured at the coarser of the two stored precisions.


@every_pair
def test_3_an_untouched_weight_contributes_exactly_zero(
    tmp_path: Path, base: State, of_base: torch.dtype, of_model: torch.dtype
) -> None:
    # Small numbers too: they are float16's subnormals.
    scaled = base | {UP: base[UP] * 1e-3}
    first = cast(scaled, of_base)
    untouched = cast(first, of_model)
    assert scanned(tmp_path / "1", first, untouched).tolist() == [0.0]
    touched = untouched | {UP: untouched[UP].clone()}
    touched[UP][3, 4] += 1
    found = scanned(tmp_path / "2", first, touched)
    assert_close(found, [naive_sq_norm(first[UP][3, 4], touched[UP][3, 4])])


# 4. Resized vocabularies.


def resized(state: State, rows: int) -> State:
    """The state with a larger vocabulary; new rows are far from all others."""
    more = torch.full((rows - len(state[EMBED]), 32), 5.0)
    return state | {n: torch.cat([state[n], more]) for n in (EMBED, HEAD)}


@pytest.mark.parametrize("head", [headless, with_copied_head])
def test_4_the_rows_that_both_have_of_a_tied_head_count_once(
    tmp_path: Path, base: State, models: States, head: Callable[[State], State]
) -> None:
    other = head(resized(models[0], 101))
    found = scanned(tmp_path, with_copied_head(base), other)
    assert_close(found, naive_sq_norms(headless(base), models[:1]))


@pytest.mark.parametrize("shape", [(10, 12), (7, 8), (10, 5)])
def test_4_the_overlap_where_exactly_one_axis_differs(
    tmp_path: Path, base: State, shape: tuple[int, int]
) -> None:
    name = "model.positions.weight"
    first, second = torch.randn(10, 8), torch.randn(shape)
    found = scanned(tmp_path, {**base, name: first}, {**base, name: second})
    assert_close(found, [naive_sq_norm(*common_part(first, second))])


@pytest.mark.parametrize("shape", [(11, 9), (10, 8, 1), (80,)])
def test_4_more_than_one_differing_axis_is_an_error(
    tmp_path: Path, base: State, shape: tuple[int, ...]
) -> None:
    name = "model.positions.weight"
    states = [{**base, name: torch.zeros(10, 8)}, {**base, name: torch.zeros(shape)}]
    paths = written(tmp_path, *states)
    with pytest.raises(ValueError, match=name):
        mergekit_metagpt.scan(paths[0], paths[1:])
    with pytest.raises(ValueError, match=name):
        run_mergekit(merge_config(paths[0], paths[1:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_4_other_widths_are_no_vocabulary(tmp_path: Path) -> None:
    """Heads of a set size: every tensor differs in the hidden axis, and no other."""
    for name, width in (("base", 32), ("wide", 48)):
        sizes = {"hidden_size": width, "head_dim": 8}
        write_model(tmp_path / name, llama_state(**sizes), llama_config(**sizes))
    with pytest.raises(
        ValueError, match=r"wide is not a fine-tune .* hidden_size is 48"
    ):
        mergekit_metagpt.scan(tmp_path / "base", [tmp_path / "wide"])


def test_4_a_warning_where_embeddings_hold_most_points_to_exclude(
    tmp_path: Path, base: State, models: States, caplog: Log
) -> None:
    near = tuned(base, 1, 2e-3)
    backwards = near | {name: near[name].flip(0) for name in (EMBED, HEAD)}
    first, *others = written(tmp_path, base, models[0], backwards, models[1])
    run_mergekit(merge_config(first, others), tmp_path / "1")
    (warning,) = said(caplog, "embeddings")
    remedy = "embed_tokens,lm_head"
    assert f"exclude: {remedy}" in warning
    assert [str(other) in warning for other in others] == [False, True, False]
    caplog.clear()
    config = merge_config(first, others, parameters={"exclude": remedy})
    run_mergekit(config, tmp_path / "2")
    run_mergekit(merge_config(first, [others[0], others[2]]), tmp_path / "3")
    assert not said(caplog, "embeddings")


# 5. Numbers. (Squared norms are summed wholly in float64: docs/architecture.md.)


def test_5_tiny_tensors(tmp_path: Path) -> None:
    shapes = [(), (1,), (1, 1), (2, 0, 3), (0,), (3,), (2, 5)]
    named = {f"w{k}": shape for k, shape in enumerate(shapes)}
    first, *others = relatives(2, torch.float32, named)
    paths = written(tmp_path, first, *others)
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    for name, row in zip(result.names, result.sq_norms, strict=True):
        exact = [float(exact_sq_norm(first[name], other[name])) for other in others]
        assert_close(row, exact, 1e-12)
    assert_close(result.pool("model").sq_norms, naive_sq_norms(first, others), 1e-12)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models with a tensor that the scan divides between workers."""
    folder = tmp_path_factory.mktemp("large")
    rng = torch.Generator().manual_seed(0)
    shapes = {"model.a.weight": (4100, 4099), "model.b.weight": (999, 998)}
    states: list[State] = [{}, {}, {}]
    for name, shape in shapes.items():
        # So far apart that every order of adding the squares rounds differently.
        scale = torch.randint(-12, 13, shape, generator=rng)
        for state in states:
            values = torch.randn(shape, generator=rng)
            state[name] = torch.ldexp(values, scale).bfloat16()
    return written(folder, *states)


@pytest.mark.parametrize("segment", [None, 1 << 21])
def test_5_the_same_bits_whatever_the_number_of_workers_and_threads(
    large: list[Path], segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if segment:  # many parts of one tensor, without gigabytes of it
        monkeypatch.setattr(groups, "SEGMENT", segment)
    before = torch.get_num_threads()
    results = []
    try:
        for workers, threads, gram in ((1, 1, 0), (2, 3, 0), (5, 2, 0), (2, 1, 1)):
            torch.set_num_threads(threads)
            options = {"workers": workers, "gram": bool(gram)}
            results.append(mergekit_metagpt.scan(large[0], large[1:], **options))
    finally:
        torch.set_num_threads(before)
    assert_same_results(results)


def assert_same_results(results: Sequence[mergekit_metagpt.ScanResult]) -> None:
    """Check that scans found the same bits, in all pools."""
    first = results[0]
    for result in results[1:]:
        assert result.names == first.names
        assert result.sq_norms.device.type == "cpu"
        assert_same_bits(result.sq_norms, first.sq_norms)
        for granularity in GRANULARITIES:
            pools = (r.pool(granularity).sq_norms for r in (result, first))
            assert_same_bits(*pools)


def test_5_the_same_bits_whatever_the_shard_layout(
    tmp_path: Path, base: State, models: States
) -> None:
    found, reverse = [], []
    for shards, backwards in itertools.product((1, 2, 5, len(base)), (False, True)):
        order = sorted(base, reverse=backwards)
        states = [{name: state[name] for name in order} for state in (base, *models)]
        folder = tmp_path / f"{shards}{backwards}"
        (first,) = written(folder, *states[:1])
        paths = written(folder / "tuned", *states[1:], shards=shards)
        found.append(mergekit_metagpt.scan(first, paths))
        reverse.append(mergekit_metagpt.scan(paths[0], [first, *paths[1:]]))
    assert_same_results(found)
    assert_same_results(reverse)


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_5_tensors_are_summed_in_name_order(
    tmp_path: Path, base: State, models: States, granularity: str
) -> None:
    paths = written(tmp_path, base, *models, shards=3)
    result = mergekit_metagpt.scan(paths[0], paths[1:])
    assert list(result.names) == sorted(base)
    pooled = result.pool(granularity)
    parts = [""] if granularity == "model" else pooled.keys
    sums = pooled.sq_norms.view(len(parts), -1).tolist()
    for part, found in zip(parts, sums, strict=True):
        rows = [at for at, name in enumerate(result.names) if part in name]
        assert found == [sum(column) for column in result.sq_norms[rows].T.tolist()]


def test_5_the_same_bits_whatever_device_the_merge_runs_on(
    tmp_path: Path, base: State, models: States
) -> None:
    # mergekit runs a worker per accelerator under `with torch.device(...)`.
    paths = written(tmp_path, base, *models)
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            results += [mergekit_metagpt.scan(paths[0], paths[1:])]
            results += [mergekit_metagpt.scan(paths[0], paths[1:], gram=True)]
            results[-1].pool("layer")
    assert_same_results(results)


# 6. n_t = 0.


@every_granularity
@pytest.mark.parametrize("power", [2.0, 0.5, -1.0])
def test_6_if_all_are_zero_the_base_is_returned_with_a_warning(
    tmp_path: Path, base: State, power: float, granularity: str, caplog: Log
) -> None:
    paths = written(tmp_path, base, base, base)
    config = merge_config(paths[0], paths[1:])
    config["parameters"] = {"power": power, "granularity": granularity}
    assert_same_states(run_mergekit(config, tmp_path / "out"), base)
    (warning,) = said(caplog, "base is kept")
    assert str(paths[0]) in warning


@every_granularity
def test_6_power_zero_looks_at_no_norm_and_scans_nothing(
    tmp_path: Path, base: State, models: States, granularity: str, measured: list[int]
) -> None:
    paths = written(tmp_path, base, base, *models[:2])
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"power": 0, "granularity": granularity}
    merged = run_mergekit(config, tmp_path / "out")
    assert not measured
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    assert_close(solved_coefficients(merged, base, models[:2]), third)


@pytest.mark.parametrize("power", [2.0, -1.0, -2.0])
def test_6_a_model_with_zero_gets_nothing_and_negative_power_says_so(
    tmp_path: Path, base: State, models: States, power: float, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, models[0], base, models[1])
    config = merge_config(first, others, dtype="float64", parameters={"power": power})
    merged = run_mergekit(config, tmp_path / "out")
    expected = naive_coefficients(naive_sq_norms(base, models[:2]), power=power)
    assert_close(solved_coefficients(merged, base, models[:2]), expected)
    warnings = said(caplog, "left out")
    named = [[str(other) in warning for other in others] for warning in warnings]
    assert named == [[False, True, False]] * (power < 0)


@pytest.mark.parametrize("power", [2.0, -1.0])
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-22, 1e-38])
@every_granularity
def test_6_never_an_absolute_epsilon(
    tmp_path: Path, base: State, granularity: str, size: float, power: float
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    # The same step in two directions, so that both are told apart: n is 1 : 4.
    models = [
        {name: size * k * torch.roll(t, k, -1) for name, t in base.items()}
        for k in (1, 2)
    ]
    paths = written(tmp_path, zeros, *models)
    config = merge_config(paths[0], paths[1:], dtype="float64")
    config["parameters"] = {"granularity": granularity, "power": power}
    merged = run_mergekit(config, tmp_path / "out")
    for name, tensor in merged.items():
        lambdas = naive_lambdas(
            name, zeros, models, granularity=granularity, power=power
        )
        exact = naive_merge(zeros[name], [m[name] for m in models], lambdas)
        assert (tensor - exact).abs().max() <= 1e-7 * exact.abs().max()


# 7. Degenerate results are said aloud.


def shares(base: State, wanted: Sequence[float]) -> list[State]:
    """Fine-tunes of which each one's n_t is the wanted share of the sum."""
    states = [tuned(base, k + 1) for k in range(len(wanted))]
    sq_norms = naive_sq_norms(base, states).tolist()
    return [
        {n: base[n] + (share / norm) ** 0.5 * (state[n] - base[n]) for n in base}
        for state, share, norm in zip(states, wanted, sq_norms, strict=True)
    ]


DEGENERATE = "Usual causes"


@pytest.mark.parametrize(
    ("wanted", "culprits"),
    [
        ((0.04, 0.92, 0.04), [1]),  # above nine tenths
        ((0.85, 0.12, 0.03), [2]),  # below a tenth of the average
        ((0.89, 0.11), []),
        ((0.7, 0.03, 0.13, 0.14), []),
        ((1.0,), []),
    ],
)
def test_7_one_warning_names_a_model_that_takes_nearly_all_or_nothing(
    tmp_path: Path,
    base: State,
    wanted: tuple[float, ...],
    culprits: list[int],
    caplog: Log,
) -> None:
    first, *others = written(tmp_path, base, *shares(base, wanted))
    run_mergekit(merge_config(first, others), tmp_path / "out")
    assert said(caplog, "of the whole model")
    warnings = said(caplog, DEGENERATE)
    named = [
        [k for k, other in enumerate(others) if warning.startswith(f"{other} ")]
        for warning in warnings
    ]
    assert named == ([culprits] if culprits else [])
    for warning in warnings:
        for words in ("LoRA", "wrong base", "power: 1", "weight: "):
            assert words in warning
        assert "vocabulary" not in warning and "exclude" not in warning


def test_7_the_vocabulary_is_named_where_embeddings_hold_most_of_the_norm(
    tmp_path: Path, base: State, caplog: Log
) -> None:
    small, large = shares(base, (0.5, 0.5))
    name = "model.embed_tokens.weight"
    large[name] = large[name] + 1
    first, *others = written(tmp_path, base, small, large)
    run_mergekit(merge_config(first, others), tmp_path / "out")
    (warning,) = said(caplog, DEGENERATE)
    assert warning.startswith(f"{others[1]} ")
    assert "vocabulary" in warning and "exclude: embed_tokens" in warning


@every_granularity
def test_7_once_per_merge_and_again_at_the_next(
    tmp_path: Path, base: State, granularity: str, caplog: Log
) -> None:
    first, *others = written(tmp_path, base, *shares(base, (0.98, 0.02)))
    config = merge_config(first, others, parameters={"granularity": granularity})
    for number, fresh in enumerate((True, True, False, False), 1):
        run_mergekit(config, tmp_path / str(number), fresh=fresh)
        assert len(said(caplog, DEGENERATE)) == number


def test_7_once_per_merge_however_many_slices_bases_and_models(
    tmp_path: Path, base: State, caplog: Log
) -> None:
    states = [base, *shares(base, (0.98, 0.015, 0.005))]
    paths = written(tmp_path, *states, states[0])
    slices = [
        sources(paths[:3], 0, 1),
        sources([paths[0], paths[1], paths[3]], 1, 2),
        sources([paths[4], *paths[1:3]], 2, 3, base_model=str(paths[4])),
    ]
    config = merge_config(paths[0], [], slices=slices)
    for number in (1, 2):
        run_mergekit(config, tmp_path / str(number))
        assert len(said(caplog, DEGENERATE)) == number
