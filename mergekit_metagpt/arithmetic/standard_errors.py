"""Computes standard errors of sampled norms, coefficients and cosines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Covariances:
    """Covariances of estimates for K models, by tensor or by pool.

    Tensors are sampled independently of each other, so the covariances of a pool are
    the sums of its tensors'. A tensor that was read whole has zeros.

    Attributes:
        sq_norms: Cov(n_s, n_t), shape `(..., K, K)`, float64.
        base_sq_norms: Var(||theta_0||^2) of what each model shares, shape `(..., K)`.
        sq_norms_and_base: Cov(n_t, ||theta_0||^2), shape `(..., K)`.
        gram: Var(<tau_s, tau_t>), shape `(..., K, K)`, or None.
        gram_and_sq_norms: Cov(<tau_s, tau_t>, n_s), shape `(..., K, K)`, or None.
    """

    sq_norms: torch.Tensor
    base_sq_norms: torch.Tensor
    sq_norms_and_base: torch.Tensor
    gram: torch.Tensor | None = None
    gram_and_sq_norms: torch.Tensor | None = None

    @classmethod
    def zeros(cls, tensors: int, models: int, *, gram: bool) -> Covariances:
        """Return the covariances of tensors that were all read whole."""
        one = torch.zeros(tensors, models, dtype=torch.float64, device="cpu")
        square = one.new_zeros(tensors, models, models)
        return cls(
            square,
            one,
            one.clone(),
            square.clone() if gram else None,
            square.clone() if gram else None,
        )

    def each(
        self,
        of_models: Callable[[torch.Tensor], torch.Tensor],
        of_pairs: Callable[[torch.Tensor], torch.Tensor],
    ) -> Covariances:
        """Apply one function to tensors `(..., K)` and another to `(..., K, K)`."""
        gram, mixed = self.gram, self.gram_and_sq_norms
        return Covariances(
            of_pairs(self.sq_norms),
            of_models(self.base_sq_norms),
            of_models(self.sq_norms_and_base),
            None if gram is None else of_pairs(gram),
            None if mixed is None else of_pairs(mixed),
        )


def _error(variance: torch.Tensor) -> torch.Tensor:
    return variance.clamp(min=0).sqrt()


def _per(values: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """values / sums; 0 where a sum is 0, since it does not vary either."""
    return torch.where(sums > 0, values / sums, torch.zeros_like(values))


def of_sq_norms(covariances: Covariances) -> torch.Tensor:
    """Standard errors of the squared norms n_t, shape `(..., K)`."""
    return _error(covariances.sq_norms.diagonal(dim1=-2, dim2=-1))


def of_norms(sq_norms: torch.Tensor, covariances: Covariances) -> torch.Tensor:
    """Standard errors of ||tau_t|| = sqrt(n_t) by the delta method.

    Args:
        sq_norms: estimates of n_t, shape `(..., K)`, float64.
        covariances: of the estimates.

    Returns:
        se(n_t) / (2 sqrt(n_t)), shape `(..., K)`; 0 where n_t is 0.
    """
    return _per(of_sq_norms(covariances), 2 * sq_norms.sqrt())


def of_relative_norms(
    sq_norms: torch.Tensor, base_sq_norms: torch.Tensor, covariances: Covariances
) -> torch.Tensor:
    """Standard errors of ||tau_t|| / ||theta_0|| by the delta method.

    Args:
        sq_norms: estimates of n_t, shape `(..., K)`, float64.
        base_sq_norms: estimates of ||theta_0||^2, same shape.
        covariances: of the estimates.

    Returns:
        shape `(..., K)`; 0 where either norm is 0.
    """
    own = _per(
        _per(covariances.sq_norms.diagonal(dim1=-2, dim2=-1), sq_norms), sq_norms
    )
    base = _per(_per(covariances.base_sq_norms, base_sq_norms), base_sq_norms)
    both = _per(_per(covariances.sq_norms_and_base, sq_norms), base_sq_norms)
    return _per(sq_norms, base_sq_norms).sqrt() * _error(own + base - 2 * both) / 2


def of_coefficients(
    sq_norms: torch.Tensor,
    covariance: torch.Tensor,
    coefficients: torch.Tensor,
    power: float,
) -> torch.Tensor:
    """Standard errors of coefficients by the delta method.

    d lambda_t / d n_s = p/2 lambda_t ([s = t] - lambda_s) / n_s, for coefficients that
    sum to 1.

    Args:
        sq_norms: estimates of n_t, shape `(K,)`, float64.
        covariance: Cov(n_s, n_t), shape `(K, K)`.
        coefficients: lambda_t before `lambda` scales them, shape `(K,)`.
        power: the exponent p.

    Returns:
        shape `(K,)`, float64.

    Example:
        >>> n, cov = torch.tensor([4.0, 4.0]), torch.diag(torch.tensor([0.16, 0.0]))
        >>> of_coefficients(n, cov, torch.tensor([0.5, 0.5]), 2.0)
        tensor([0.0250, 0.0250])
    """
    relative = _per(_per(covariance, sq_norms[:, None]), sq_norms[None, :])
    slopes = torch.diag(coefficients) - torch.outer(coefficients, coefficients)
    slopes = power / 2 * slopes
    return _error((slopes @ relative @ slopes.T).diagonal())


def of_cosines(gram: torch.Tensor, covariances: Covariances) -> torch.Tensor:
    """Standard errors of the cosines between task vectors by the delta method.

    Args:
        gram: estimates of <tau_s, tau_t>, shape `(K, K)`, float64.
        covariances: of the estimates, with those of inner products.

    Returns:
        shape `(K, K)`; 0 on the diagonal and where a task vector is 0.
    """
    assert covariances.gram is not None and covariances.gram_and_sq_norms is not None
    n = gram.diagonal()
    lengths = torch.outer(n, n).sqrt()
    cosine = _per(gram, lengths)
    joint = _per(_per(covariances.sq_norms, n[:, None]), n[None, :])
    own = joint.diagonal()
    mixed = _per(_per(covariances.gram_and_sq_norms, lengths), n[:, None])
    variance = (
        _per(_per(covariances.gram, lengths), lengths)
        + cosine.square() / 4 * (own[:, None] + own[None, :] + 2 * joint)
        - cosine * (mixed + mixed.T)
    )
    errors = _error(variance)
    errors.fill_diagonal_(0.0)
    return errors
