"""Finds n_t of tensors in memory, pooled over the groups of one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.method.group_norms import Measured, gram_of, of_tensors
from mergekit_metagpt.method.inputs import base_of
from mergekit_metagpt.method.settings import Settings
from mergekit_metagpt.scanning.results import ScanResult


def of_call(
    groups: Sequence[TensorGroup], settings: Sequence[Settings]
) -> list[Measured | None]:
    """n_t of every group of one call in memory, pooled over the groups of the call.

    Entries that share storage, in the base and in the model, count once.

    Args:
        groups: the tensors of the model, or one of them.
        settings: of each group.

    Returns:
        n_t of each group's pool, or None where norms do not matter; differentiable
        where inputs require it.

    Raises:
        TypeError: an input is not floating point.
        ValueError: a weight is NaN or infinite.
    """
    keep = any(chosen.keeps_length for chosen in settings)
    result, columns = _measured(groups, gram=keep)
    answers: list[Measured | None] = []
    for at, (group, chosen) in enumerate(zip(groups, settings, strict=True)):
        pooled = result.pool(chosen.granularity, chosen.exclude)
        norms = pooled.sq_norms.reshape(len(pooled.keys), len(result.models))
        own, keys = [], []
        at_columns = [columns[base_of(group).id, entry.id] for entry in group.non_base]
        for column in at_columns:
            name = result.counted_as[column][_name(group, at)]
            key = pooled.key_of(name)
            keys.append(key)
            measured = bool(pooled.members.get(key))
            own.append(norms[pooled.rows[key], column] if measured else None)
        if not chosen.needs_norms or all(value is None for value in own):
            answers.append(None)
            continue
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        answers.append(
            Measured(
                torch.stack([zero if n is None else n for n in own]),
                gram=pooled.products(keys, at_columns) if chosen.keeps_length else None,
            )
        )
    return answers


def _measured(
    groups: Sequence[TensorGroup], *, gram: bool
) -> tuple[ScanResult, dict[tuple[Hashable, Hashable], int]]:
    """Squared norms of every pair of base and model, and the column of each pair."""
    columns: dict[tuple[Hashable, Hashable], int] = {}
    for group in groups:
        for entry in group.non_base:
            columns.setdefault((base_of(group).id, entry.id), len(columns))
    names = [_name(group, at) for at, group in enumerate(groups)]
    own = [of_tensors(group) for group in groups]
    products = [gram_of(group) for group in groups] if gram else []
    # Groups without a name in the order of their norms, so that the order of the call
    # does not show in the last bits.
    order = sorted(
        range(len(groups)),
        key=lambda at: (groups[at].metadata.name or "", own[at].tolist(), at),
    )
    row = {at: n for n, at in enumerate(order)}
    cells: list[list[torch.Tensor]] = [
        [torch.zeros((), dtype=torch.float64, device="cpu")] * len(columns)
        for _ in groups
    ]
    grams = torch.zeros(
        len(groups), len(columns), len(columns), dtype=torch.float64, device="cpu"
    )
    counted_as: list[dict[str, str]] = [{} for _ in columns]
    places: dict[tuple[Hashable, ...], str] = {}
    # A shared weight goes by one of its names, whatever the order of the groups: a
    # tied head by its embedding's.
    for at in sorted(order, key=lambda at: ("head" in names[at], row[at])):
        group, counted = groups[at], []
        for k, (entry, value) in enumerate(zip(group.non_base, own[at], strict=True)):
            column = columns[base_of(group).id, entry.id]
            place = column, _place(base_of(group).tensor), _place(entry.tensor)
            counted_as[column][names[at]] = places.setdefault(place, names[at])
            if places[place] == names[at]:
                cells[row[at]][column] = value
                counted.append((k, column))
        for k, column in counted if gram else ():
            for other, other_column in counted:
                grams[row[at], column, other_column] = products[at][k, other]
    shape = len(groups), len(columns)
    values = [value for cell in cells for value in cell]
    sums = (
        torch.stack(values)
        if values
        else torch.zeros(0, dtype=torch.float64, device="cpu")
    )
    return (
        ScanResult(
            base="",
            models=tuple(str(model) for _, model in columns),
            names=tuple(names[at] for at in order),
            sq_norms=sums.reshape(shape),
            base_sq_norms=torch.zeros(shape, dtype=torch.float64, device="cpu"),
            counted_as=tuple(counted_as),
            layers=({},) * len(columns),
            gram=grams if gram else None,
        ),
        columns,
    )


def _name(group: TensorGroup, at: int) -> str:
    """The name of a group; one of its own for a group without."""
    return f"tensor {at}" if group.metadata.name is None else group.metadata.name


def _place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Where a tensor's elements lie in memory; distinct for tensors of no elements."""
    if not tensor.numel():
        return (id(tensor),)
    start = tensor.data_ptr(), tensor.device, tensor.dtype
    return (*start, tensor.shape, tensor.stride())
