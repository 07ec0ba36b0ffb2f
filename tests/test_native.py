"""The compiled loops: built, the same bits everywhere, and never a wild address."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mergekit_metagpt.arithmetic import compiled, scaled_sums, squared_norms
from tests.oracle import ORDER, assert_same_bits, assert_unchanged, bits

SOURCE = Path(compiled.__file__).with_name("loops.c")
COMPILER = shutil.which("cc")
HALVES = (torch.float16, torch.bfloat16)

needs_loops = pytest.mark.skipif(
    not compiled.built(), reason="the loops were not compiled when this was installed"
)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_the_loops_are_built_where_there_is_a_compiler() -> None:
    assert compiled.built()


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of 16 bits, in order."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(dtype)
    return numbers[numbers.isfinite()].sort().values


@needs_loops
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tilt", [0.0, 2.0**-20, -(2.0**-20)])
def test_results_are_rounded_to_the_nearest_ties_to_even(
    dtype: torch.dtype, tilt: float
) -> None:
    """Every midpoint of two neighbours, and points a little off on either side."""
    numbers = every_number(dtype)
    below, above = numbers[:-1].contiguous(), numbers[1:].contiguous()
    factors = (0.5 - tilt, 0.5 + tilt)
    out = torch.empty_like(below)
    compiled.scaled_sum(None, [below, above], factors, out, narrow=True)
    exact = factors[0] * below.float() + factors[1] * above.float()
    assert bits(out).equal(bits(exact.to(dtype)))


@needs_loops
@pytest.mark.parametrize("dtype", HALVES)
def test_results_beyond_the_range_are_infinite(dtype: torch.dtype) -> None:
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    out = torch.empty_like(largest)
    compiled.scaled_sum(None, [largest, -largest], (2.0, 0.0), out, narrow=True)
    assert out.eq(torch.inf).all()
    compiled.scaled_sum(None, [largest, largest], (torch.nan, 0.5), out, narrow=True)
    assert out.isnan().all()


@needs_loops
@pytest.mark.parametrize("dtype", ORDER)
@pytest.mark.parametrize("numel", [1, 7, 512, 513, 5000])
def test_bytes_beside_the_output_stay(dtype: torch.dtype, numel: int) -> None:
    room = torch.full((numel + 64,), 7, dtype=dtype)
    models = [torch.randn(numel).to(dtype) for _ in range(3)]
    factors = (0.2, 0.3, 0.5)
    for base in (None, models[0]):
        out = room[32 : 32 + numel]
        compiled.scaled_sum(base, models, factors, out, narrow=dtype != torch.float64)
    assert room[:32].eq(7).all() and room[32 + numel :].eq(7).all()


@needs_loops
@pytest.mark.parametrize("dtype", ORDER)
def test_values_may_lie_at_any_address(dtype: torch.dtype) -> None:
    """As in a file whose header has an odd length, and in views that torch negates."""
    base, *tuned = (torch.randn(1000).to(dtype) for _ in range(3))
    shifted = []
    for tensor in (base, *tuned):
        stored = bytearray(b"?" + tensor.view(torch.uint8).numpy().tobytes())
        shifted.append(torch.frombuffer(stored, dtype=dtype, offset=1))
    assert shifted[0].data_ptr() % dtype.itemsize or dtype.itemsize == 1
    negated = [torch._neg_view(-tensor) for tensor in (base, *tuned)]
    lambdas = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for first, *others in (shifted, negated):
        with assert_unchanged([first, *others]):
            assert squared_norms.flat_sq_norms(first, others) == compiled.sq_norms(
                base, tuned
            )
            assert_same_bits(
                scaled_sums.scaled_sum(first, others, lambdas),
                scaled_sums.scaled_sum(base, tuned, lambdas),
            )


@needs_loops
def test_what_the_loops_do_not_serve() -> None:
    single, half = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)
    assert compiled.serves(single, single) and compiled.serves(half)
    assert not compiled.serves(single, half)
    assert not compiled.serves(torch.ones(4, dtype=torch.int32))
    assert not compiled.serves(torch.ones(4, device="meta"))


@needs_loops
def test_wrong_arguments_are_errors() -> None:
    loops, tensor = compiled._loops, torch.ones(8)
    at = tensor.data_ptr()
    with pytest.raises(ValueError, match="dtype"):
        loops.sq_norms(4, at, (at,), 8, False)
    with pytest.raises(ValueError, match="size"):
        loops.sq_norms(1, at, (at,), -1, False)
    with pytest.raises((TypeError, SystemError)):
        loops.sq_norms(1, at, [at], 8, False)
    with pytest.raises(TypeError):
        loops.sq_norms(1, at, ("address",), 8, False)
    with pytest.raises(ValueError, match="factor"):
        loops.scaled_sum(1, at, (at, at), (1.0,), 8, True, at)
    with pytest.raises(ValueError, match="summand"):
        loops.scaled_sum(1, None, (), (), 8, True, at)
    assert loops.sq_norms(1, at, (), 8, False) == []
    assert loops.sq_norms(1, at, (), 8, True) == [8.0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The same loops as they are written: not optimised, for no special processor."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    name = "_mergekit_metagpt"
    file = tmp_path_factory.mktemp("plain") / f"{name}.abi3.so"
    options = ["-std=c99", "-O0", "-ffp-contract=off", "-fPIC", "-shared"]
    include = sysconfig.get_path("include")
    written = SOURCE.read_text().replace("__GLIBC__", "NO_COPIES_OF_LOOPS")
    (file.parent / "loops.c").write_text(written)
    subprocess.run(
        [COMPILER, *options, "-I", include, file.parent / "loops.c", "-o", file],
        check=True,
    )
    loader = importlib.machinery.ExtensionFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@needs_loops
@pytest.mark.parametrize("dtype", ORDER)
@pytest.mark.parametrize("numel", [0, 1, 31, 33, 1000, 70_001])
def test_bits_are_those_of_the_loops_as_they_are_written(
    dtype: torch.dtype, numel: int, plain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever instructions this processor's copy of a loop is made of."""
    drawn = torch.Generator().manual_seed(numel)
    base, *tuned = (torch.randn(numel, generator=drawn).to(dtype) for _ in range(4))
    summed = [0.5, 0.25, 0.25]

    def results() -> list[torch.Tensor]:
        sums = compiled.sq_norms(base, tuned, own=True)
        norms = torch.tensor(sums, dtype=torch.float64)
        merged = [
            scaled_sums.scaled_sum(base, tuned, torch.tensor(f, dtype=torch.float64))
            for f in (summed, [0.3, 0.1, 1.1], [1e-40, 0.5, 0.5])
        ]
        return [norms, *merged]

    optimised = results()
    monkeypatch.setattr(compiled, "_loops", plain)
    for ours, expected in zip(optimised, results(), strict=True):
        assert_same_bits(ours, expected)
