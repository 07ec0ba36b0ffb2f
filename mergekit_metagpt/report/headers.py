"""Says whether models fit their base, from configurations and headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import counterparts
from mergekit_metagpt.checkpoints.pairs import check_family
from mergekit_metagpt.checkpoints.remote import Glimpse
from mergekit_metagpt.merge_config.families import Family
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.inventory import not_written, precisions, unshared

if TYPE_CHECKING:
    from mergekit.common import ModelReference


def headers_of(
    families: Sequence[Family], seen: Mapping[ModelReference, Glimpse]
) -> tuple[schema.Header, ...]:
    """Describe bases and models; a model of several bases once for each.

    Args:
        families: who is merged with whom.
        seen: every base and model of the families.

    Returns:
        a base, its models, and so on.
    """
    headers = []
    for family in families:
        base = seen[family.base]
        headers.append(_header(base, None))
        headers += [_header(seen[model], base) for model in family.models]
    return tuple({(each.name, each.base): each for each in headers}.values())


def _header(model: Glimpse, base: Glimpse | None) -> schema.Header:
    own = model.checkpoint
    tied = [name in own.tensors for name in own.tied_names]
    sizes = [
        max(own.tensors[name].shape)
        for name in own.vocabulary
        if name in own.tensors and own.tensors[name].shape
    ]
    return schema.Header(
        name=own.label,
        base=None if base is None else base.checkpoint.label,
        commit=model.commit,
        download=model.download,
        parameters=sum(tensor.numel for tensor in own.tensors.values()),
        precisions=precisions(own),
        quantised=model.quantised,
        vocabulary=max(sizes, default=None),
        tied=not all(tied) if tied else None,
        misfit=_misfit(base, model),
        not_written=not_written(own, own.defined or None, {}),
        not_in_base=None if base is None else _unshared(own, base.checkpoint),
        only_in_base=None if base is None else _unshared(base.checkpoint, own),
    )


def _unshared(one: Checkpoint, other: Checkpoint) -> schema.Tensors:
    if one.adapter or other.adapter:
        return unshared(one, other, {})
    tied = (
        name
        for name in one.tensors
        if any(own in other.tensors for own in other.tied_names.get(name, ()))
    )
    return unshared(one, other, {*counterparts(one, other), *tied})


def _misfit(base: Glimpse | None, model: Glimpse) -> str | None:
    if model.quantised or base is None:
        return model.quantised
    try:
        check_family(base.checkpoint, [model.checkpoint])
    except ValueError as error:
        return str(error)
    return None


def require_fit(headers: Sequence[schema.Header]) -> None:
    """Refuse to measure models that do not fit their base.

    Args:
        headers: of all bases and models.

    Raises:
        ValueError: one of them does not.
    """
    for header in headers:
        if header.misfit:
            raise ValueError(f"{header.name} cannot be measured: {header.misfit}")
