"""Where n_t comes from: stored checkpoints, the tensors at hand, or those of a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from mergekit_metagpt import kernels
from mergekit_metagpt.names import (
    idle_parts,
    is_embedding,
    is_excluded,
    layer_key,
    pool_key,
)
from mergekit_metagpt.parameters import Settings

if TYPE_CHECKING:
    from mergekit_metagpt.results import PairNorms

# Elements compared to tell a layer from another one.
PROBE = 1000


@dataclass(frozen=True)
class Measured:
    """Squared norms of one pool.

    Attributes:
        sq_norms: n_t, shape `(K,)`, float64, on the CPU.
        embeddings: the share of each n_t that token embeddings and heads hold, where
            the pool is a whole stored model; else empty.
        idle: parts of `exclude` that are in the name of no stored tensor.
    """

    sq_norms: torch.Tensor
    embeddings: tuple[float, ...] = ()
    idle: tuple[str, ...] = ()


def base_of(group: TensorGroup) -> TensorEntry:
    """Return the base entry, which the methods' input contract guarantees."""
    assert group.base is not None
    return group.base


def are_references(ids: Sequence[Hashable]) -> bool:
    """Whether the ids are references to models, as in merges from files."""
    common = sys.modules.get("mergekit.common")
    return common is not None and all(
        isinstance(model, common.ModelReference) for model in ids
    )


def forget_failures() -> None:
    """Let a new merge try again what failed in an earlier one."""
    from mergekit_metagpt import scanning

    scanning.forget_failures()


def check_headers(ids: Sequence[Hashable], base: Hashable) -> None:
    """Check by their headers that the open models among the inputs fit the base.

    Args:
        ids: the inputs of a slice, the base among them.
        base: which of them is the base.

    Raises:
        ValueError: a model is quantised, does not fit the base, or its config.json
            does not fit what it stores.
        OSError: a file is missing, truncated, or changed since it was opened.
    """
    from mergekit_metagpt import alignment, checkpoints

    opened = {model: checkpoints.already_open(model) for model in ids}
    for checkpoint in opened.values():
        if checkpoint is not None and checkpoint.refused:
            raise ValueError(checkpoint.refused)
    reference = opened.pop(base)
    if reference is None:
        return
    reference.verify_unchanged()
    for model in opened.values():
        if model is not None:
            model.verify_unchanged()
            alignment.check_pair(reference, model)


def of_group(group: TensorGroup, settings: Settings) -> Measured | None:
    """n_t of one group of a merge from files: of its checkpoints, or its own.

    Args:
        group: the inputs that make one output tensor.
        settings: its granularity, power and exclude.

    Returns:
        n_t of the pool, or None where norms do not matter: power 0, no model
        beside the base, or a pool of which `exclude` leaves nothing.

    Raises:
        ValueError: a weight is NaN or infinite; the checkpoints are not open, or
            hold nothing of this layer.
        OSError: a checkpoint cannot be read or has changed.
    """
    if not group.non_base:
        return None
    if settings.power == 0:
        _require_finite(group)
        return None
    if settings.granularity == "tensor":
        if is_excluded(group.metadata.name or "", settings.exclude):
            _require_finite(group)
            return None
        return Measured(_own_sq_norms(group))
    return _stored_sq_norms(group, settings)


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


def _own_sq_norms(group: TensorGroup) -> torch.Tensor:
    for entry in group.entries:
        if not entry.tensor.is_floating_point():
            raise TypeError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} is "
                f"{entry.tensor.dtype}; MetaGPT merges floating-point tensors"
            )
    tuned = [entry.tensor for entry in group.non_base]
    norms = kernels.sq_norms(base_of(group).tensor, tuned)
    if not bool(torch.isfinite(norms).all()):
        _require_finite(group)
        raise ValueError(
            f"||tau||^2 of {group.metadata.name or 'a tensor'} exceeds float64: "
            "weights differ from the base's by more than 1e150"
        )
    return norms


def _require_finite(group: TensorGroup) -> None:
    for entry in group.entries:
        if not bool(torch.isfinite(entry.tensor).all()):
            raise ValueError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} holds NaN or "
                "infinity; a merge would spread it. Repair or replace this model"
            )


