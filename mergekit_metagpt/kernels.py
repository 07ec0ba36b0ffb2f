"""Loops over elements: tensors of one group in, sums or the merged tensor out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from mergekit_metagpt import native
from mergekit_metagpt.buffers import scratch
from mergekit_metagpt.workers import spread

T = TypeVar("T")

# Elements per step. Large enough that Python's share is small, small enough that
# the scratch buffers stay in a CPU's cache; on other devices a step costs a launch.
CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 25
ROW = 1 << 10
# Elements that one thread takes at a time. Sums are formed part by part whatever the
# number of threads, for the same bits.
PART = 1 << 20
# Below this number of elements torch runs an operation on one thread anyway.
SERIAL = 1 << 15

_MANTISSA_BITS = {
    torch.float64: 52,
    torch.float32: 23,
    torch.float16: 10,
    torch.bfloat16: 7,
}


def coarser_dtype(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the one of two floating-point dtypes that has fewer mantissa bits.

    Args:
        first: a dtype.
        second: a dtype.

    Returns:
        one of them.

    Example:
        >>> coarser_dtype(torch.float32, torch.bfloat16)
        torch.bfloat16
        >>> coarser_dtype(torch.float16, torch.bfloat16)
        torch.bfloat16
    """
    return min(first, second, key=_MANTISSA_BITS.__getitem__)


