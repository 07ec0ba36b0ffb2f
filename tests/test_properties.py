"""Thousands of drawn families of tensors: what must hold for any of them."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_state_dicts

from mergekit_metagpt.arithmetic.closed_form import coefficients
from mergekit_metagpt.arithmetic.scaled_sums import scaled_sum
from mergekit_metagpt.arithmetic.squared_norms import sq_norms
from tests.oracle import (
    ORDER,
    assert_same_bits,
    assert_unchanged,
    assert_within_bound_exactly,
    exact_shares,
    exact_sq_norm,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "_silent")

F64, F32, F16, BF16 = ORDER

# Exponents of the smallest and the largest numbers of each precision.
ENDS = {F64: (-1074, 1023), F32: (-149, 127), F16: (-24, 15), BF16: (-133, 127)}
# In float64 nothing is wider: squares must stay within its range, and differences.
SQUARES = {**ENDS, F64: (-480, 480)}
DIFFERENCES = {**ENDS, F64: (-1074, 1000)}

SHAPES = [(), (0,), (1,), (7,), (3, 4), (2, 0, 3), (2, 3, 4), (1, 17), (19, 1)]
LAYOUTS = ["contiguous", "transposed", "every other", "offset"]
KINDS = ["free", "free", "near", "far", "base", "equal", "opposite", "ends"]


def cases(count: int) -> Callable[[Any], Any]:
    """Run a property for so many drawn cases, the same ones every time."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _silent() -> Any:
    """No line for each of thousands of merges."""
    logger = logging.getLogger("mergekit_metagpt")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


# ---- what is drawn


@dataclass(frozen=True)
class Relatives:
    """One tensor of a base and of its fine-tunes.

    Attributes:
        base: theta_0.
        tuned: the K models'.
        same: where no model differs from the base.
    """

    base: torch.Tensor
    tuned: tuple[torch.Tensor, ...]
    same: torch.Tensor


