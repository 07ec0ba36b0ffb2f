"""MetaGPT's mathematics on K numbers: squared norms in, scaling coefficients out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# A sum shorter than this, relative to its terms, is rounding error.
CANCELLED = 1e-6


def contributes(
    sq_norms: torch.Tensor, weight: torch.Tensor, power: float
) -> torch.Tensor:
    """Mark the models that take part in the ratio.

    A model takes part if its weight is positive and, unless `power` is 0, its squared
    norm is positive. The others get coefficient 0: for `power > 0` by the formula, for
    `power < 0` because it has no value at norm 0.

    Args:
        sq_norms: squared norms ||tau_t||^2, shape `(K,)`.
        weight: importances w_t, shape `(K,)`.
        power: the exponent p.

    Returns:
        bool tensor, shape `(K,)`.
    """
    return (weight > 0) & ((sq_norms > 0) | (power == 0))


def coefficients(
    sq_norms: torch.Tensor | Sequence[float],
    weight: torch.Tensor | Sequence[float] | None = None,
    power: float = 2.0,
    scale: float = 1.0,
) -> torch.Tensor:
    r"""Weight each task vector by its share of the total squared norm.

    For fine-tuned models theta_1 ... theta_K of one base theta_0, with task vectors
    tau_t = theta_t - theta_0 and squared norms n_t = ||tau_t||^2,

        lambda_t = scale * w_t n_t^(p/2) / sum_k w_k n_k^(p/2)

    which is MetaGPT (eq. 15) for the defaults w_t = 1, p = 2, scale = 1; p = 0 is
    the plain average. Computed in log space, so that no power over- or underflows.
    Differentiable in `sq_norms` and `weight`.

    Args:
        sq_norms: squared L2 norms, shape `(K,)` or K numbers.
        weight: importances w_t >= 0, likewise; all 1 if None.
        power: the exponent p, finite.
        scale: factor on all coefficients, finite.

    Returns:
        lambda, shape `(K,)`, float64, on the CPU, non-negative and summing to `scale`
        (for scale >= 0).

    Raises:
        ValueError: an entry is negative or not finite, shapes differ, or no model has
            both a positive weight and (for power != 0) a positive squared norm.

    Example:
        >>> coefficients([1.0, 3.0])
        tensor([0.2500, 0.7500], dtype=torch.float64)
        >>> coefficients(torch.tensor([1.0, 3.0], dtype=torch.float64), power=0.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    sq_norms = torch.as_tensor(sq_norms, dtype=torch.float64, device="cpu")
    if weight is None:
        weight = torch.ones_like(sq_norms)
    weight = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    for name, values in (("sq_norms", sq_norms), ("weight", weight)):
        if values.ndim != 1 or values.shape != sq_norms.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected one value per "
                f"model, shape {tuple(sq_norms.shape[:1])}"
            )
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(f"{name} must be finite and >= 0, got {values.tolist()}")
    for name, value in (("power", power), ("scale", scale)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")

    taking_part = contributes(sq_norms, weight, power)
    if not bool(taking_part.any()):
        raise ValueError(
            "no model to weight: every squared norm or weight is 0 "
            f"(sq_norms {sq_norms.tolist()}, weight {weight.tolist()})"
        )
    logits = weight[taking_part].log()
    if power != 0:
        log_norms = sq_norms[taking_part].log()
        largest = log_norms.max() if power > 0 else log_norms.min()
        logits = logits + power / 2 * (log_norms - largest.detach())
    shares = torch.zeros_like(sq_norms)
    shares[taking_part] = torch.softmax(logits, dim=0)
    return scale * shares


def merged_length(shares: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Compute the length of the merged task vector, ||sum_t lambda_t tau_t||.

    It is sqrt(lambda' G lambda) with the Gram matrix G_ij = <tau_i, tau_j>.

    Args:
        shares: lambda, shape `(K,)`, float64.
        gram: G, shape `(K, K)`, float64.

    Returns:
        shape `()`, float64.

    Example:
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> merged_length(torch.tensor([0.5, 0.5], dtype=torch.float64), gram)
        tensor(1.4142, dtype=torch.float64)
    """
    return (shares @ gram @ shares).clamp(min=0.0).sqrt()


def restoring(shares: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Compute the factor that gives the merged task vector its inputs' mean length.

    s = sum_t lambda_t ||tau_t|| / ||sum_t lambda_t tau_t|| (MAGIC in weight space,
    arXiv 2512.19320). It is 1 if all task vectors have the same direction, and at most
    sqrt(K) if no angle between them is obtuse.

    Args:
        shares: lambda >= 0, shape `(K,)`, float64.
        gram: inner products <tau_i, tau_j>, shape `(K, K)`, float64.

    Returns:
        s, shape `()`, float64; 1 if no model moved.

    Raises:
        ValueError: the task vectors cancel each other.

    Example:
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> restoring(torch.tensor([0.5, 0.5], dtype=torch.float64), gram)
        tensor(1.4142, dtype=torch.float64)
    """
    moved = (shares > 0) & (gram.diagonal() > 0)
    if not bool(moved.any()):
        return torch.ones_like(gram.sum())
    shares, gram = shares[moved], gram[moved][:, moved]
    mean = shares @ gram.diagonal().sqrt()
    merged = merged_length(shares, gram)
    if not bool(merged > CANCELLED * mean):
        raise ValueError(
            "the task vectors cancel each other: their weighted sum has no length "
            "that `lambda: keep` could restore. Give a number"
        )
    return mean / merged


def log_variation(sq_norms: torch.Tensor) -> float | None:
    """Compute how much the logarithms of squared norms vary, relative to their mean.

    gamma = Var_t(log n_t) / mean_t(log n_t)^2, with the population variance (ACE, arXiv
    2603.02945). It depends on the unit of the norms.

    Args:
        sq_norms: n_t > 0, shape `(K,)`.

    Returns:
        gamma, or None if the mean is 0.

    Example:
        >>> round(log_variation(torch.tensor([2.0, 8.0])), 4)
        0.25
    """
    logs = sq_norms.double().log()
    mean = float(logs.mean())
    return float(logs.var(correction=0)) / mean**2 if mean else None


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Compute the cosines of the angles between all pairs of task vectors.

    cos_ij = G_ij / sqrt(G_ii G_jj) with the Gram matrix G_ij = <tau_i, tau_j>. The
    paper's derivation assumes that they are near 0; its solution does not need that.

    Args:
        gram: shape `(..., K, K)`, float64, symmetric.

    Returns:
        shape of `gram`, float64, within [-1, 1], 1 on the diagonal; NaN in the rows
        and columns of a task vector that is zero.

    Raises:
        ValueError: the matrices are not square.

    Example:
        >>> cosines(torch.tensor([[4.0, 0.0], [0.0, 9.0]], dtype=torch.float64))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    if gram.ndim < 2 or gram.shape[-2] != gram.shape[-1]:
        raise ValueError(
            f"a Gram matrix is square, got shape {tuple(gram.shape)}; expected (K, K)"
        )
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    angles = (gram / norms[..., :, None] / norms[..., None, :]).clamp(-1.0, 1.0)
    angles.diagonal(dim1=-2, dim2=-1)[norms > 0] = 1.0
    return angles
