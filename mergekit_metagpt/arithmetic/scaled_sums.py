"""Merges one tensor: the base plus the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergekit_metagpt.arithmetic import compiled
from mergekit_metagpt.arithmetic.in_parts import (
    chunk_size,
    chunks,
    needs_grad,
    results_of_parts,
    scratch,
    with_value,
)


def scaled_sum(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], lambdas: torch.Tensor
) -> torch.Tensor:
    """Merge one tensor: the base plus the scaled sum of its task vectors.

    theta = base + sum_k lambda_k (tuned_k - base)          (MetaGPT, eq. 2)

    in float32 for 16- and 32-bit inputs and in float64 for float64, rounded once.
    For every element |theta - exact| <= 0.5 ulp + (K + 3) 2^-24 (|base| + sum_k
    lambda_k |tau_k|), and K 2^-150 more where float32 products underflow. An element
    that no model changed keeps its bits. Differentiable in base, tuned and lambdas.

    Args:
        base: theta_0, any shape and strides, floating point.
        tuned: K tensors of the base's shape, dtype and device. Inputs are not changed.
        lambdas: scaling coefficients, shape `(K,)`, float64, on the CPU.

    Returns:
        theta, a new tensor with the base's shape, dtype and device.

    Example:
        >>> lambdas = torch.tensor([0.25, 0.75], dtype=torch.float64)
        >>> scaled_sum(torch.zeros(2), [torch.ones(2), 2 * torch.ones(2)], lambdas)
        tensor([1.7500, 1.7500])
    """
    return merged_and_finite(base, tuned, lambdas)[0]


def merged_and_finite(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], lambdas: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Merge one tensor like `scaled_sum`; also return whether all of it is finite."""
    factors = lambdas.tolist()
    narrow = base.dtype != torch.float64 and _fit_float32(factors)
    dtype = torch.float32 if narrow else torch.float64
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat_merged, flat_base = merged.view(-1), base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    mean = narrow and _base_cancels(base.dtype, factors)
    by_loops = compiled.serves(flat_base, *flat_tuned)

    def write_part(part: slice) -> bool:
        tensors, out = [tensor[part] for tensor in flat_tuned], flat_merged[part]
        if by_loops:
            reference = None if mean else flat_base[part]
            finite = compiled.scaled_sum(
                reference, tensors, factors, out, narrow=narrow
            )
            return finite if out.dtype != torch.float64 else is_finite(out)
        if mean:
            _weighted_mean(tensors, factors, out)
        else:
            _scaled_sum(flat_base[part], tensors, factors, dtype, out)
        return is_finite(out)

    finite = all(results_of_parts(flat_base, write_part, compiled=by_loops))
    if needs_grad([base, *tuned, lambdas]):
        graph = _summed(base, tuned, list(lambdas), dtype)
        if not bool(torch.isfinite(graph.detach().sum())):
            graph = _summed(base, tuned, list(lambdas), torch.float64)
        merged = with_value(graph, merged)
    return merged, finite


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, without allocating a mask."""
    return not tensor.numel() or all(map(torch.isfinite, tensor.detach().aminmax()))


def _scaled_sum(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    factors: Sequence[float],
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """Write the scaled sum of flat tensors to `out`, chunk by chunk."""
    with scratch(3, chunk_size(base), dtype, base.device) as buffers:
        for chunk in chunks(base):
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
    """Whether float32 is precise enough for coefficients and their products."""
    return all(factor == 0 or 1e-30 <= abs(factor) <= 1e30 for factor in factors)


def _base_cancels(dtype: torch.dtype, factors: Sequence[float]) -> bool:
    """Whether theta can be computed as a weighted mean of the models without the base.

    The mean is in float32. For 16-bit weights it is so close to a weight that no model
    changed that rounding restores that weight: for 2,000 models it is 2^-12 off in the
    worst case. For float32 weights, rounding would not.
    """
    convex = min(factors, default=0.0) >= 0 and abs(sum(factors) - 1) <= 1e-12
    few = len(factors) <= 1000
    return convex and few and dtype in (torch.float16, torch.bfloat16)


def _weighted_mean(
    tuned: Sequence[torch.Tensor], factors: Sequence[float], out: torch.Tensor
) -> None:
    """Write sum_k lambda_k tuned_k of flat 16-bit tensors to `out`, in float32."""
    with scratch(2, chunk_size(out), torch.float32, out.device) as buffers:
        for chunk in chunks(out):
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
