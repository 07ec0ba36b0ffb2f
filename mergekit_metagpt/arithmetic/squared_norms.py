"""Computes squared norms and inner products of one tensor's task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mergekit_metagpt.arithmetic import compiled
from mergekit_metagpt.arithmetic.in_parts import (
    CHUNK,
    chunk_size,
    chunks,
    needs_grad,
    results_of_parts,
    scratch,
    with_value,
)

ROW = 1 << 10


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
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def _common_grid(first: torch.dtype, second: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes to round to, one after the other, so that both can represent the values.

    Between float16 and bfloat16 these are both: bfloat16 has fewer mantissa bits, but
    float16 has fewer for very small weights, and neither may look like a difference.
    """
    if first == second:
        return ()
    if {first, second} == {torch.float16, torch.bfloat16}:
        return (torch.float16, torch.bfloat16)
    return (coarser_dtype(first, second),)


def _rounded(values: torch.Tensor, grid: tuple[torch.dtype, ...]) -> torch.Tensor:
    """Values in float64 after rounding to each dtype, except where that overflows."""
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

    Base and model are first rounded to the coarser of their two precisions, so that a
    weight that only was stored differently contributes exactly 0.

    Args:
        base: flat tensor.
        tuned: K flat tensors.
        squared: yield the squares, computed in one operation, instead of differences.

    Yields:
        k, and the chunk's differences or squares, shape `(n,)`, float64.
    """
    grids = [_common_grid(base.dtype, tensor.dtype) for tensor in tuned]
    with scratch(2, chunk_size(base), torch.float64, base.device) as buffers:
        for chunk in chunks(base):
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


def _whole_task_vectors(
    base: torch.Tensor, tuned: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Whole task vectors, differentiable; see `_task_vectors`."""
    grids = [_common_grid(base.dtype, tensor.dtype) for tensor in tuned]
    return [
        _rounded(tensor, grid) - _rounded(base, grid)
        for tensor, grid in zip(tuned, grids, strict=True)
    ]


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sum in rows of fixed length, for the same bits with any number of threads."""
    whole = values.numel() // ROW * ROW
    return values[:whole].view(-1, ROW).sum(dim=1).sum() + values[whole:].sum()


def sq_norms(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the squared norm of every model's task vector on one tensor.

    n_k = ||tau_k||^2 = sum_i (tuned_k[i] - base[i])^2, each difference taken at the
    coarser of the two stored precisions; differences, products and sums in float64.
    Differentiable in base and tuned.

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
    flat = base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    def of_part(part: slice) -> torch.Tensor:
        norms = flat_sq_norms(flat[part], [tensor[part] for tensor in flat_tuned])
        return torch.tensor(norms, dtype=torch.float64, device="cpu")

    by_loops = compiled.serves(flat, *flat_tuned)
    first, *others = results_of_parts(flat, of_part, compiled=by_loops)
    total = sum(others, first)
    if not needs_grad([base, *tuned]):
        return total
    taus = _whole_task_vectors(base, tuned)
    return with_value(torch.stack([tau.square().sum() for tau in taus]).cpu(), total)


def too_far(what: str) -> str:
    """Return the error of finite weights whose squared norm is not finite."""
    return (
        f"||tau||^2 of {what} exceeds float64: its weights differ from the base's by "
        "more than 1e150"
    )


def flat_sq_norms(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], *, own: bool = False
) -> list[float]:
    """Compute the squared norm of every model's task vector on a piece of a tensor.

    Like `sq_norms`, but for a piece of moderate size, on the calling thread, without
    autograd. Whether the compiled loops or torch do the work for a model, and so the
    bits of its norm, does not depend on the other models.

    Args:
        base: shape `(n,)`.
        tuned: K tensors, shape `(n,)`, of the base's device.
        own: also compute ||base||^2.

    Returns:
        K numbers, and ||base||^2 if `own`; not finite where an input is not.

    Example:
        >>> flat_sq_norms(torch.zeros(2), [torch.tensor([3.0, 4.0])])
        [25.0]
    """
    if compiled.serves(base, *tuned):
        return compiled.sq_norms(base, tuned, own=own)
    if own:
        nothing = base.new_zeros(1).expand_as(base)
        return flat_sq_norms(base, tuned) + flat_sq_norms(nothing, [base])
    norms = dict.fromkeys(range(len(tuned)), 0.0)
    served = [k for k in norms if compiled.serves(base, tuned[k])]
    if served:
        sums = compiled.sq_norms(base, [tuned[k] for k in served])
        norms.update(zip(served, sums, strict=True))
    if rest := [k for k in norms if k not in served]:
        totals = torch.zeros(len(rest), dtype=torch.float64, device=base.device)
        tensors = [tuned[k] for k in rest]
        for at, squares in _task_vectors(base, tensors, squared=True):
            totals[at] += _sum(squares)
        norms.update(zip(rest, totals.tolist(), strict=True))
    return list(norms.values())


def gram_matrix(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the Gram matrix of the task vectors on one tensor.

    G_ij = <tau_i, tau_j>, with the same differences as `sq_norms`; its diagonal has
    the bits of `sq_norms`. Differentiable in base and tuned.

    Args:
        base: theta_0, any shape, floating point.
        tuned: K tensors of the base's shape and device.

    Returns:
        shape `(K, K)`, float64, on the CPU, symmetric.

    Example:
        >>> gram_matrix(torch.zeros(2), [torch.ones(2), torch.tensor([1.0, -1.0])])
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    count = len(tuned)
    if not count:
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    flat = base.detach().reshape(-1)
    flat_tuned = [tensor.detach().reshape(-1) for tensor in tuned]

    by_loops = compiled.serves(flat, *flat_tuned)

    def of_part(part: slice) -> torch.Tensor:
        chunk, parts = flat[part], [tensor[part] for tensor in flat_tuned]
        if by_loops:
            return compiled.gram_matrix(chunk, parts)
        gram = torch.zeros(count, count, dtype=torch.float64, device=base.device)
        with scratch(count, chunk_size(chunk), gram.dtype, gram.device) as buffer:
            for k, tau in _task_vectors(chunk, parts):
                rows = buffer[:, : tau.numel()]
                rows[k].copy_(tau)
                if k == count - 1:
                    gram += rows @ rows.T
        gram = (gram + gram.T) / 2
        gram.diagonal().copy_(gram.new_tensor(flat_sq_norms(chunk, parts)))
        return gram

    first, *others = results_of_parts(flat, of_part, compiled=by_loops)
    total = sum(others, first).cpu()
    if not needs_grad([base, *tuned]):
        return total
    taus = torch.stack([t.reshape(-1) for t in _whole_task_vectors(base, tuned)])
    return with_value((taus @ taus.T).cpu(), total)


def products_with(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], others: torch.Tensor
) -> torch.Tensor:
    """Compute inner products of task vectors with other vectors on a piece of a tensor.

    P_ka = <tau_k, others_a>, with the same differences as `sq_norms`.

    Args:
        base: theta_0, shape `(n,)`, on the CPU.
        tuned: K tensors of the base's shape.
        others: shape `(A, n)`, float64.

    Returns:
        shape `(K, A)`, float64.

    Example:
        >>> others = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
        >>> products_with(torch.zeros(2), [torch.tensor([3.0, 4.0])], others)
        tensor([[7.]], dtype=torch.float64)
    """
    products = torch.zeros(len(tuned), len(others), dtype=torch.float64, device="cpu")
    for start in range(0, base.numel(), CHUNK):
        chunk = slice(start, start + CHUNK)
        pieces = [tensor[chunk] for tensor in tuned]
        for k, tau in _task_vectors(base[chunk], pieces):
            products[k] += others[:, chunk] @ tau
    return products
