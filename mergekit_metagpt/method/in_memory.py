"""Finds n_t for tensors in memory, pooled over the groups of one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.method.group_norms import Measured, gram_of, of_tensors
from mergekit_metagpt.method.inputs import base_of
from mergekit_metagpt.method.settings import Settings
from mergekit_metagpt.scanning.at_hand import Row, result_of
from mergekit_metagpt.scanning.results import ScanResult


def of_call(
    groups: Sequence[TensorGroup], settings: Sequence[Settings]
) -> list[Measured | None]:
    """Measure n_t for every group of one call, pooled over the groups of the call.

    Entries that share storage, in the base and in the model, count once.

    Args:
        groups: all tensors of the model, or some.
        settings: settings for each group.

    Returns:
        n_t of each group's pool, or None if norms do not matter; differentiable
        if inputs are.

    Raises:
        TypeError: an input is not floating point.
        ValueError: a weight is NaN or infinite.
    """
    keep = any(setting.keeps_length for setting in settings)
    result, columns = _measured(groups, gram=keep)
    answers: list[Measured | None] = []
    for at, (group, setting) in enumerate(zip(groups, settings, strict=True)):
        pooled = result.pool(setting.granularity, setting.exclude)
        norms = pooled.sq_norms.reshape(len(pooled.keys), len(result.models))
        own, keys = [], []
        at_columns = [columns[base_of(group).id, entry.id] for entry in group.non_base]
        for column in at_columns:
            name = result.counted_as[column][_name(group, at)]
            key = pooled.key_of(name)
            keys.append(key)
            measured = bool(pooled.members.get(key))
            own.append(norms[pooled.rows[key], column] if measured else None)
        if not setting.needs_norms or all(value is None for value in own):
            answers.append(None)
            continue
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        keeps = setting.keeps_length
        answers.append(
            Measured(
                torch.stack([zero if n is None else n for n in own]),
                gram=pooled.products(keys, at_columns) if keeps else None,
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
    rows = [
        Row(
            name=_name(group, at),
            base=base_of(group).tensor,
            models={
                columns[base_of(group).id, entry.id]: entry.tensor
                for entry in group.non_base
            },
            sq_norms=of_tensors(group),
            gram=gram_of(group) if gram else None,
            sort_key=group.metadata.name or "",
        )
        for at, group in enumerate(groups)
    ]
    labels = [str(model) for _, model in columns]
    return result_of(rows, labels, gram=gram), columns


def _name(group: TensorGroup, at: int) -> str:
    """The name of a group, or a unique one for a group without a name."""
    return f"tensor {at}" if group.metadata.name is None else group.metadata.name