def require_unchanged(group: TensorGroup) -> None:
    """Check that the files behind a group are those that mergekit opened.

    Args:
        group: the inputs of a merge from files.

    Raises:
        OSError: a file has changed, or is gone.
    """
    from mergekit_metagpt import checkpoints

    for entry in group.entries:
        if checkpoint := checkpoints.already_open(entry.id):
            checkpoint.verify_unchanged()


def _stored_sq_norms(group: TensorGroup, settings: Settings) -> Measured | None:
    from mergekit_metagpt import checkpoints, scanning

    opened = {entry.id: checkpoints.already_open(entry.id) for entry in group.entries}
    if missing := [str(model) for model, found in opened.items() if found is None]:
        raise ValueError(
            f"granularity {settings.granularity!r} measures stored checkpoints, but "
            f"mergekit has none open for {', '.join(missing)}. Give models as files, "
            "or use granularity: tensor"
        )
    known = {model: found for model, found in opened.items() if found is not None}
    base = known.pop(base_of(group).id)
    pairs = scanning.pair_norms(base, list(known.values()))
    if settings.granularity == "model":
        pools = [_pooled(pair, None, settings.exclude) for pair in pairs]
        embeddings = tuple(of_them / (n or 1.0) for n, of_them in pools)
    else:
        name = group.metadata.name or ""
        keys = [pair.layer_of(name) for pair in pairs]
        if any(
            _pooled(pair, key, ())[0] is None
            for pair, key in zip(pairs, keys, strict=True)
        ):
            raise ValueError(
                f"granularity 'layer': no stored tensor of {base.label} belongs to "
                f"the layer of {name}. Use granularity: model or granularity: tensor"
            )
        pools = [
            _pooled(pair, key, settings.exclude)
            for pair, key in zip(pairs, keys, strict=True)
        ]
        embeddings = ()
    if all(n is None for n, _ in pools):
        return None
    values = torch.tensor(
        [n or 0.0 for n, _ in pools], dtype=torch.float64, device="cpu"
    )
    idle = [set(_idle(pair, settings.exclude)) for pair in pairs]
    return Measured(values, embeddings, tuple(sorted(set.intersection(*idle))))


@functools.lru_cache(maxsize=1 << 10)
def _idle(pair: PairNorms, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of `exclude` that are in no name of what base and model share."""
    return idle_parts(exclude, pair.counted_as)


@functools.lru_cache(maxsize=1 << 16)
def _pooled(
    pair: PairNorms, key: str | None, exclude: tuple[str, ...]
) -> tuple[float | None, float]:
    """Sum over a layer, or the model; None if nothing counts. And the embeddings'."""
    chosen = {
        name: value
        for name, value in pair.sq_norms.items()
        if (key is None or layer_key(name) == key) and not is_excluded(name, exclude)
    }
    embeddings = sum(value for name, value in chosen.items() if is_embedding(name))
    return (sum(chosen.values()) if chosen else None), embeddings


def require_same_layer(group: TensorGroup) -> None:
    """Compare a few stored elements with those handed over, under the output's name.

    `slices:` may put a layer of the inputs at another index of the output; the method
    sees only the output's name, under which the scan has the norms of another layer.

    Args:
        group: the inputs of a merge from files that make one output tensor.

    Raises:
        ValueError: the tensors stem from another layer of their checkpoints.
    """
    from mergekit_metagpt import checkpoints

    name = group.metadata.name or ""
    if layer_key(name) == name or group.metadata.vocabulary_axis is not None:
        return
    for entry in group.entries:
        checkpoint = checkpoints.already_open(entry.id)
        if checkpoint is None:
            continue
        if name in checkpoint.renamed:
            own = checkpoint.renamed[name]
            stored = checkpoint.first_elements(own, PROBE).to(entry.tensor.dtype)
            given = entry.tensor.reshape(-1)[:PROBE].to(device="cpu")
            same = torch.equal(stored, given)
        else:
            # Stored in another layout (experts), or the layer does not exist there.
            same = any(layer_key(key) == layer_key(name) for key in checkpoint.renamed)
        if same:
            continue
        raise ValueError(
            f"granularity 'layer': {name} of the output is not {name} of {entry.id}. "
            "Slices that move layers to other indices have no layer-wise norms; use "
            "granularity: model or granularity: tensor"
        )