def stored(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """The numbers in that precision, those beyond it at its ends."""
    exact = torch.tensor(values, dtype=F64)
    return torch.nan_to_num(exact.to(dtype))


def laid(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        axes = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(axes).contiguous().permute(axes)
    if layout == "every other" and tensor.ndim:
        return torch.stack([tensor, -tensor], dim=-1).flatten(-2)[..., ::2]
    if layout == "offset":
        longer = torch.cat([tensor.new_ones(3), tensor.flatten()])
        return longer[3:].view(tensor.shape)
    return tensor


class Numbers:
    """Draws numbers of one precision from a window of its exponents."""

    def __init__(self, rng: random.Random, ends: tuple[int, int], width: int) -> None:
        self.rng = rng
        self.ends = ends
        self.low = rng.randint(ends[0], max(ends[0], ends[1] - width))
        self.high = min(self.low + width, ends[1])

    def one(self) -> float:
        if self.rng.random() < 0.1:
            return self.rng.choice([0.0, -0.0])
        size = math.ldexp(1 + self.rng.random(), self.rng.randint(self.low, self.high))
        return self.rng.choice([-1, 1]) * min(size, math.ldexp(1, self.ends[1]))

    def far(self) -> float:
        size = math.ldexp(1 + self.rng.random(), self.rng.randint(*self.ends) - 1)
        return self.rng.choice([-1, 1]) * size


def related(
    kind: str, base: list[float], first: list[float], numbers: Numbers, eps: float
) -> list[float]:
    """A model's numbers, by the kind of its task vector."""
    rng = numbers.rng
    if kind == "near":
        return [b * (1 + eps * rng.randint(-3, 3)) for b in base]
    if kind == "far":
        return [numbers.far() for _ in base]
    if kind == "base":
        return list(base)
    if kind == "equal":
        return list(first)
    if kind == "opposite":
        return [b - (f - b) for b, f in zip(base, first, strict=True)]
    if kind == "ends":
        low, high = numbers.ends
        largest, smallest = math.ldexp(2 - eps, high), math.ldexp(1, low)
        ends = [largest, -largest, smallest, -smallest, 0.0, -0.0]
        return [rng.choice(ends) for _ in base]
    return [numbers.one() for _ in base]


@st.composite
def relatives(
    draw: st.DrawFn,
    *,
    ends: Mapping[torch.dtype, tuple[int, int]] = SQUARES,
    dtypes: Sequence[torch.dtype] = ORDER,
    kinds: Sequence[str] = KINDS,
    most: int = 6,
    mixed: bool = False,
) -> Relatives:
    """A base and its fine-tunes, of one precision or each of its own."""
    dtype = draw(st.sampled_from(list(dtypes)))
    shape = draw(st.sampled_from(SHAPES))
    chosen = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=most))
    spread = draw(st.sampled_from([0, 3, 24, 2100]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    numbers = Numbers(rng, ends[dtype], spread)
    numel = math.prod(shape)
    drawn = [numbers.one() for _ in range(numel)]
    base = stored(drawn, dtype)
    exact = base.double().tolist()
    same = torch.tensor([rng.random() < 0.2 for _ in range(numel)], dtype=torch.bool)
    first: list[float] = [numbers.one() for _ in range(numel)]
    tuned = []
    for kind in chosen:
        values = related(kind, exact, first, numbers, torch.finfo(dtype).eps)
        other = draw(st.sampled_from(ORDER)) if mixed else dtype
        model = torch.where(same, base, stored(values, dtype)).to(other)
        model = torch.nan_to_num(model)
        tuned.append(model)
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    return Relatives(
        laid(base.view(shape), layouts[0]),
        tuple(laid(t.view(shape), layouts[k % 2]) for k, t in enumerate(tuned)),
        same.view(shape),
    )


@st.composite
def factors(draw: st.DrawFn, count: int, *, convex: bool = False) -> torch.Tensor:
    """Coefficients: shares that sum to 1, shares of very different size, or any."""
    kinds = ["even", "uneven", "one", *(["scaled", "signed"] if not convex else [])]
    kind = draw(st.sampled_from(kinds))
    rng = random.Random(draw(st.integers(0, 2**32)))
    if kind == "signed":
        values = [rng.uniform(-3, 3) for _ in range(count)]
        return torch.tensor(values, dtype=F64)
    raw = [rng.random() + 1e-3 for _ in range(count)]
    if kind == "uneven":
        raw = [value * 10.0 ** -rng.randint(0, 24) for value in raw]
    if kind == "one":
        raw = [float(k == 0) for k in range(count)]
    shares = torch.tensor(raw, dtype=F64)
    return shares / shares.sum() * (rng.uniform(-2, 4) if kind == "scaled" else 1.0)


def assert_merged(
    merged: torch.Tensor, drawn: Relatives, shares: Sequence[Fraction]
) -> None:
    assert_within_bound_exactly(merged, drawn.base, drawn.tuned, shares)
    assert_same_bits(merged[drawn.same], drawn.base[drawn.same])


# ---- squared norms and coefficients


SMALLER = {**ENDS, F64: (-120, 120), F32: (-120, 120)}


@given(st.one_of(relatives(), relatives(mixed=True, ends=SMALLER)))
@cases(1100)
def test_squared_norms_are_exact_to_1e_12(drawn: Relatives) -> None:
    """Also between precisions."""
    with assert_unchanged([drawn.base, *drawn.tuned]):
        found = sq_norms(drawn.base, drawn.tuned)
    exact = [exact_sq_norm(drawn.base, model) for model in drawn.tuned]
    assert found.dtype == F64 and found.shape == (len(exact),)
    for got, expected in zip(found.tolist(), exact, strict=True):
        assert math.isfinite(got)
        error = abs(Fraction(got) - expected)
        assert error <= Fraction(1e-12) * expected, (got, expected)


@given(relatives())
@cases(400)
def test_coefficients_are_shares_of_the_squared_norms(drawn: Relatives) -> None:
    norms = sq_norms(drawn.base, drawn.tuned)
    assume(bool(norms.any()))
    found = coefficients(norms)
    assert bool((found >= 0).all()) and bool((found[norms == 0] == 0).all())
    assert found.sum().item() == pytest.approx(1, rel=1e-14)
    exact = exact_shares([exact_sq_norm(drawn.base, model) for model in drawn.tuned])
    for got, wanted in zip(found.tolist(), exact, strict=True):
        smallest = Fraction(2) ** -1022  # below it float64 itself has fewer bits
        assert abs(Fraction(got) - wanted) <= Fraction(1e-7) * max(wanted, smallest)


# Far enough from both ends that a common factor neither over- nor underflows.
MIDDLE = {F64: (-200, 200), F32: (-60, 60), F16: (-3, 3), BF16: (-60, 60)}
REACH = {F64: 200, F32: 30, F16: 5, BF16: 30}
# Without task vectors that reach to the ends.
INNER = ["free", "near", "base", "equal"]


@given(relatives(ends=MIDDLE, kinds=INNER), st.data())
@cases(300)
def test_a_common_power_of_two_changes_no_bit_of_the_merge(
    drawn: Relatives, data: st.DataObject
) -> None:
    factor = math.ldexp(1, data.draw(st.integers(0, REACH[drawn.base.dtype])))
    lambdas = data.draw(factors(len(drawn.tuned), convex=True))
    merged = scaled_sum(drawn.base, drawn.tuned, lambdas)
    larger = [tensor * factor for tensor in drawn.tuned]
    moved = scaled_sum(drawn.base * factor, larger, lambdas)
    info = torch.finfo(merged.dtype)
    # A zero that subnormal numbers were rounded to need not stay one.
    zero = torch.stack([drawn.base, *drawn.tuned]).abs().amax(dim=0) == 0
    normal = (merged.abs() >= 2 * info.tiny / info.eps) | zero
    assert_same_bits(moved[normal], (merged * factor)[normal])


# ---- the scaled sum


@given(relatives(ends=DIFFERENCES), st.booleans(), st.data())
@cases(1500)
def test_merged_elements_are_within_the_bound(
    drawn: Relatives, recording: bool, data: st.DataObject
) -> None:
    """Also where gradients are recorded."""
    lambdas = data.draw(factors(len(drawn.tuned)))
    base = drawn.base.detach().clone().requires_grad_() if recording else drawn.base
    with assert_unchanged([base, *drawn.tuned, lambdas]):
        merged = scaled_sum(base, drawn.tuned, lambdas).detach()
    assert_merged(merged, drawn, [Fraction(value) for value in lambdas.tolist()])


@given(relatives(ends={**ENDS, F64: (-1074, 1020)}), st.data())
@cases(600)
def test_finite_weights_never_make_nan_or_infinity(
    drawn: Relatives, data: st.DataObject
) -> None:
    lambdas = data.draw(factors(len(drawn.tuned), convex=True))
    merged = scaled_sum(drawn.base, drawn.tuned, lambdas)
    assert bool(torch.isfinite(merged).all())
    highest = torch.stack([drawn.base, *drawn.tuned]).double().abs().amax(dim=0)
    # Between the weights, but for one step of the precision.
    step = torch.finfo(merged.dtype).eps * highest
    smallest = math.ldexp(1, ENDS[merged.dtype][0])
    assert bool((merged.double().abs() <= highest + step + smallest).all())


# ---- the method in memory


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Relatives], torch.dtype]:
    """A few tensors of one precision and number of models."""
    dtype = draw(st.sampled_from(ORDER))
    count = draw(st.integers(1, 5))
    found = {}
    for number in range(draw(st.integers(1, 3))):
        one = draw(relatives(dtypes=[dtype], ends=MIDDLE, kinds=INNER, most=count))
        tuned = (one.tuned * count)[:count]
        name = f"model.layers.{number}.weight"
        found[name] = Relatives(one.base, tuned, one.same)
    return found, dtype


