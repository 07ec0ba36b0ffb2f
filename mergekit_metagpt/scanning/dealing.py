"""Deals items to ranks by their size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# A share's size above which a single item is dealt by size instead of in order.
LARGE = 0.05


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Deal items to ranks: balanced, the same everywhere, most of them in order.

    Items of more than 5 % of a share go, largest first, to the rank that has least. The
    others follow in their order, so that a rank reads what lies together in files.

    Args:
        sizes: bytes of each item.
        ranks: number of ranks.

    Returns:
        the rank of each item.

    Example:
        >>> owners([1] * 60 + [20], 2).count(0)
        21
    """
    share = sum(sizes) / ranks
    held = [0.0] * ranks
    owner = [0] * len(sizes)
    large = [at for at, size in enumerate(sizes) if size > LARGE * share]
    for at in sorted(large, key=lambda at: -sizes[at]):
        owner[at] = min(range(ranks), key=held.__getitem__)
        held[owner[at]] += sizes[at]
    # The others fill all ranks up to one level, but for those that are above it.
    small = sorted(set(range(len(sizes))).difference(large))
    filling = sum(sizes[at] for at in small)
    level, below = share, sorted(held)
    while below[-1] > level:
        below.pop()
        level = (filling + sum(below)) / len(below)
    ends = list(accumulate(max(0.0, level - size) for size in held))
    start = 0.0
    for at in small:
        middle = start + sizes[at] / 2
        owner[at] = min(bisect_left(ends, middle), ranks - 1)
        start += sizes[at]
    return owner