def _common_grid(first: torch.dtype, second: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes to round to in turn, for values that both dtypes can represent.

    bfloat16 has the fewer mantissa bits, float16 the narrower range: small weights
    keep fewer bits there, and an unchanged weight must not show that as a difference.
    """
    if first == second:
        return ()
    if {first, second} == {torch.float16, torch.bfloat16}:
        return (torch.float16, torch.bfloat16)
    return (coarser_dtype(first, second),)


def _chunk_size(like: torch.Tensor) -> int:
    return min(CHUNK if like.device.type == "cpu" else DEVICE_CHUNK, like.numel())


def _chunks(like: torch.Tensor) -> Iterator[slice]:
    step = _chunk_size(like)
    for start in range(0, like.numel(), step or 1):
        yield slice(start, min(start + step, like.numel()))


def _in_parts(
    like: torch.Tensor, work: Callable[[slice], T], *, compiled: bool
) -> list[T]:
    """Call work for every part of a flat tensor, on a CPU with several threads."""
    if like.device.type != "cpu":
        return [work(slice(0, like.numel()))]
    ends = [*range(PART, like.numel(), PART), like.numel()]
    parts = [slice(max(0, (end - 1) // PART * PART), end) for end in ends]
    alone = like.numel() <= SERIAL or (compiled and len(parts) == 1)
    if torch.get_num_threads() == 1 or alone:
        return [work(part) for part in parts]
    return spread(work, parts, compiled=compiled)


def _rounded(values: torch.Tensor, grid: tuple[torch.dtype, ...]) -> torch.Tensor:
    """Values in float64 after rounding to each dtype that does not overflow there."""
    for dtype in grid:
        narrow = values.to(dtype)
        if not bool(torch.isfinite(narrow.sum(dtype=torch.float64))):
            wide = torch.promote_types(values.dtype, dtype)
            kept = torch.isfinite(narrow)
            narrow = torch.where(kept, narrow.to(wide), values.to(wide))
        values = narrow
    return values.double()


def _task_vectors(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], *, squared: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (k, a chunk of tau_k in float64), which the caller may overwrite.

    base and model are both rounded to the coarser of their two precisions first, so
    that a weight which was only stored differently contributes exactly 0.

    Args:
        base: flat.
        tuned: K flat tensors.
        squared: yield the squares instead, made in one operation.

    Yields:
        k, and the chunk's differences or squares, shape `(n,)`, float64.
    """
    grids = [_common_grid(base.dtype, tensor.dtype) for tensor in tuned]
    with scratch(2, _chunk_size(base), torch.float64, base.device) as buffers:
        for chunk in _chunks(base):
            step, reference = buffers[:, : chunk.stop - chunk.start]
            reference.copy_(base[chunk])
            for k, (tensor, grid) in enumerate(zip(tuned, grids, strict=True)):
                subtracted = _rounded(base[chunk], grid) if grid else reference
                step.copy_(_rounded(tensor[chunk], grid) if grid else tensor[chunk])
                if squared:
                    # (step - subtracted)^2; torch has no other operation for both.
                    torch.ops.aten.mse_loss.out(step, subtracted, 0, out=step)
                else:
                    step.sub_(subtracted)
                yield k, step


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """Square a vector in place and sum it."""
    return _sum(values.square_())


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sum in rows of fixed length: the same bits for any number of torch's threads."""
    whole = values.numel() // ROW * ROW
    return values[:whole].view(-1, ROW).sum(dim=1).sum() + values[whole:].sum()


def sq_norms(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared norm of every model's task vector on one tensor.

    n_k = ||tau_k||^2 = sum_i (tuned_k[i] - base[i])^2, each difference taken at the
    coarser of the two stored precisions; differences, products and sums in float64.
    Differentiable where an input requires a gradient.

    Args:
        base: theta_0, any shape and strides, floating point.
        tuned: K tensors theta_k of the base's shape and device, each of any
            floating-point dtype. Inputs are not changed.

    Returns:
        shape `(K,)`, float64, on the CPU; not finite where an input is not.

    Example:
        >>> sq_norms(torch.zeros(2), [torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([25.,  0.], dtype=torch.float64)
    """
    if not tuned:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    if needs_grad([base, *tuned]):
        grids = [_common_grid(base.dtype, tensor.dtype) for tensor in tuned]
        taus = [
            _rounded(tensor, grid) - _rounded(base, grid)
            for tensor, grid in zip(tuned, grids, strict=True)
        ]
        return torch.stack([tau.square().sum() for tau in taus]).cpu()
    flat = base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    def of_part(part: slice) -> torch.Tensor:
        found = flat_sq_norms(flat[part], [tensor[part] for tensor in flat_tuned])
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    found = _in_parts(flat, of_part, compiled=native.serves(flat, *flat_tuned))
    return sum(found[1:], found[0])


def flat_sq_norms(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> list[float]:
    """Squared norm of every model's task vector on a piece of a flattened tensor.

    As `sq_norms`, but for pieces of moderate size, on the thread that calls it and
    without autograd. By the compiled loops, or else by torch; which of the two does not
    depend on the other models, and neither do the bits.

    Args:
        base: shape `(n,)`.
        tuned: K tensors, shape `(n,)`, of the base's device.

    Returns:
        K numbers; not finite where an input is not.

    Example:
        >>> flat_sq_norms(torch.zeros(2), [torch.tensor([3.0, 4.0])])
        [25.0]
    """
    if native.serves(base, *tuned):
        return native.sq_norms(base, tuned)
    found = dict.fromkeys(range(len(tuned)), 0.0)
    served = [k for k in found if native.serves(base, tuned[k])]
    if served:
        sums = native.sq_norms(base, [tuned[k] for k in served])
        found.update(zip(served, sums, strict=True))
    if rest := [k for k in found if k not in served]:
        totals = torch.zeros(len(rest), dtype=torch.float64, device=base.device)
        tensors = [tuned[k] for k in rest]
        for at, squares in _task_vectors(base, tensors, squared=True):
            totals[at] += _sum(squares)
        found.update(zip(rest, totals.tolist(), strict=True))
    return list(found.values())


def sq_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Squared norm of a tensor.

    Args:
        tensor: any shape and strides, floating point. Not changed.

    Returns:
        shape `()`, float64, on the CPU.

    Example:
        >>> sq_norm(torch.tensor([3.0, 4.0]))
        tensor(25., dtype=torch.float64)
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    with scratch(1, _chunk_size(flat), torch.float64, flat.device) as (buffer,):
        for chunk in _chunks(flat):
            values = buffer[: chunk.stop - chunk.start]
            total += _sum_of_squares(values.copy_(flat[chunk]))
    return total.cpu()


def rounding_sq_norms(
    base: torch.Tensor, tuned: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Squared norm of what the coarser of two stored precisions cannot hold.

    r_k = ||base - R(base)||^2 + ||tuned_k - R(tuned_k)||^2, R rounding to the coarser
    precision of the pair: what `sq_norms` would count as learning if it did not round.

    Args:
        base: theta_0, any shape, floating point.
        tuned: K tensors of the base's shape and device. Inputs are not changed.

    Returns:
        shape `(K,)`, float64, on the CPU; 0 where the precisions agree.

    Example:
        >>> base = torch.tensor([1.0, 1.0009765625])
        >>> rounding_sq_norms(base, [base.bfloat16(), base])
        tensor([9.5367e-07, 0.0000e+00], dtype=torch.float64)
    """
    sums = torch.zeros(len(tuned), dtype=torch.float64, device=base.device)
    flat_base = base.detach().reshape(-1)
    for k, tensor in enumerate(tuned):
        if not (grid := _common_grid(base.dtype, tensor.dtype)):
            continue
        flat = tensor.detach().reshape(-1)
        for chunk in _chunks(flat):
            for exact in (flat_base[chunk], flat[chunk]):
                lost = exact.double() - _rounded(exact, grid)
                sums[k] += _sum_of_squares(lost)
    return sums.cpu()


def accumulate_gram(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gram matrix of the task vectors on one tensor.

    G_ij = <tau_i, tau_j>, with the same differences as `sq_norms`; its diagonal has
    the bits of `sq_norms`.

    Args:
        base: theta_0, any shape, floating point.
        tuned: K tensors of the base's shape and device.

    Returns:
        shape `(K, K)`, float64, on the CPU, symmetric.

    Example:
        >>> accumulate_gram(torch.zeros(2), [torch.ones(2), torch.tensor([1.0, -1.0])])
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    count = len(tuned)
    if not count:
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    flat = base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    def of_part(part: slice) -> torch.Tensor:
        chunk, parts = flat[part], [tensor[part] for tensor in flat_tuned]
        gram = torch.zeros(count, count, dtype=torch.float64, device=base.device)
        with scratch(count, _chunk_size(chunk), gram.dtype, gram.device) as buffer:
            for k, tau in _task_vectors(chunk, parts):
                rows = buffer[:, : tau.numel()]
                rows[k].copy_(tau)
                if k == count - 1:
                    gram += rows @ rows.T
        gram = (gram + gram.T) / 2
        gram.diagonal().copy_(gram.new_tensor(flat_sq_norms(chunk, parts)))
        return gram

    found = _in_parts(flat, of_part, compiled=False)
    return sum(found[1:], found[0]).cpu()


def needs_grad(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd records operations on any of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def scaled_sum(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], lambdas: torch.Tensor
) -> torch.Tensor:
    """Merge one tensor: the base plus the scaled sum of its task vectors.

    theta = base + sum_k lambda_k (tuned_k - base)          (MetaGPT, eq. 2)

    in float32 for 16- and 32-bit inputs and in float64 for float64, rounded once.
    For every element |theta - exact| <= 0.5 ulp + (K + 3) 2^-24 (|base| + sum_k
    lambda_k |tau_k|), and K 2^-150 more where float32 products underflow. An element
    that no model changed keeps its bits. Keeps autograd
    where an input (or `lambdas`) requires a gradient.

    Args:
        base: theta_0, any shape and strides, floating point.
        tuned: K tensors of the base's shape, dtype and device. Inputs are not changed.
        lambdas: scaling coefficients, shape `(K,)`, float64, on the CPU.

    Returns:
        theta, shape, dtype and device of the base, in memory of its own.

    Example:
        >>> lambdas = torch.tensor([0.25, 0.75], dtype=torch.float64)
        >>> scaled_sum(torch.zeros(2), [torch.ones(2), 2 * torch.ones(2)], lambdas)
        tensor([1.7500, 1.7500])
    """
    factors = lambdas.tolist()
    narrow = base.dtype != torch.float64 and _fit_float32(factors)
    dtype = torch.float32 if narrow else torch.float64
    if needs_grad([base, *tuned, lambdas]):
        merged = _summed(base, tuned, list(lambdas), dtype)
        if not bool(torch.isfinite(merged.detach().sum())):
            merged = _summed(base, tuned, list(lambdas), torch.float64)
        return merged
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat_merged, flat_base = merged.view(-1), base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    mean = narrow and _base_cancels(base.dtype, factors)
    compiled = native.serves(base, *tuned)

    def write_part(part: slice) -> None:
        tensors, out = [tensor[part] for tensor in flat_tuned], flat_merged[part]
        if compiled:
            reference = None if mean else flat_base[part]
            native.scaled_sum(reference, tensors, factors, out, narrow=narrow)
        elif mean:
            _weighted_mean(tensors, factors, out)
        else:
            _scaled_sum(flat_base[part], tensors, factors, dtype, out)

    _in_parts(flat_base, write_part, compiled=compiled)
    return merged


def _scaled_sum(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    factors: Sequence[float],
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """Write the scaled sum of flat tensors to `out`, chunk by chunk."""
    with scratch(3, _chunk_size(base), dtype, base.device) as buffers:
        for chunk in _chunks(base):
            reference, step, shift = buffers[:, : chunk.stop - chunk.start]
            reference.copy_(base[chunk])
            shift.zero_()
            for tensor, factor in zip(tuned, factors, strict=True):
                # The difference is base - tuned, and the sum is subtracted at the end:
                # only so does a base of -0.0 that no model changed keep its sign.
                torch.sub(reference, step.copy_(tensor[chunk]), out=step)
                shift.add_(step, alpha=factor)
            total = torch.sub(reference, shift, out=shift)
            if dtype == torch.float32 and not bool(torch.isfinite(total.sum())):
                parts = [tensor[chunk] for tensor in tuned]
                total = _summed(base[chunk], parts, factors, torch.float64)
            out[chunk].copy_(total)


def _fit_float32(factors: Sequence[float]) -> bool:
    """Whether coefficients keep their precision in float32, and their products."""
    return all(factor == 0 or 1e-30 <= abs(factor) <= 1e30 for factor in factors)


def _base_cancels(dtype: torch.dtype, factors: Sequence[float]) -> bool:
    """Whether theta is a weighted mean of the models that may leave out the base.

    In 16 bits: float32 sums of coefficients that sum to 1 are so close to a weight that
    no model changed that rounding gives it back (for up to 2,000 models, of which
    the sums are 2^-12 off in the worst case). In float32 they are not.
    """
    convex = min(factors, default=0.0) >= 0 and abs(sum(factors) - 1) <= 1e-12
    few = len(factors) <= 1000
    return convex and few and dtype in (torch.float16, torch.bfloat16)


def _weighted_mean(
    tuned: Sequence[torch.Tensor], factors: Sequence[float], out: torch.Tensor
) -> None:
    """Write sum_k lambda_k tuned_k of flat 16-bit tensors to `out`, in float32."""
    with scratch(2, _chunk_size(out), torch.float32, out.device) as buffers:
        for chunk in _chunks(out):
            step, total = buffers[:, : chunk.stop - chunk.start]
            total.copy_(tuned[0][chunk]).mul_(factors[0])
            for tensor, factor in zip(tuned[1:], factors[1:], strict=True):
                total.add_(step.copy_(tensor[chunk]), alpha=factor)
            out[chunk].copy_(total)


def _summed(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    factors: Sequence[Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    reference = base.to(dtype)
    shift = torch.zeros_like(reference)
    for tensor, factor in zip(tuned, factors, strict=True):
        shift = shift + factor * (reference - tensor.to(dtype))
    return (reference - shift).to(base.dtype)