def merged_in_memory(
    drawn: Mapping[str, Relatives], **parameters: Any
) -> dict[str, torch.Tensor]:
    """Merge by the registered method."""
    count = len(next(iter(drawn.values())).tuned)
    states = {"base": {name: one.base for name, one in drawn.items()}}
    for k in range(count):
        states[f"tuned{k}"] = {name: one.tuned[k] for name, one in drawn.items()}
    tensors = [tensor for state in states.values() for tensor in state.values()]
    with assert_unchanged(tensors):
        return merge_state_dicts(
            states, "metagpt", base="base", parameters=parameters or None
        )


@given(models(), st.sampled_from(["model", "layer", "tensor"]))
@cases(500)
def test_the_method_merges_within_the_bound(
    drawn: tuple[dict[str, Relatives], torch.dtype], granularity: str
) -> None:
    tensors, dtype = drawn
    merged = merged_in_memory(tensors, granularity=granularity)
    own = {
        name: [exact_sq_norm(one.base, model) for model in one.tuned]
        for name, one in tensors.items()
    }
    whole = [sum(norms, Fraction(0)) for norms in zip(*own.values(), strict=True)]
    assert list(merged) == list(tensors)
    for name, one in tensors.items():
        assert merged[name].dtype == dtype
        norms = whole if granularity == "model" else own[name]
        if any(norms) and min(norm for norm in norms if norm) < max(norms) / 2**120:
            continue  # see the regression tests below
        assert_merged(merged[name], one, exact_shares(norms))


