"""K numbers in, coefficients out: against the formula, at extremes, by properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mergekit_metagpt.arithmetic.closed_form import coefficients, contributes, cosines
from tests.oracle import assert_same_bits, assert_unchanged, exact_coefficients

F64 = torch.float64
TINIEST = 5e-324
HUGEST = 1.7e308
POWERS = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.7]

same_every_run = settings(deadline=None, derandomize=True, max_examples=80)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def assert_coefficients(found: torch.Tensor, *formula: Any) -> None:
    """Check them to 1e-10 of their size (or 1e-300, where doubles end)."""
    expected = exact_coefficients(*formula)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-300)


# --- the formula ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.5])
def test_coefficients_follow_the_formula(
    count: int, power: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(count)
    sq_norms = 10 ** (4 * torch.rand(count, generator=generator, dtype=F64) - 2)
    weight = torch.rand(count, generator=generator, dtype=F64) + 0.1
    found = coefficients(sq_norms, weight, power, scale)
    assert_coefficients(found, sq_norms.tolist(), weight.tolist(), power, scale)


def test_the_defaults_are_the_papers_shares_of_the_squared_norms() -> None:
    assert coefficients(f64(1, 3)).tolist() == [0.25, 0.75]
    assert coefficients(f64(1, 3), scale=0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_any_sequence_of_numbers(kind: Callable[[list[float]], Any]) -> None:
    found = coefficients(kind([1.0, 3.0]), kind([3.0, 1.0]))
    assert_same_bits(found, f64(0.5, 0.5))
    assert found.device.type == "cpu"
    # In float64 from the start: a number that float32 cannot hold.
    assert coefficients([1.0, 1e-12])[1].item() == pytest.approx(1e-12, rel=1e-10)
    for wrong in ([[1.0]], 1.0):
        with pytest.raises(ValueError, match="expected one value per model"):
            coefficients(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_equal_norms_share_equally(count: int, power: float) -> None:
    found = coefficients(torch.full((count,), 0.7, dtype=F64), power=power)
    assert found.tolist() == [1 / count] * count


# --- promises about types, inputs, places --------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64]
)
def test_any_number_type_gives_float64(dtype: torch.dtype) -> None:
    found = coefficients(torch.tensor([1, 3], dtype=dtype), torch.tensor([1, 1]))
    assert_coefficients(found, [1, 3], [1, 1])


def test_strided_inputs_are_read_and_left_alone() -> None:
    sq_norms, weight = f64(1, 100, 3, 100)[::2], f64(1).expand(2)
    with assert_unchanged([sq_norms, weight]):
        found = coefficients(sq_norms, weight, 1.0)
    assert_same_bits(found, coefficients(f64(1, 3), f64(1, 1), 1.0))


def test_the_result_has_its_own_memory_even_for_one_model() -> None:
    for power in (0.0, 2.0):
        sq_norms, weight = f64(1), f64(1)
        with assert_unchanged([sq_norms, weight]):
            coefficients(sq_norms, weight, power).zero_()


def test_ambient_default_device_and_dtype_do_not_matter() -> None:
    sq_norms, gram = f64(1, 3), torch.eye(2, dtype=F64)
    expected = coefficients(sq_norms, power=1.0)
    with torch.device("meta"):
        found, angles = coefficients(sq_norms, power=1.0), cosines(gram)
        marks = contributes(sq_norms, sq_norms, 2.0)
    assert found.device.type == angles.device.type == marks.device.type == "cpu"
    assert_same_bits(found, expected)
    torch.set_default_dtype(torch.float16)
    try:
        assert_same_bits(coefficients(sq_norms, power=1.0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# --- zero norms and zero weights -----------------------------------------------------


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (2.0, [0.0, 0.25, 0.75]),
        (1e-9, [0.0, 0.5, 0.5]),
        (0.0, [1 / 3, 1 / 3, 1 / 3]),
        (-1e-9, [0.0, 0.5, 0.5]),
        (-2.0, [0.0, 0.75, 0.25]),
    ],
)
def test_a_model_that_equals_the_base(power: float, expected: list[float]) -> None:
    found = coefficients(f64(0, 1, 3), power=power)
    torch.testing.assert_close(found, f64(*expected), rtol=1e-8, atol=0)
    marks = contributes(f64(0, 1, 3), f64(1, 1, 1), power)
    assert marks.tolist() == [power == 0, True, True]


@pytest.mark.parametrize("power", POWERS)
def test_a_weight_of_zero_takes_a_model_out(power: float) -> None:
    found = coefficients(f64(2, 1, 3), f64(0, 1, 1), power)
    rest = coefficients(f64(1, 3), power=power)
    assert found[0] == 0
    assert_same_bits(found[1:].clone(), rest)
    marks = contributes(f64(2, 1, 3), f64(0, 1, 1), power)
    assert marks.tolist() == [False, True, True]


@pytest.mark.parametrize("power", [-7.0, 0.0, 2.0])
@pytest.mark.parametrize("n", [TINIEST, 1.0, HUGEST])
def test_a_lone_model_has_the_whole_scale(n: float, power: float) -> None:
    assert coefficients(f64(n), power=power, scale=0.3).tolist() == [0.3]
    assert coefficients(f64(0.0), power=0.0).tolist() == [1.0]


# --- errors: the subject, what was got -----------------------------------------------


TWO = f64(1, 2)


@pytest.mark.parametrize("bad", [-1.0, -TINIEST, math.nan, math.inf, -math.inf])
def test_bad_numbers_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^sq_norms .*>= 0.*{bad}"):
        coefficients(f64(1, bad))
    with pytest.raises(ValueError, match=rf"^weight .*>= 0.*{bad}"):
        coefficients(TWO, f64(1, bad))
    for name in ("power", "scale") if not math.isfinite(bad) else ():
        with pytest.raises(ValueError, match=rf"^{name} .*finite.*{bad}"):
            coefficients(TWO, **{name: bad})


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 2)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^weight has shape .*expected"):
        coefficients(TWO, torch.ones(shape, dtype=F64))
    if len(shape) != 1:
        with pytest.raises(ValueError, match=r"^sq_norms has shape .*expected"):
            coefficients(torch.ones(shape, dtype=F64))


@pytest.mark.parametrize(
    ("sq_norms", "weight", "power"),
    [
        (f64(0, 0), f64(1, 1), 2.0),
        (f64(0, 0), f64(1, 1), -1.0),
        (f64(1, 1), f64(0, 0), 2.0),
        (f64(1, 1), f64(0, 0), 0.0),
        (f64(1, 0), f64(0, 1), 2.0),
        (f64(), f64(), 2.0),
    ],
)
def test_no_model_to_weight_is_an_error(
    sq_norms: torch.Tensor, weight: torch.Tensor, power: float
) -> None:
    assert not contributes(sq_norms, weight, power).any()
    with pytest.raises(ValueError, match="no model to weight"):
        coefficients(sq_norms, weight, power)


# --- extremes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "power", [-1e308, -1e4, -100.0, -TINIEST, TINIEST, 100.0, 1e4, 1e308]
)
@pytest.mark.parametrize(
    "sq_norms",
    [
        [TINIEST, 1.0, HUGEST],
        [1.0, 1.0 + 2**-52, 1.0 - 2**-53],
        [1e-300, 2e-300],
        [1e300, 2e300, 1e300],
        [1e-12, 1e12],
    ],
)
def test_no_power_overflows_or_underflows(power: float, sq_norms: list[float]) -> None:
    found = coefficients(f64(*sq_norms), power=power)
    assert torch.isfinite(found).all()
    assert found.sum() == pytest.approx(1, rel=1e-12)
    ones = [1.0] * len(sq_norms)
    if abs(power) <= 1e4 and 1.0 + 2**-52 not in sq_norms:
        assert_coefficients(found, sq_norms, ones, power)
    if abs(power) >= 1e4 and 1.0 + 2**-52 not in sq_norms:
        wanted = max(sq_norms) if power > 0 else min(sq_norms)
        assert (found > 0.3).tolist() == [n == wanted for n in sq_norms]


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.0])
def test_extreme_weights_do_not_overflow_either(power: float) -> None:
    for weight in ([HUGEST, HUGEST, 1.0], [TINIEST, TINIEST, TINIEST], [1e-300, 1, 1]):
        found = coefficients(f64(1, 2, 4), f64(*weight), power)
        assert_coefficients(found, [1, 2, 4], weight, power)
    norms, weight = [1e-300, 1e300], [1e300, 1e-300]  # which cancel each other
    found = coefficients(f64(*norms), f64(*weight), power)
    assert_coefficients(found, norms, weight, power)


# --- autograd ------------------------------------------------------------------------


@pytest.mark.parametrize("power", POWERS)
def test_gradients_reach_norms_and_weights(power: float) -> None:
    sq_norms = f64(0.5, 2.0, 3.0).requires_grad_()
    weight = f64(1.0, 0.5, 2.0).requires_grad_()

    def merge(n: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return coefficients(n, w, power, 1.3)

    assert torch.autograd.gradcheck(merge, (sq_norms, weight))


@pytest.mark.parametrize("power", [-40.0, 2.0, 1e308])
def test_gradients_stay_finite_with_models_left_out(power: float) -> None:
    sq_norms = f64(0.0, 1e-300, 2.0, 3.0).requires_grad_()
    weight = f64(1.0, 1.0, 0.0, 2.0).requires_grad_()
    coefficients(sq_norms, weight, power)[3].backward()
    for leaf in (sq_norms, weight):
        assert leaf.grad is not None
        assert leaf.grad[0] == leaf.grad[2] == 0
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


# --- cosines -------------------------------------------------------------------------


def random_gram(count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    taus = torch.randn(count, length, generator=generator, dtype=F64)
    return taus @ taus.T


@pytest.mark.parametrize("count", [0, 1, 2, 3, 12])
def test_cosines_follow_the_formula(count: int) -> None:
    gram = random_gram(count, 20, seed=count)
    with assert_unchanged([gram]):
        found = cosines(gram)
    lengths = gram.diagonal().sqrt()
    expected = gram / (lengths[:, None] * lengths)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)


def test_the_diagonal_of_cosines_is_one_and_all_lie_within_bounds() -> None:
    for seed in range(40):
        found = cosines(random_gram(4, 3, seed))
        assert found.diagonal().tolist() == [1.0] * 4
        assert found.abs().max() <= 1


def test_a_zero_task_vector_has_no_angle() -> None:
    tau = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=F64)
    found = cosines(tau @ tau.T)
    nowhere = [torch.isnan(row).tolist() for row in found]
    assert nowhere == [[False, True, False], [True] * 3, [False, True, False]]
    assert found[0, 2] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_cosines_of_extreme_norms(size: float) -> None:
    gram = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=F64)
    torch.testing.assert_close(cosines(2 * size * gram), gram, rtol=1e-14, atol=0)
    apart = torch.tensor([[1 / size, 0.5], [0.5, size]], dtype=F64)
    assert cosines(apart)[0, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3)])
def test_only_square_matrices_have_cosines(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"square.*got shape.*expected"):
        cosines(torch.ones(shape, dtype=F64))


# --- properties ----------------------------------------------------------------------

positive = st.floats(1e-300, 1e300)
norms = st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=6)
powers = st.floats(-50, 50)


@given(norms, powers, st.randoms(use_true_random=False))
@same_every_run
def test_coefficients_of_any_norms_and_weights(
    values: list[float], power: float, random: Random
) -> None:
    assume(any(values) and power)
    sq_norms = f64(*values)
    weight = 10 ** f64(*(random.uniform(-100, 100) for _ in values))
    found = coefficients(sq_norms, weight, power)
    moved = sq_norms > 0
    assert (found[~moved] == 0).all()
    assert_coefficients(
        found[moved], sq_norms[moved].tolist(), weight[moved].tolist(), power
    )


@given(norms, powers, st.floats(-1e6, 1e6))
@example([TINIEST, HUGEST], 2.0, 1.0)
@example([0.0, TINIEST], -1e308, -3.0)
@same_every_run
def test_coefficients_sum_to_scale(
    values: list[float], power: float, scale: float
) -> None:
    assume(any(values))
    found = coefficients(f64(*values), power=power, scale=scale)
    assert found.sum().item() == pytest.approx(scale, rel=1e-12, abs=1e-12)
    assert ((found * math.copysign(1, scale)) >= 0).all()
