"""The loops over elements against naive float64, on every kind of tensor there is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch

from mergekit_metagpt.arithmetic import compiled
from mergekit_metagpt.arithmetic.in_parts import CHUNK
from mergekit_metagpt.arithmetic.scaled_sums import merged_and_finite, scaled_sum
from mergekit_metagpt.arithmetic.squared_norms import (
    coarser_dtype,
    gram_matrix,
    sq_norms,
)
from tests.oracle import (
    ORDER,
    assert_same_bits,
    assert_unchanged,
    assert_within_bound,
    assert_within_bound_exactly,
    bits,
    coarser,
    naive_sq_norm,
)

F64, F32, F16, BF16 = ORDER
COUNTS = [1, 2, 3, 12]
MOST = max(COUNTS)
SQ_NORM_RTOL = 1e-12


@pytest.fixture(params=["compiled", "by torch"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on the compiled loops, and as where nothing was compiled."""
    if request.param == "by torch":
        monkeypatch.setattr(compiled, "_loops", None)
    elif not compiled.built():
        pytest.skip("the loops were not compiled when this was installed")


# --- the menagerie -------------------------------------------------------------------


class Specimen(NamedTuple):
    """A base and its fine-tunes, `MOST` at most, of one dtype and shape."""

    base: torch.Tensor
    tuned: tuple[torch.Tensor, ...]

    def by_count(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Numbers of models to merge."""
        for count in COUNTS:
            if count <= len(self.tuned):
                yield self.tuned[:count]


Maker = Callable[[torch.device], Specimen]


def noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def stored(
    base: torch.Tensor,
    tuned: Iterable[torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Specimen:
    moved = tuple(tensor.to(device, dtype) for tensor in tuned)
    return Specimen(base.to(device, dtype), moved)


def usual(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    size: float = 1.0,
    step: float = 1e-2,
    count: int = MOST,
) -> Specimen:
    """Random weights with steps of increasing length; the third equals the base."""
    base = size * noise(shape, 0)
    taus = [size * step * (k + 1) * noise(shape, k + 1) for k in range(count)]
    taus[2] = torch.zeros_like(base)
    return stored(base, (base + tau for tau in taus), dtype, device)


def relaid(
    layout: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    device: torch.device,
) -> Specimen:
    """Views that are not contiguous; the base and every other fine-tune."""
    base, tuned = usual(shape, F32, device)
    views = [layout(tensor) for tensor in tuned]
    views[::2] = [view.contiguous() for view in views[::2]]
    return Specimen(layout(base), tuple(views))


def constants(dtype: torch.dtype, device: torch.device) -> Specimen:
    """Every element of a tensor is the same number."""
    base, eps = torch.ones(777, dtype=F64), torch.finfo(dtype).eps
    return stored(base, (base + eps * 2**k for k in range(MOST)), dtype, device)


def subnormal(dtype: torch.dtype, device: torch.device) -> Specimen:
    """Numbers below the smallest normal one, down to the smallest there is."""
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    base = smallest * torch.tensor([0, 1, -1, 3, 60, -60, 7, 0], dtype=F64)
    steps = smallest * torch.tensor([1, 1, -1, 2, 0, 5, -7, 0], dtype=F64)
    return stored(base, (base + steps * (k % 4) for k in range(MOST)), dtype, device)


def enormous(dtype: torch.dtype, device: torch.device) -> Specimen:
    """Differences beyond the dtype (and float32), with merges that are finite."""
    # Even the differences stay finite in float64: nothing is wider.
    largest = torch.finfo(dtype).max / (4 if dtype == F64 else 1)
    base = [-1, -0.9, 1, 0.5, 1e-3, 0]
    tuned = [1, 0.9, -1, 0.5, -1, 1], [-1, -0.8, 1, 0.7, 1, 0], [1] * 6
    rows = largest * torch.tensor([base, *tuned], dtype=F64)
    return stored(rows[0], [*rows[1:]] * (MOST // 3), dtype, device)


def signed_zeros(device: torch.device) -> Specimen:
    base = torch.tensor([-0.0, 0.0, -0.0, 0.0, 1.0])
    tuned = torch.tensor([-0.0, 0.0, 0.0, -0.0, 1.0])
    return stored(base, [tuned, base] * (MOST // 2), F32, device)


def uneven(device: torch.device) -> Specimen:
    """Magnitudes from 1e-20 to 1e20 side by side, steps far below and far above."""
    base = 10 ** torch.linspace(-20, 20, 500, dtype=F64) * noise((500,), 5).sign()
    steps = [1e-7, 1.0, 1e7, 0.0] * (MOST // 4)
    tuned = (base * (1 + s * noise((500,), k)) for k, s in enumerate(steps))
    return stored(base, tuned, F32, device)


MENAGERIE: dict[str, Maker] = {
    **{
        name: functools.partial(usual, shape, dtype)
        for name, shape, dtype in [
            ("ordinary", (30, 40), F32),
            ("scalar", (), F32),
            ("one element", (1,), BF16),
            ("empty", (0,), F32),
            ("empty matrix", (3, 0), BF16),
            ("four axes", (2, 3, 4, 5), F16),
        ]
    },
    "far from zero": functools.partial(usual, (1000,), F32, size=1e6, step=1e-6),
    **{
        name: functools.partial(relaid, layout, shape)
        for name, layout, shape in [
            ("transposed", torch.t, (20, 31)),
            ("every other column", lambda t: t[:, ::2], (20, 31)),
            ("expanded", lambda t: t.expand(50, 31), (1, 31)),
            ("expanded scalar", lambda t: t.expand(4, 5), ()),
            ("channels last", lambda t: t.permute(0, 3, 1, 2), (2, 3, 4, 5)),
            ("a slice at an offset", lambda t: t[7:19, 3:], (20, 31)),
        ]
    },
    "signed zeros": signed_zeros,
    "uneven": uneven,
    **{
        name: functools.partial(usual, shape, dtype, count=3)
        for name, shape, dtype in [
            ("one less than a chunk", (CHUNK - 1,), F32),
            ("a whole chunk", (CHUNK,), BF16),
            ("one more than a chunk", (CHUNK + 1,), F16),
            ("two chunks and a bit", (2, CHUNK + 3), F32),
        ]
    },
    **{
        f"{name}, {dtype}": functools.partial(maker, dtype)
        for name, maker in {
            "random": functools.partial(usual, (37, 11)),
            "constant": constants,
            "subnormal": subnormal,
            "enormous": enormous,
        }.items()
        for dtype in ORDER
    },
}
LARGE = [name for name in MENAGERIE if "chunk" in name]
SMALL = [
    name for name in MENAGERIE if name.startswith(("subnormal", "enormous", "signed"))
]


@functools.cache
def caught(name: str, device: torch.device) -> Specimen:
    return MENAGERIE[name](device)


@pytest.fixture(params=list(MENAGERIE))
def specimen(request: pytest.FixtureRequest, device: torch.device) -> Specimen:
    return caught(request.param, device)


def is_subnormal(base: torch.Tensor) -> bool:
    largest = float(base.abs().max()) if base.numel() else 0.0
    return 0 < largest < torch.finfo(base.dtype).tiny


def shares(count: int, *, seed: int = 0) -> torch.Tensor:
    """Coefficients that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(count, generator=generator, dtype=F64, device="cpu")
    return (raw + 0.05) / (raw + 0.05).sum()


@pytest.mark.parametrize("dtype", compiled.DTYPES)
@pytest.mark.parametrize("size", [1, 700, 1 << 21])
def test_a_result_that_is_not_finite_is_told(dtype: torch.dtype, size: int) -> None:
    """The largest number, and what is rounded to it, are finite."""
    largest = torch.finfo(dtype).max
    one = torch.ones(1, dtype=F64)
    base, tuned = torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)
    assert merged_and_finite(base, [tuned], one)[1]
    for value, factor, finite in (
        (largest, 1.0, True),
        (-largest, 1.0, True),
        (largest, 1.0 + 2**-12 if dtype == torch.float16 else 1.0, True),
        (largest, 1.01, False),
        (largest, -2.0, False),
        (float("nan"), 1.0, False),
        (float("-inf"), 1.0, False),
    ):
        tuned[-1] = value
        merged, told = merged_and_finite(base, [tuned], factor * one)
        assert told == finite == bool(torch.isfinite(merged).all()), (value, factor)


