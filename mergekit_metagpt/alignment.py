"""Pairs the tensors of base and model: same weight, same rows, every weight once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mergekit_metagpt.checkpoints import Checkpoint
from mergekit_metagpt.files import Readers, StoredTensor

# Below this share of covered parameters, base and model are taken for strangers.
MIN_COVERED = 0.5


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that counts in n_t: where base and model store it, and the overlap."""

    name: str
    base: StoredTensor
    model: StoredTensor
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Flatten the part of either tensor that both have."""
        for axis, size in enumerate(self.shape):
            tensor = tensor.narrow(axis, 0, size)
        return tensor.reshape(-1)


@dataclass(frozen=True)
class Alignment:
    """What base and model share.

    Attributes:
        shared: the tensors that count, in name order.
        counted_as: for each output name that both have, the name under which it
            counts: its own, or its embedding's for a tied head.
    """

    shared: tuple[SharedTensor, ...]
    counted_as: Mapping[str, str]


def _overlap(base: tuple[int, ...], model: tuple[int, ...]) -> tuple[int, ...] | None:
    differing = sum(b != m for b, m in zip(base, model, strict=False))
    if len(base) != len(model) or differing > 1:
        return None
    return tuple(min(b, m) for b, m in zip(base, model, strict=True))


@functools.lru_cache(maxsize=1024)
def check_pair(base: Checkpoint, model: Checkpoint) -> None:
    """Check from headers that model is a fine-tune of base.

    Args:
        base: the base.
        model: the model.

    Raises:
        ValueError: they share less than half of their parameters, or a tensor differs
            in more than one axis; names the share and the first mismatching tensors.
    """
    covered, mismatches = 0, []
    for name, tensor in model.tensors.items():
        partner = base.tensors.get(name)
        if partner is None:
            mismatches.append(f"{name} is not in {base.label}")
            continue
        shape = _overlap(partner.shape, tensor.shape)
        if shape is None:
            mismatches.insert(
                0, f"{name} is {list(tensor.shape)}, in the base {list(partner.shape)}"
            )
            continue
        covered += math.prod(shape)
    totals = [sum(t.numel for t in c.tensors.values()) for c in (base, model)]
    share = covered / max(*totals, 1)
    differs = bool(mismatches) and "in the base" in mismatches[0]
    if share < MIN_COVERED or differs:
        if not mismatches:
            mismatches = [
                f"{name} is not in {model.label}"
                for name in base.tensors
                if name not in model.tensors
            ]
        raise ValueError(
            f"{model.label} is no fine-tune of {base.label}: {share:.1%} of the "
            f"parameters match; first differences: {'; '.join(mismatches[:3])}. Give "
            "the base that it was trained from"
        )


def _roots(checkpoint: Checkpoint, readers: Readers) -> dict[str, str]:
    """For each output name, the stored tensor that it is: its own or a tied one."""
    tensors = checkpoint.tensors
    roots = {
        name: tensor.shares if tensor.shares and tensor.shares in tensors else name
        for name, tensor in tensors.items()
    }
    for name, partners in checkpoint.tied_names.items():
        own = tensors.get(name)
        for partner in partners:
            other = tensors.get(partner)
            if other is None or (own and not _same_bits(own, other, readers)):
                continue
            roots[name] = roots[partner]
            break
    return roots


def _same_bits(first: StoredTensor, second: StoredTensor, readers: Readers) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(readers.read(first), readers.read(second))


def align(base: Checkpoint, model: Checkpoint, readers: Readers) -> Alignment:
    """Pair the tensors of base and model; a weight counts once.

    Every floating-point tensor that both store (or stand in for by a tie) is paired by
    its output name. Where base and model both mean the same two stored tensors by two
    names, as with a tied head, the pair counts under the first. Reads tensors only to
    tell whether a stored head equals its embedding.

    Args:
        base: the base.
        model: a fine-tune of it.
        readers: the files of this scan.

    Returns:
        the pairs.

    Raises:
        ValueError: as `check_pair`.
        OSError: a file cannot be read.
    """
    check_pair(base, model)
    base_roots, model_roots = _roots(base, readers), _roots(model, readers)
    tied = {*base.tied_names, *model.tied_names}
    counted: dict[tuple[str, str], SharedTensor] = {}
    counted_as: dict[str, str] = {}
    for name in sorted(base_roots.keys() & model_roots, key=lambda n: (n in tied, n)):
        roots = base_roots[name], model_roots[name]
        if roots not in counted:
            first, second = base.tensors[roots[0]], model.tensors[roots[1]]
            shape = _overlap(first.shape, second.shape)
            if shape is None:
                raise ValueError(
                    f"{name} is {list(second.shape)} in {model.label} and "
                    f"{list(first.shape)} in {base.label}; only one axis may differ"
                )
            counted[roots] = SharedTensor(name, first, second, shape)
        counted_as[name] = counted[roots].name
    return Alignment(
        shared=tuple(sorted(counted.values(), key=lambda pair: pair.name)),
        counted_as=counted_as,
    )