@given(models(), st.floats(-6, 6), st.floats(-3, 3))
@cases(200)
def test_the_method_makes_no_nan_for_any_power(
    drawn: tuple[dict[str, Relatives], torch.dtype], power: float, scale: float
) -> None:
    tensors, _ = drawn
    merged = merged_in_memory(tensors, power=power, **{"lambda": scale})
    for name, tensor in merged.items():
        assert bool(torch.isfinite(tensor).all()), name


# ---- found by these properties


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_coefficients_below_the_range_of_float32(dtype: torch.dtype) -> None:
    """One model moved one weight 2^77 times as far as the other moved another one."""
    base = torch.zeros(2, dtype=dtype)
    near, far = base.clone(), base.clone()
    near[1], far[0] = 2.0**50, 2.0**127
    lambdas = coefficients(sq_norms(base, [near, far]))
    shares = [Fraction(value) for value in lambdas.tolist()]
    merged = scaled_sum(base, [near, far], lambdas)
    assert_within_bound_exactly(merged, base, [near, far], shares)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("factor", "exponent"), [(1e-40, 100), (3e-46, 120), (1e39, -120), (1e60, -120)]
)
def test_coefficients_beyond_the_range_of_float32(
    factor: float, exponent: int, dtype: torch.dtype
) -> None:
    step = 2.0 ** (-20 if dtype == F16 else exponent)
    base = torch.zeros(3, dtype=dtype)
    model = torch.tensor([step, -step, 0.0], dtype=dtype)
    merged = scaled_sum(base, [model], torch.tensor([factor], dtype=F64))
    assert_within_bound_exactly(merged, base, [model], [Fraction(factor)])


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_differences_beyond_float64_are_refused(power: float) -> None:
    """What holds near the end of float64: an error, never NaN."""
    largest = torch.finfo(F64).max
    base = torch.tensor([-largest, 1.0], dtype=F64)
    tuned = torch.tensor([largest, 1.0], dtype=F64)
    drawn = {"w": Relatives(base, (tuned, -tuned), torch.tensor([False, True]))}
    with pytest.raises(ValueError, match="exceeds float64"):
        merged_in_memory(drawn, power=power)
