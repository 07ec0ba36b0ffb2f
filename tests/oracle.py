"""The oracle: squared norms, coefficients and merges, straight from the formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import mergekit_metagpt
from tests.families import State, cast

ORDER = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    return max(first, second, key=ORDER.index)


def naive_sq_norm(base: torch.Tensor, model: torch.Tensor) -> float:
    """||model - base||^2 in float64, at the coarser of the two stored precisions.

    Between float16 and bfloat16, at what both can represent: an unchanged weight that
    float16 stores as a subnormal number has lost bits that bfloat16 keeps.
    """
    grid = [coarser(base.dtype, model.dtype)]
    if {base.dtype, model.dtype} == {torch.float16, torch.bfloat16}:
        grid = [torch.float16, torch.bfloat16]
    for dtype in grid:
        base, model = base.to(dtype), model.to(dtype)
    return float((model.double() - base.double()).square().sum())


def naive_sq_norms(base: State, models: Sequence[State]) -> torch.Tensor:
    """n_t over whole state dicts of equal names and shapes, shape `(K,)`."""
    return torch.tensor(
        [sum(naive_sq_norm(base[n], model[n]) for n in base) for model in models],
        dtype=torch.float64,
    )


def naive_coefficients(
    sq_norms: torch.Tensor,
    weight: Sequence[float] | None = None,
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """lambda * w n^(p/2) / sum w n^(p/2), straight from the formula."""
    if weight is None:
        weight = [1.0] * len(sq_norms)
    raw = torch.tensor(weight, dtype=torch.float64) * sq_norms ** (power / 2)
    return scale * raw / raw.sum()


def exact_coefficients(
    sq_norms: Sequence[float],
    weight: Sequence[float],
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """The same in 60 digits and unlimited exponents; n_t > 0 and weights > 0 only."""
    with localcontext(Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)):
        logs = [
            Decimal(w).ln() + Decimal(power) / 2 * Decimal(n).ln()
            for w, n in zip(weight, sq_norms, strict=True)
        ]
        terms = [(log - max(logs)).exp() for log in logs]
        exact = [float(Decimal(scale) * term / sum(terms)) for term in terms]
    return torch.tensor(exact, dtype=torch.float64)


def exactly(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


def exact_sq_norm(base: torch.Tensor, model: torch.Tensor) -> Fraction:
    """`naive_sq_norm` in rational numbers, of numbers of any size."""
    grid = [coarser(base.dtype, model.dtype)] if base.dtype != model.dtype else []
    if {base.dtype, model.dtype} == {torch.float16, torch.bfloat16}:
        grid = [torch.float16, torch.bfloat16]
    ends = []
    for values in (base, model):
        for dtype in grid:
            narrow = values.to(dtype)
            kept = torch.isfinite(narrow)
            values = torch.where(kept, narrow.double(), values.double())
        ends.append(exactly(values))
    return sum(((m - b) ** 2 for b, m in zip(*ends, strict=True)), Fraction(0))


def exact_shares(sq_norms: Sequence[Fraction]) -> list[Fraction]:
    """lambda of eq. 15 in rational numbers; 0 where no model moved."""
    total = sum(sq_norms, Fraction(0))
    return [norm / total if total else Fraction(0) for norm in sq_norms]


def naive_merge(
    base: torch.Tensor, models: Sequence[torch.Tensor], lambdas: torch.Tensor
) -> torch.Tensor:
    """theta_0 + sum_t lambda_t (theta_t - theta_0) in float64."""
    total = base.double()
    for factor, model in zip(lambdas, models, strict=True):
        total = total + factor * (model.double() - base.double())
    return total


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next representable number of dtype at each value, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double())
    smallest = info.tiny * info.eps
    return torch.ldexp(torch.full_like(values.double(), info.eps), exponent - 1).clamp(
        min=smallest
    )


def assert_within_bound(
    merged: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lambdas: torch.Tensor,
) -> None:
    """Check |out - exact| <= 0.5 ulp + (K + 3) 2^-24 (|base| + sum lambda |tau|)."""
    exact = naive_merge(base, models, lambdas)
    size = base.double().abs()
    for factor, model in zip(lambdas, models, strict=True):
        size = size + abs(factor) * (model.double() - base.double()).abs()
    bound = 0.5 * ulp(exact, merged.dtype) + (len(models) + 3) * 2.0**-24 * size
    excess = ((merged.double() - exact).abs() - bound).max() if base.numel() else 0
    assert excess <= 0, f"an element is {float(excess):g} beyond the bound"


def assert_within_bound_exactly(
    merged: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lambdas: Sequence[Fraction],
    *,
    underflow: bool = True,
) -> None:
    """Check the bound in rational numbers, element by element.

    `underflow` allows half of the smallest number of the arithmetic for each product.
    A result beyond the largest number of the precision may be infinite.
    """
    assert (merged.dtype, merged.shape) == (base.dtype, base.shape)
    info, count = torch.finfo(merged.dtype), len(models)
    smallest = Fraction(info.tiny) * Fraction(info.eps)
    lost = Fraction(underflow, 2 ** (1075 if merged.dtype == torch.float64 else 150))
    columns = [exactly(tensor) for tensor in (base, *models)]
    for at, (got, start, *ends) in enumerate(
        zip(merged.flatten().tolist(), *columns, strict=True)
    ):
        steps = [x * (end - start) for x, end in zip(lambdas, ends, strict=True)]
        exact, size = start + sum(steps), abs(start) + sum(map(abs, steps))
        ulp = smallest
        if exact:
            power = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
            power -= abs(exact) < Fraction(2) ** power
            ulp = max(Fraction(2) ** power * Fraction(info.eps), smallest)
        bound = ulp / 2 + (count + 3) * Fraction(1, 2**24) * size + count * lost
        if math.isinf(got) and abs(exact) + bound >= Fraction(info.max):
            assert (got > 0) == (exact > 0)
            continue
        assert math.isfinite(got), f"element {at} is {got}, exactly {float(exact):g}"
        error = abs(Fraction(got) - exact)
        assert error <= bound, (
            f"element {at} is {got!r}, exactly {float(exact)!r}: off by "
            f"{float(error / ulp):g} ulp, {float(error / bound):g} of the bound"
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, on the CPU: tells -0.0 from 0.0, keeps NaN."""
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copy.reshape(-1).view(torch.uint8)


