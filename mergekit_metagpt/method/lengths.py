"""Compares lengths of task vectors with each other and with that of their sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_metagpt.arithmetic import closed_form


@dataclass(frozen=True)
class Lengths:
    """Lengths of the task vectors in one pool of tensors.

    Attributes:
        inputs: sum_t lambda_t ||tau_t||, their mean length.
        merged: ||sum_t lambda_t tau_t||, or None without inner products.
        keep: the value of `lambda: keep`, or None without inner products or if the
            task vectors cancel each other.
    """

    inputs: float
    merged: float | None = None
    keep: float | None = None

    @classmethod
    def of(
        cls, shares: torch.Tensor, sq_norms: torch.Tensor, gram: torch.Tensor | None
    ) -> Lengths:
        """Compute the lengths of a pool.

        Args:
            shares: lambda_t, shape `(K,)`, float64.
            sq_norms: n_t, likewise.
            gram: inner products, shape `(K, K)`, float64, or None.

        Returns:
            its lengths.
        """
        inputs = float(shares @ sq_norms.sqrt())
        if gram is None:
            return cls(inputs)
        merged = float(closed_form.merged_length(shares, gram))
        try:
            return cls(inputs, merged, float(closed_form.restoring(shares, gram)))
        except ValueError:
            return cls(inputs, merged)


@dataclass(frozen=True)
class Spread:
    """How much the norms of task vectors differ.

    Attributes:
        disparity: ratio of the largest to the smallest norm.
        gamma: gamma of ACE, see `closed_form.log_variation`.
    """

    disparity: float
    gamma: float | None

    @classmethod
    def of(cls, sq_norms: torch.Tensor, weight: torch.Tensor) -> Spread | None:
        """Compare the models that moved and have a positive weight.

        Args:
            sq_norms: n_t, shape `(K,)`, float64.
            weight: w_t, likewise.

        Returns:
            the spread, or None if there is no such model.
        """
        merged = sq_norms[(weight > 0) & (sq_norms > 0)]
        if not len(merged):
            return None
        disparity = float((merged.max() / merged.min()).sqrt())
        return cls(disparity, closed_form.log_variation(merged))
