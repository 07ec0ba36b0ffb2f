"""Computes merged task vectors by rivals of MetaGPT that mergekit does not have.

The methods on singular vectors (TSV-M, Iso-C, WUDI) take the 2-D weights of the layers,
as is usual; all other tensors, embeddings included, get the plain average. A matrix is
`(out, in)`; a task vector is a dictionary of tensors by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch

Tau = dict[str, torch.Tensor]
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def weighted(taus: Sequence[Tau], lambdas: Sequence[float]) -> Tau:
    """Compute sum_t lambda_t tau_t."""
    return {
        name: torch.as_tensor(
            sum(x * tau[name] for x, tau in zip(lambdas, taus, strict=True))
        )
        for name in taus[0]
    }


def gram(taus: Sequence[Tau]) -> torch.Tensor:
    """Compute the inner products <tau_s, tau_t>, shape `(K, K)`, float64."""
    rows = [torch.stack([tau[name].flatten() for tau in taus]) for name in taus[0]]
    return torch.stack([row.double() @ row.double().T for row in rows]).sum(0)


def magic_length(lambdas: torch.Tensor, gram: torch.Tensor) -> float:
    """Compute MAGIC's factor in weight space (arXiv 2512.19320).

    s = sum_t lambda_t sqrt(n_t) / ||sum_t lambda_t tau_t||: it gives the merged task
    vector the mean length of those that it is made of.
    """
    lengths = gram.diagonal().sqrt()
    return float(lambdas @ lengths / (lambdas @ gram @ lambdas).sqrt())


def lines(tau: Tau, layers: int, first: float, last: float) -> Tau:
    """Scale a merged task vector by LiNeS (arXiv 2410.17146).

    The factor rises linearly from `first` in layer 0 to `last` in layer L - 1.
    Embeddings get the factor of the first layer, the last norm that of the last.
    """

    def factor(name: str) -> float:
        at = _LAYER.search(name)
        layer = int(at[1]) if at else layers - 1 if name.endswith("norm.weight") else 0
        return first + (last - first) * layer / (layers - 1)

    return {name: factor(name) * part for name, part in tau.items()}


def decaying_prior(layers: int, rate: float) -> tuple[list[float], list[float]]:
    """Write a prior over layers in the manner of FRANK (arXiv 2505.16151, eq. 16).

    The first model's weight is exp(-rate l / (L - 1)) in layer l, and the second's is
    one minus that.
    """
    first = [math.exp(-rate * layer / (layers - 1)) for layer in range(layers)]
    return first, [1 - weight for weight in first]


def _factors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose U S V' by the smaller Gram matrix, in float64; faster than an SVD."""
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _factors(matrix.T)
        return vh.T, s, u.T
    values, u = torch.linalg.eigh(matrix @ matrix.T)
    s, u = values.flip(0).clamp_min(0).sqrt(), u.flip(1)
    kept = s > s[0] * 1e-7
    s, u = s[kept], u[:, kept]
    return u, s, (u.T @ matrix) / s[:, None]


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Compute the nearest matrix with orthonormal columns or rows: U V' of its SVD."""
    u, _, vh = _factors(matrix)
    return u @ vh


def tsv_merge(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge task matrices by TSV-M (arXiv 2412.00081).

    Of each task matrix keep the top 1 / K of the singular directions; replace the
    joined left and the joined right vectors by their nearest orthonormal ones; multiply
    with the singular values kept.
    """
    us, values, vhs = [], [], []
    for matrix in matrices:
        u, s, vh = _factors(matrix)
        kept = max(1, min(matrix.shape) // len(matrices))
        us.append(u[:, :kept])
        values.append(s[:kept])
        vhs.append(vh[:kept])
    left, right = polar(torch.cat(us, 1)), polar(torch.cat(vhs, 0))
    return (left * torch.cat(values)) @ right


def iso_merge(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge task matrices by Iso-C (arXiv 2502.04959).

    sum_t D_t = U S V', with all of S replaced by its mean.
    """
    u, s, vh = _factors(torch.stack(list(matrices)).double().sum(0))
    return s.sum() / min(matrices[0].shape) * (u @ vh)


def wudi_merge(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge task matrices by the closed form of WUDI (arXiv 2503.08099).

    min_X sum_t ||(X - D_t) D_t'||^2 / n_t, so
    X = (sum_t D_t C_t) (sum_t C_t)^+ with C_t = D_t' D_t / n_t and n_t = ||D_t||^2.
    """
    each = [matrix.double() for matrix in matrices]
    sq_norms = [float(matrix.square().sum()) for matrix in each]
    scaled = [m / math.sqrt(n) for m, n in zip(each, sq_norms, strict=True)]
    # With A = U S V' the D_t / sqrt(n_t) below each other, sum_t C_t = A' A = V S^2 V'.
    _, s, vh = _factors(torch.cat(scaled))
    total = sum(m @ (a.T @ (a @ vh.T)) for m, a in zip(each, scaled, strict=True))
    return (torch.as_tensor(total) / s.square()) @ vh


def by_matrix(
    taus: Sequence[Tau],
    merge: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    scale: float = 1.0,
) -> Tau:
    """Merge the 2-D weights of layers by `merge`, times `scale`; average the rest."""
    merged = weighted(taus, [1 / len(taus)] * len(taus))
    for name in merged:
        if _LAYER.search(name) and merged[name].dim() == 2:
            merged[name] = (scale * merge([tau[name] for tau in taus])).float()
    return merged