def assert_same_bits(first: torch.Tensor, second: torch.Tensor) -> None:
    """Check that two tensors agree in dtype, shape and every bit."""
    assert first.dtype == second.dtype, (first.dtype, second.dtype)
    assert first.shape == second.shape, (first.shape, second.shape)
    differing = (bits(first) != bits(second)).sum()
    assert not differing, f"{int(differing)} bytes differ"


def assert_same_states(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Check that two models agree in names (not their order) and every bit."""
    assert first and first.keys() == second.keys()
    for name, tensor in first.items():
        assert_same_bits(tensor, second[name])


@contextmanager
def assert_unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Check that no tensor is written to within the block: bits, version, flags."""
    kept = [(t, t.detach().clone(), t._version, t.requires_grad) for t in tensors]
    yield
    for tensor, copy, version, requires_grad in kept:
        assert tensor._version == version, "an input was written to"
        assert tensor.requires_grad == requires_grad
        assert_same_bits(tensor, copy)


def solved_coefficients(
    merged: State,
    base: State,
    models: Sequence[State],
    names: Iterable[str] | None = None,
) -> torch.Tensor:
    """The lambda that a float64 merge used, shape `(K,)`, from its output alone.

    Least squares of `merged - base` over the task vectors; to about 1e-11 where these
    are independent. `names` limits it to some tensors.
    """
    chosen = sorted(merged if names is None else names)
    assert all(merged[name].dtype == torch.float64 for name in chosen)

    def flat(state: State) -> torch.Tensor:
        return torch.cat(
            [state[n].double().flatten() - base[n].double().flatten() for n in chosen]
        )

    columns = torch.stack([flat(model) for model in models], dim=1)
    return torch.linalg.lstsq(columns, flat(merged)[:, None]).solution[:, 0]


def naive_pool(name: str, granularity: str) -> str:
    """The pool of a tensor; empty for the whole model."""
    return {"model": "", "layer": layer_of(name), "tensor": name}[granularity]


def naive_lambdas(
    name: str,
    base: State,
    models: Sequence[State],
    *,
    granularity: str = "model",
    exclude: Sequence[str] = (),
    weight: Sequence[float] | None = None,
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """lambda of one tensor under the parameters of `metagpt`, shape `(K,)`."""
    pool = {
        other: tensor
        for other, tensor in base.items()
        if naive_pool(other, granularity) == naive_pool(name, granularity)
        and not any(part in other for part in exclude)
    }
    raw = torch.tensor(weight or [1.0] * len(models), dtype=torch.float64)
    if pool:
        raw = raw * naive_sq_norms(pool, models) ** (power / 2)
    return scale * raw / raw.sum()


def assert_merged_exactly(
    merged: State,
    base: State,
    models: Sequence[State],
    lambdas: Callable[[str], torch.Tensor],
) -> None:
    """Check a float64 merge to 1e-10 of the sizes involved; lambda is by name."""
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float64
        values, tensors = lambdas(name), [model[name] for model in models]
        exact = naive_merge(base[name], tensors, values)
        size = base[name].double().abs()
        for value, other in zip(values, tensors, strict=True):
            size += abs(value) * (other.double() - base[name].double()).abs()
        error = (tensor - exact).abs() - 1e-10 * size
        assert error.max() <= 0, f"{name} is not merged with {values.tolist()}"


GRANULARITIES = ("model", "layer", "tensor")


def layer_of(name: str) -> str:
    """The pool of a tensor under `granularity: layer`."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return found.group() if found else name


def common_part(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What two tensors of different lengths along one axis have in common."""
    cut = tuple(slice(min(s)) for s in zip(first.shape, second.shape, strict=True))
    return first[cut], second[cut]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and torch.equal(bits(first), bits(second))


class Oracle:
    """n_t and lambda by the method, from whole state dicts in memory.

    Attributes:
        base: what the base stores, by output names.
        models: what the K models store.
        heads: for each head the embedding that it is, where it is absent or has the
            embedding's bits.
    """

    def __init__(
        self,
        base: State,
        models: Sequence[State],
        heads: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base
        self.models = list(models)
        self.heads = dict(heads or {})
        self._measured = [self._measure(model) for model in self.models]

    def _root(self, state: State, name: str) -> str | None:
        embedding = self.heads.get(name)
        if embedding in state and (
            name not in state or same_bits(state[name], state[embedding])
        ):
            return embedding
        return name if name in state else None

    def _measure(self, model: State) -> tuple[dict[str, float], dict[str, str]]:
        """n of each tensor that counts, and under which name each one counts."""
        sq_norms: dict[str, float] = {}
        counted_as: dict[str, str] = {}
        met: dict[tuple[str, str], str] = {}
        names = {*self.base, *model, *self.heads}
        for name in sorted(names, key=lambda n: (n in self.heads, n)):
            first, second = self._root(self.base, name), self._root(model, name)
            if first is None or second is None:
                continue
            if (first, second) not in met:
                met[first, second] = name
                pair = common_part(self.base[first], model[second])
                sq_norms[name] = naive_sq_norm(*pair)
            counted_as[name] = met[first, second]
        return sq_norms, counted_as

    @property
    def names(self) -> set[str]:
        """All tensors that are stored anywhere."""
        return {*self.base}.union(*self.models)

    @property
    def sq_norms(self) -> torch.Tensor:
        """n_t over the whole model, shape `(K,)`."""
        sums = [sum(sq_norms.values()) for sq_norms, _ in self._measured]
        return torch.tensor(sums, dtype=torch.float64)

    def base_tensor(self, name: str) -> torch.Tensor:
        root = self._root(self.base, name)
        assert root is not None, f"the base has no {name}"
        return self.base[root]

    def tensors(self, name: str) -> list[torch.Tensor]:
        """What the models that have a tensor store of it."""
        roots = [self._root(model, name) for model in self.models]
        return [m[r] for m, r in zip(self.models, roots, strict=True) if r is not None]

    def as_dtype(self, dtype: torch.dtype) -> Oracle:
        """The same checkpoints in another precision."""
        models = [cast(model, dtype) for model in self.models]
        return Oracle(cast(self.base, dtype), models, self.heads)

    def lambdas(self, name: str, granularity: str = "model") -> torch.Tensor:
        """Coefficients of the models that have a tensor, in their order.

        Of all models, for a name that none has, as of layers that slices move.
        """
        pooled = []
        for model, (sq_norms, counted_as) in zip(
            self.models, self._measured, strict=True
        ):
            root = self._root(model, name)
            if root is None and name in self.names:
                continue
            if granularity == "tensor":
                assert root is not None
                pair = common_part(self.base_tensor(name), model[root])
                pooled.append(naive_sq_norm(*pair))
            elif granularity == "layer":
                layer = layer_of(counted_as[name])
                of_layer = (n for k, n in sq_norms.items() if layer_of(k) == layer)
                pooled.append(sum(of_layer))
            else:
                pooled.append(sum(sq_norms.values()))
        return naive_coefficients(torch.tensor(pooled, dtype=torch.float64))


def assert_sq_norms(
    oracle: Oracle, base: Path | str, models: Sequence[Path | str], **options: Any
) -> None:
    """Check n_t of the stored checkpoints, as `scan` finds it, to 1e-12 (relative)."""
    found = mergekit_metagpt.scan(base, models, **options).pool("model").sq_norms
    torch.testing.assert_close(found, oracle.sq_norms, rtol=1e-12, atol=0)


def assert_merged(
    merged: State,
    oracle: Oracle,
    granularity: str = "model",
    handed_over: Oracle | None = None,
) -> None:
    """Check every element against the bound of the method.

    `handed_over` holds the tensors that mergekit merges, where these are not the
    stored ones of `oracle`, whose coefficients apply.
    """
    given = handed_over or oracle
    assert merged.keys() == given.names
    for name, tensor in merged.items():
        lambdas = oracle.lambdas(name, granularity)
        base, models = given.base_tensor(name), given.tensors(name)
        dtype = base.dtype
        for model in models:
            dtype = torch.promote_types(dtype, model.dtype)
        assert tensor.dtype == dtype, (name, tensor.dtype, dtype)
        assert_within_bound(tensor, base, models, lambdas)


def assert_lambdas(merged: State, oracle: Oracle, granularity: str = "model") -> None:
    """Check to 1e-7 (relative) the coefficients that a float64 merge used."""
    pools: dict[tuple[float, ...], list[str]] = {}
    for name in merged:
        if len(oracle.tensors(name)) == len(oracle.models):
            lambdas = tuple(oracle.lambdas(name, granularity).tolist())
            pools.setdefault(lambdas, []).append(name)
    assert pools
    for lambdas, names in pools.items():
        base = {name: oracle.base_tensor(name) for name in names}
        rows = zip(*(oracle.tensors(name) for name in names), strict=True)
        models = [dict(zip(names, row, strict=True)) for row in rows]
        found = solved_coefficients(merged, base, models, names)
        expected = torch.tensor(lambdas, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
