"""Calls the compiled loops, if they were built, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

try:
    import _mergekit_metagpt as _loops
except ImportError:  # installed without a compiler: torch does the work
    _loops = None

# In the order of the loops in loops.c.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def built() -> bool:
    """Whether the loops were compiled when this package was installed."""
    return _loops is not None


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the loops can take these tensors together: on the CPU, of one dtype."""
    first = tensors[0]
    return (
        built()
        and first.dtype in DTYPES
        and all(t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
    )


def sq_norms(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], *, own: bool = False
) -> list[float]:
    """Compute squared norms ||tuned_k - base||^2 of flat tensors that the loops serve.

    Differences, products and sums are in float64. The order of each sum is fixed, so
    that every processor gives the same bits.

    Args:
        base: shape `(n,)`.
        tuned: K tensors, shape `(n,)`.
        own: also compute ||base||^2.

    Returns:
        K numbers, and ||base||^2 if `own`.
    """
    return _summed(_loops.sq_norms, base, tuned, own)


def gram_matrix(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the Gram matrix <tuned_k - base, tuned_l - base>, like `sq_norms`.

    Args:
        base: shape `(n,)`.
        tuned: K tensors, shape `(n,)`.

    Returns:
        shape `(K, K)`, float64, symmetric; its diagonal has the bits of `sq_norms`.
    """
    values = torch.tensor(
        _summed(_loops.gram, base, tuned), dtype=torch.float64, device="cpu"
    )
    return values.view(len(tuned), len(tuned))


def _summed(
    loop: Callable[..., list[float]],
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    *options: bool,
) -> list[float]:
    held = [_in_memory(tensor) for tensor in (base, *tuned)]
    reference, *addresses = (tensor.data_ptr() for tensor in held)
    dtype = DTYPES.index(base.dtype)
    return loop(dtype, reference, tuple(addresses), base.numel(), *options)


def scaled_sum(
    base: torch.Tensor | None,
    tuned: Sequence[torch.Tensor],
    factors: Sequence[float],
    out: torch.Tensor,
    *,
    narrow: bool,
) -> bool:
    """Write base + sum_k factors_k (tuned_k - base) of flat tensors to `out`.

    Args:
        base: shape `(n,)`, or None for sum_k factors_k tuned_k.
        tuned: K tensors, shape `(n,)`, that the loops serve together with base and out.
        factors: K numbers.
        out: shape `(n,)`, contiguous, not overlapping the others.
        narrow: compute in float32, and again in float64 if the result is not finite;
            otherwise compute in float64.

    Returns:
        whether all of `out` is finite; always True for float64, which is not checked.
    """
    held = [_in_memory(tensor) for tensor in tuned]
    reference = None if base is None else _in_memory(base)
    finite: bool = _loops.scaled_sum(
        DTYPES.index(out.dtype),
        None if reference is None else reference.data_ptr(),
        tuple(tensor.data_ptr() for tensor in held),
        tuple(map(float, factors)),
        out.numel(),
        narrow,
        out.data_ptr(),
    )
    return finite


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous and aligned in memory."""
    plain = tensor.resolve_neg().contiguous()
    return plain.clone() if plain.data_ptr() % plain.element_size() else plain
