"""Merges tensors in memory, pooling squared norms over the groups of one call."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from mergekit.merge_methods.base import (
    TensorGroup,
)

from mergekit_metagpt.method.group_norms import (
    Measured,
    _own_sq_norms,
)
from mergekit_metagpt.method.inputs import (
    base_of,
)
from mergekit_metagpt.method.parameters import (
    Settings,
)
from mergekit_metagpt.scanning.pools import (
    is_excluded,
    pool_key,
)

if TYPE_CHECKING:
    pass


def of_call(
    groups: Sequence[TensorGroup], settings: Sequence[Settings]
) -> list[Measured | None]:
    """n_t of every group of one call in memory, pooled over the groups of the call.

    Entries that share storage, in the base and in the model, count once.

    Args:
        groups: the tensors of the model, or one of them.
        settings: of each group.

    Returns:
        as `of_group`, for every group; differentiable where inputs require it.

    Raises:
        TypeError: an input is not floating point.
        ValueError: a weight is NaN or infinite.
    """
    own = [_own_sq_norms(group) for group in groups]
    places: dict[tuple[Hashable, ...], int] = {}
    counted_as: dict[tuple[int, Hashable], int] = {}
    norms: dict[tuple[int, Hashable], torch.Tensor] = {}
    names = [group.metadata.name or "" for group in groups]
    # A shared weight goes by one of its names, whatever the order of the groups: a
    # tied head by its embedding's.
    for at in sorted(
        range(len(groups)), key=lambda at: ("head" in names[at], names[at])
    ):
        group = groups[at]
        for entry, value in zip(group.non_base, own[at], strict=True):
            pair = base_of(group).id, entry.id
            place = pair, _place(base_of(group).tensor), _place(entry.tensor)
            counted_as[at, pair] = places.setdefault(place, at)
            norms[at, pair] = value

    def key(at: int, granularity: str) -> Hashable:
        name = groups[at].metadata.name
        if name is None and granularity != "model":
            return at
        return pool_key(name or "", granularity)

    @functools.cache
    def members(granularity: str) -> dict[Hashable, list[int]]:
        pools: dict[Hashable, list[int]] = {}
        for at in range(len(groups)):
            pools.setdefault(key(at, granularity), []).append(at)
        return pools

    @functools.cache
    def pooled(
        pool: Hashable, granularity: str, exclude: tuple[str, ...], pair: Hashable
    ) -> torch.Tensor | None:
        chosen = [
            norms[at, pair]
            for at in members(granularity)[pool]
            if counted_as.get((at, pair)) == at
            and not is_excluded(groups[at].metadata.name or "", exclude)
        ]
        # Sorted, so that the order of the groups does not show in the last bits.
        return torch.stack(chosen).sort().values.sum() if chosen else None

    found = []
    for at, (group, chosen) in enumerate(zip(groups, settings, strict=True)):
        values = [
            pooled(
                key(counted_as[at, (base_of(group).id, entry.id)], chosen.granularity),
                chosen.granularity,
                chosen.exclude,
                (base_of(group).id, entry.id),
            )
            for entry in group.non_base
        ]
        found.append(None if chosen.power == 0 else _stacked(values))
    return found


def _stacked(values: Sequence[torch.Tensor | None]) -> Measured | None:
    if all(value is None for value in values):
        return None
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return Measured(torch.stack([zero if v is None else v for v in values]))


def _place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Where a tensor's elements lie in memory; distinct for tensors of no elements."""
    if not tensor.numel():
        return (id(tensor),)
    start = tensor.data_ptr(), tensor.device, tensor.dtype
    return (*start, tensor.shape, tensor.stride())
