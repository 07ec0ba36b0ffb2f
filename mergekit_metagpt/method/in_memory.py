"""Finds n_t for tensors in memory, pooled over the groups of one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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

    Entries that share storage, in the base and in the model, count once. None stands
    where norms do not matter. Differentiable if inputs are. Raises as `of_tensors`.
    """
    keep = any(setting.keeps_length for setting in settings)
    result, columns = _measured(groups, gram=keep)
    answers: list[Measured | None] = []
    for at, (group, setting) in enumerate(zip(groups, settings, strict=True)):
        pooled = result.pool(setting.granularity, setting.exclude)
        models = [columns[base_of(group).id, entry.id] for entry in group.non_base]
        counted = (result.counted_as[column][_name(group, at)] for column in models)
        keys = [pooled.key_of(name) for name in counted]
        if not setting.needs_norms or not any(map(pooled.members.get, keys)):
            answers.append(None)
            continue
        gram = pooled.products(keys, models) if setting.keeps_length else None
        answers.append(Measured(pooled.of_models(keys, models), gram=gram))
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