def assert_measured(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> None:
    """Compare with the one-liners in float64; an overflow of float64 is one too."""
    found, gram = sq_norms(base, tuned), gram_matrix(base, tuned)
    expected = torch.tensor([naive_sq_norm(base, t) for t in tuned], dtype=F64)
    assert found.dtype == gram.dtype == F64
    assert found.device.type == gram.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=SQ_NORM_RTOL, atol=0)
    assert_same_bits(gram, gram.T.contiguous())
    assert_same_bits(gram.diagonal(), found)
    precisions = [coarser(base.dtype, model.dtype) for model in tuned]
    taus = torch.stack(
        [
            (model.to(dtype).double() - base.to(dtype).double()).flatten().cpu()
            for model, dtype in zip(tuned, precisions, strict=True)
        ]
    )
    if torch.isfinite(taus @ taus.T).all():
        norms = taus.norm(dim=1)
        error = (gram - taus @ taus.T).abs()
        assert (error <= SQ_NORM_RTOL * norms[:, None] * norms[None, :]).all()


def results(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each loop makes of them."""
    merged = scaled_sum(base, tuned, shares(len(tuned)))
    return [merged, sq_norms(base, tuned), gram_matrix(base, tuned)]


# --- coarser_dtype -------------------------------------------------------------------


@pytest.mark.parametrize("first", ORDER)
@pytest.mark.parametrize("second", ORDER)
def test_the_coarser_dtype_is_the_one_of_fewer_mantissa_bits(
    first: torch.dtype, second: torch.dtype
) -> None:
    found = coarser_dtype(first, second)
    assert found == coarser_dtype(second, first) == coarser(first, second)
    assert torch.finfo(found).eps == max(
        torch.finfo(first).eps, torch.finfo(second).eps
    )


# --- squared norms and Gram matrices -------------------------------------------------


def test_norms_and_products_equal_the_naive_ones(specimen: Specimen) -> None:
    for tuned in specimen.by_count():
        assert_measured(specimen.base, tuned)


def test_a_model_that_equals_the_base_has_norm_exactly_zero(
    specimen: Specimen,
) -> None:
    base, tuned = specimen
    assert sq_norms(base, [base, base.clone()]).tolist() == [0.0, 0.0]
    gram = gram_matrix(base, [tuned[0], base.clone()])
    assert gram[1].tolist() == [0.0, 0.0]


def test_each_norm_is_independent_of_the_other_models(specimen: Specimen) -> None:
    base, tuned = specimen
    together = sq_norms(base, tuned)
    reverse = sq_norms(base, tuned[::-1])
    alone = torch.cat([sq_norms(base, [model]) for model in tuned])
    assert_same_bits(together, reverse.flip(0))
    assert_same_bits(together, alone)


def test_without_models_there_is_nothing_to_sum(device: torch.device) -> None:
    base = torch.ones(3, device=device)
    assert_same_bits(sq_norms(base, []), torch.zeros(0, dtype=F64))
    assert_same_bits(gram_matrix(base, []), torch.zeros(0, 0, dtype=F64))


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        *((dtype, shape) for dtype in ORDER for shape in ((), (0,), (33, 5))),
        (F32, (CHUNK + 1,)),
        (BF16, (CHUNK + 1,)),
    ],
)
def test_differences_are_taken_at_the_coarser_precision_of_each_pair(
    stored: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    wide = usual(shape, F64, device, count=4)
    base = wide.base.to(stored)
    tuned = [wide.tuned[k].to(dtype) for k, dtype in enumerate(ORDER)]
    with assert_unchanged([base, *tuned]):
        assert_measured(base, tuned)


@pytest.mark.parametrize("stored", ORDER)
@pytest.mark.parametrize("elsewhere", ORDER)
def test_a_weight_that_was_only_stored_differently_counts_exactly_zero(
    stored: torch.dtype, elsewhere: torch.dtype, device: torch.device
) -> None:
    # Within the range of all four, so that storing never over- or underflows.
    exponents = torch.linspace(-4, 4, 2000, dtype=F64, device=device)
    trained = 10**exponents * noise((2000,), 3).sign().to(device)
    base, model = trained.to(stored), trained.to(stored).to(elsewhere)
    assert sq_norms(base, [model]).tolist() == [0.0]
    assert sq_norms(model, [base]).tolist() == [0.0]
    moved = model.clone()
    moved[7] *= 2
    assert (sq_norms(base, [moved, model]) > 0).tolist() == [True, False]


def test_rounding_to_the_coarser_precision_never_makes_an_infinity(
    device: torch.device,
) -> None:
    base = torch.tensor([1.0, 1e5, -3e38], device=device)
    half = torch.tensor([1.0, 5e4, 0.0], dtype=F16, device=device)
    expected = 5e4**2 + float(torch.tensor(3e38)) ** 2
    assert sq_norms(base, [half, base]).tolist() == [pytest.approx(expected), 0]
    # 3.4e38 is finite in float32 and rounds to infinity in bfloat16.
    wide = torch.full((3,), torch.finfo(F32).max, device=device)
    assert torch.isfinite(sq_norms(wide, [base.to(BF16)])).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("numel", [3, CHUNK + 1])
def test_a_weight_that_is_not_finite_shows_in_its_own_norm_only(
    bad: float, dtype: torch.dtype, numel: int, device: torch.device
) -> None:
    base = torch.ones(numel, device=device)
    tuned = [base * 2, base.clone().to(dtype), base * 3]
    tuned[1][-1] = bad
    for norms in (sq_norms(base, tuned), gram_matrix(base, tuned).diagonal()):
        assert torch.isfinite(norms).tolist() == [True, False, True]
    base[-1] = bad
    assert not torch.isfinite(sq_norms(base, tuned)).any()
    assert not torch.isfinite(sq_norms(base, [base])).any()


# --- the scaled sum ------------------------------------------------------------------


recording = pytest.mark.parametrize("recording", [False, True])


@recording
def test_every_element_of_a_merge_is_within_the_bound(
    specimen: Specimen, recording: bool
) -> None:
    base, leaf = specimen.base, specimen.base.detach().clone()
    leaf.requires_grad_(recording)
    for tuned in specimen.by_count():
        lambdas = shares(len(tuned))
        with assert_unchanged([leaf, base, *tuned, lambdas]):
            merged, norms = scaled_sum(leaf, tuned, lambdas), sq_norms(leaf, tuned)
        assert merged.requires_grad == norms.requires_grad == recording
        assert (merged.dtype, merged.shape) == (base.dtype, base.shape)
        assert merged.device == base.device
        torch.testing.assert_close(
            norms.detach(), sq_norms(base, tuned), rtol=SQ_NORM_RTOL, atol=0
        )
        if not is_subnormal(base):  # for these see the exact test below
            assert_within_bound(merged.detach(), base, tuned, lambdas)


@recording
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SMALL)
def test_the_bound_holds_exactly_at_the_ends_of_each_range(
    name: str, count: int, recording: bool, device: torch.device
) -> None:
    base, tuned = caught(name, device)
    leaf = base.clone().requires_grad_(recording)
    # Of 16 bits, sums are formed in a dtype that reaches further down than they.
    low = base.dtype in (F64, F32)
    for seed in range(8):
        lambdas = shares(count, seed=seed)
        merged = scaled_sum(leaf, tuned[:count], lambdas).detach()
        assert torch.isfinite(merged).all()
        exact = [Fraction(factor) for factor in lambdas.tolist()]
        assert_within_bound_exactly(merged, base, tuned[:count], exact, underflow=low)
    merged = scaled_sum(leaf, [base] * count, shares(count)).detach()
    assert_same_bits(merged, base)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.7, -0.5, 1e-8])
@pytest.mark.parametrize("name", ["ordinary", "far from zero", "uneven", "random, "])
def test_the_bound_holds_for_coefficients_of_any_sum(
    name: str, scale: float, device: torch.device
) -> None:
    for full in (n for n in MENAGERIE if n.startswith(name)):
        base, tuned = caught(full, device)
        for count in COUNTS:
            lambdas = scale * shares(count)
            merged = scaled_sum(base, tuned[:count], lambdas)
            assert_within_bound(merged, base, tuned[:count], lambdas)


def test_an_element_that_no_model_changed_keeps_its_bits(specimen: Specimen) -> None:
    base = specimen.base
    for tuned in specimen.by_count():
        for lambdas in (shares(len(tuned)), -0.7 * shares(len(tuned))):
            assert_same_bits(scaled_sum(base, [base] * len(tuned), lambdas), base)
            merged = scaled_sum(base, tuned, lambdas)
            same = torch.stack([model == base for model in tuned]).all(dim=0)
            assert_same_bits(merged[same], base[same])


@pytest.mark.parametrize("dtype", ORDER)
def test_every_number_of_16_bits_survives_an_idle_merge(
    dtype: torch.dtype, device: torch.device
) -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(BF16 if dtype in (F32, F64) else dtype).to(device)
    base = numbers[torch.isfinite(numbers)].to(dtype)
    models = [base.clone() for _ in range(3)]
    assert_same_bits(scaled_sum(base, models, shares(3)), base)


def test_coefficients_of_zero_or_no_models_leave_the_base(
    specimen: Specimen,
) -> None:
    base, tuned = specimen
    idle = torch.zeros(3, dtype=F64)
    for merged in (
        scaled_sum(base, [], idle[:0]),
        scaled_sum(base, tuned[:3], idle),
        scaled_sum(base, tuned[:3], -idle),
    ):
        assert_same_bits(merged, base)
        assert merged.data_ptr() != base.data_ptr() or not base.numel()


def test_twelve_models_of_more_than_a_chunk(device: torch.device) -> None:
    base, tuned = usual((CHUNK + 1,), BF16, device)
    assert_within_bound(scaled_sum(base, tuned, shares(12)), base, tuned, shares(12))
    assert_measured(base, tuned)


def test_coefficients_may_be_strided(device: torch.device) -> None:
    base, tuned = caught("ordinary", device)
    wide = torch.tensor([[0.25, 9.0], [0.75, 9.0]], dtype=F64)
    assert_same_bits(
        scaled_sum(base, tuned[:2], wide[:, 0]),
        scaled_sum(base, tuned[:2], wide[:, 0].contiguous()),
    )


def test_one_bad_element_spoils_no_other(device: torch.device) -> None:
    base, tuned = usual((1000,), F32, device)
    models = [tensor.clone() for tensor in tuned[:3]]
    models[1][10], models[2][20] = math.nan, math.inf
    merged = scaled_sum(base, models, shares(3))
    assert torch.isnan(merged[10])
    assert torch.isinf(merged[20])
    good = torch.isfinite(models[1]) & torch.isfinite(models[2])
    assert_within_bound(
        merged[good], base[good], [model[good] for model in models], shares(3)
    )


# --- memory, devices, threads --------------------------------------------------------


def test_inputs_are_borrowed_and_results_have_memory_of_their_own(
    specimen: Specimen,
) -> None:
    base = specimen.base
    for tuned in (specimen.tuned, specimen.tuned[:1]):
        with assert_unchanged([base, *tuned]):
            found = results(base, tuned)
            assert found[0].is_contiguous()
            for result in found:
                result.fill_(3.0)


def test_ambient_dtype_and_autocast_do_not_matter(device: torch.device) -> None:
    base, tuned = caught("ordinary", device)
    expected = results(base, tuned[:3])
    with torch.autocast(device.type, dtype=BF16):
        found = results(base, tuned[:3])
    torch.set_default_dtype(F16)
    try:
        found += results(base, tuned[:3])
    finally:
        torch.set_default_dtype(F32)
    for mine, wanted in zip(found, expected * 2, strict=True):
        assert_same_bits(mine, wanted)


@pytest.mark.parametrize("name", [*LARGE, "ordinary", "transposed"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    base, tuned = caught(name, torch.device("cpu"))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(results(base, tuned[:3]))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert_same_bits(other, first)


# --- autograd ------------------------------------------------------------------------


def test_gradients_of_the_kernels_are_those_of_the_formula(
    device: torch.device,
) -> None:
    base = noise((2, 3), 0).to(device).requires_grad_()
    tuned = [noise((2, 3), k).to(device).requires_grad_() for k in (1, 2)]
    lambdas = shares(2).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda *all_: sq_norms(all_[0], all_[1:]), (base, *tuned))
    assert check(lambda f, b, *rest: scaled_sum(b, rest, f), (lambdas, base, *tuned))
    assert check(lambda f: scaled_sum(base.detach(), tuned, f), (lambdas,))
    assert check(lambda b: scaled_sum(b, [t.detach() for t in tuned], lambdas), (base,))


@pytest.mark.parametrize("dtype", ORDER)
@pytest.mark.parametrize("shape", [(), (0, 2), (5,)])
def test_gradients_have_the_dtype_and_shape_of_their_inputs(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    base, tuned = usual(shape, dtype, device)
    leaves = [tensor.clone().requires_grad_() for tensor in (base, *tuned[:2])]
    lambdas = torch.tensor([0.25, 0.5], dtype=F64)
    scaled_sum(leaves[0], leaves[1:], lambdas).sum().backward()
    for leaf, factor in zip(leaves, (0.25, 0.25, 0.5), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, torch.full_like(leaf.detach(), factor))


def test_the_menagerie_holds_what_it_says() -> None:
    cpu = torch.device("cpu")
    for dtype in ORDER:
        base, tuned = caught(f"subnormal, {dtype}", cpu)
        assert is_subnormal(base)
        assert (bits(tuned[1]) != bits(base)).any()
    base, tuned = caught("enormous, torch.float32", cpu)
    assert not torch.isfinite(tuned[0] - base).all()
    for name in ("transposed", "every other column", "expanded", "channels last"):
        assert not caught(name, cpu).base.is_contiguous()
    assert caught("two chunks and a bit", cpu).base.numel() > 2 * CHUNK
    assert len(LARGE) == 4
    assert len(SMALL) == 9
