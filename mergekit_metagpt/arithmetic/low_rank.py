"""Computes inner products of low-rank matrices from their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gram_of_products(
    lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]
) -> torch.Tensor:
    r"""Compute the Gram matrix of products of two factors without forming them.

    <L_i R_i, L_j R_j> = tr((L_i' L_j) (R_j R_i')), summed over a stack of E products.
    Exact but for rounding in float64; takes O((m + n) r^2) instead of O(m n r).

    Args:
        lefts: K tensors L of shape `(E, m, r)`, each with its own r, float64.
        rights: K tensors R of shape `(E, r, n)`, float64.

    Returns:
        shape `(K, K)`, float64, symmetric; its diagonal is not negative.

    Example:
        >>> left = torch.ones(1, 2, 1, dtype=torch.float64)
        >>> right = torch.tensor([[[1.0, 2.0, 2.0]]], dtype=torch.float64)
        >>> gram_of_products([left], [right])
        tensor([[18.]], dtype=torch.float64)
    """
    left, right = torch.cat(list(lefts), dim=2), torch.cat(list(rights), dim=1)
    products = ((left.mT @ left) * (right @ right.mT)).sum(dim=0)
    ranks = torch.tensor([factor.shape[2] for factor in lefts], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(lefts), device="cpu"), ranks)
    gram = products.new_zeros(len(lefts), len(lefts))
    gram.index_put_((owners[:, None], owners[None, :]), products, accumulate=True)
    gram = (gram + gram.T) / 2
    gram.diagonal().clamp_(min=0)
    return gram


def piece_of_product(
    left: torch.Tensor, right: torch.Tensor, columns: int, piece: slice
) -> torch.Tensor:
    """Return a piece of a flattened stack of products of two factors.

    Args:
        left: L, shape `(E, m, r)`, float64.
        right: R, shape `(E, r, n)`, float64.
        columns: how many of the n columns the flattened tensor has.
        piece: which elements of the flattened tensor.

    Returns:
        these elements of L R, flat, float64.

    Example:
        >>> left = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
        >>> right = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
        >>> piece_of_product(left, right, 2, slice(1, 3))
        tensor([3., 2.], dtype=torch.float64)
    """
    first, last = piece.start // columns, -(-piece.stop // columns)
    height = left.shape[1]
    made = left.new_empty(last - first, columns)
    row = first
    while row < last:
        number, start = divmod(row, height)
        stop = min(start + last - row, height)
        into = made[row - first : row - first + stop - start]
        torch.mm(left[number, start:stop], right[number, :, :columns], out=into)
        row += stop - start
    offset = first * columns
    return made.view(-1)[piece.start - offset : piece.stop - offset]
