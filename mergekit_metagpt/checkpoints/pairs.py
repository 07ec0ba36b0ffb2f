"""Pairs the tensors of base and model, each weight once, from headers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_metagpt.checkpoints.adapters import check_adapter
from mergekit_metagpt.checkpoints.architecture import content, prefix_of
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.files import Readers
from mergekit_metagpt.checkpoints.layouts import Stored, counterparts
from mergekit_metagpt.checkpoints.stored import StoredTensor, layer_key

# Elements to compare first: most different tensors differ here.
PROBE = 1000
# A fine-tune shares at least MIN_COVERED of the parameters with its base. One of the
# two may have more than MAX_FOREIGN of its own, such as a head, but not both.
MIN_COVERED = 0.5
MAX_FOREIGN = 0.1
# Vocabularies may differ in size. But if more than this share of the tensors in layers
# differ in size, the models have different widths, and their overlap means nothing.
MAX_RESIZED = 0.1
# Entries of config.json that explain most differences in shape.
SIZES = ("hidden_size", "intermediate_size", "num_key_value_heads")


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that counts in n_t.

    Attributes:
        name: under which it counts.
        base: where the base stores it.
        model: where the model stores it.
        shape: the overlap of both.
    """

    name: str
    base: Stored
    model: Stored
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def divisible(self) -> bool:
        """Whether parts can be read without converting the whole tensor."""
        return all(isinstance(side, StoredTensor) for side in (self.base, self.model))

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the overlap, cut out of either side and flattened."""
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
        layers: for the layers of renamed tensors, the layer under which they count.
    """

    shared: tuple[SharedTensor, ...]
    counted_as: Mapping[str, str]
    layers: Mapping[str, str]


def _overlap(base: tuple[int, ...], model: tuple[int, ...]) -> tuple[int, ...] | None:
    differing = sum(b != m for b, m in zip(base, model, strict=False))
    if len(base) != len(model) or differing > 1:
        return None
    return tuple(min(b, m) for b, m in zip(base, model, strict=True))


def check_family(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Check from headers that models are fine-tunes of base, and each is given once.

    Raises a ValueError if two are the same files under different spellings, and as
    `check_pair`.
    """
    _check_distinct(base, models)
    for model in models:
        check_pair(base, model)


def _check_distinct(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    owners: dict[frozenset[tuple[object, ...]], Checkpoint] = {}
    for checkpoint in (base, *models):
        files = frozenset(
            (f.inode, f.size, f.modified_ns, f.etag) for f in checkpoint.identity
        )
        other = owners.setdefault(files, checkpoint)
        if other is base and checkpoint is not base:
            raise ValueError(
                f"{checkpoint.label} is the base {base.label} under another name. "
                "Spell it like the base, or leave it out"
            )
        if other is not checkpoint:
            raise ValueError(
                f"{checkpoint.label} and {other.label} are the same files, and would "
                "count twice. List one of them"
            )


def check_pair(base: Checkpoint, model: Checkpoint) -> None:
    """Check from headers that model is a fine-tune of base.

    Args:
        base: the base; without tensors if it was not opened, for adapters alone.
        model: the model.

    Raises:
        ValueError: they share less than half of their parameters, both have many that
            the other lacks, layers have other widths, or a tensor differs in more than
            one axis. The message has the share and the first differences.
    """
    if model.adapter is not None:
        if base.tensors:
            check_adapter(base, model)
        return
    shared = counterparts(base, model)
    covered, differing, resized = 0, [], []
    for name, (ours, theirs) in sorted(shared.items()):
        shape = _overlap(ours.shape, theirs.shape)
        difference = f"{name} is {list(theirs.shape)}, in the base {list(ours.shape)}"
        if shape is None:
            differing.append(difference)
            continue
        covered += math.prod(shape)
        # An empty tensor was saved wrongly, which another check reports.
        if ours.shape != theirs.shape and layer_key(name) != name and 0 not in shape:
            resized.append(difference)
    if len(resized) > MAX_RESIZED * sum(layer_key(name) != name for name in shared):
        differing += resized
    totals = [sum(t.numel for t in c.tensors.values()) for c in (base, model)]
    share = covered / max(*totals, 1)
    foreign = (min(totals) - covered) / max(*totals, 1)
    if share >= MIN_COVERED and foreign <= MAX_FOREIGN and not differing:
        return
    absent = [
        f"{name} is not in {owner.label}"
        for owner, other in ((base, model), (model, base))
        for name in other.tensors
        if name not in shared
    ]
    advice = "Give the base that it was trained from"
    for one, other in ((base, model), (model, base)):
        if prefix := prefix_of(one.tensors, other.tensors):
            advice = (
                f"All names of {one.label} begin with {prefix!r}: store its tensors "
                "without it"
            )
    raise ValueError(
        f"{model.label} is not a fine-tune of {base.label}: {share:.1%} of the "
        f"parameters match; first differences: {'; '.join([*differing, *absent][:3])}. "
        f"{_sizes(base, model)}{advice}"
    )


def _sizes(base: Checkpoint, model: Checkpoint) -> str:
    """A sentence on the sizes in which two configurations differ, or nothing."""
    ours, theirs = (
        {} if checkpoint.folder is None else content(checkpoint.folder)
        for checkpoint in (base, model)
    )
    differing = [
        f"{name} is {theirs[name]} (in the base {ours[name]})"
        for name in SIZES
        if name in ours and name in theirs and ours[name] != theirs[name]
    ]
    return f"By config.json, {', '.join(differing)}. " if differing else ""


def _roots(
    tensors: Mapping[str, Stored],
    tied_names: Mapping[str, tuple[str, ...]],
    same_bits: Callable[[Stored, Stored], bool],
) -> dict[str, str]:
    """The stored tensor behind each output name: its own, or one that it is tied to."""
    roots = {}
    for name, tensor in tensors.items():
        shares = tensor.shares if isinstance(tensor, StoredTensor) else None
        roots[name] = shares if shares in tensors and shares else name
    for name, partners in tied_names.items():
        own = tensors.get(name)
        for partner in partners:
            other = tensors.get(partner)
            if other is None or (own and not same_bits(own, other)):
                continue
            roots[name] = roots[partner]
            break
    return roots


def same_bits(first: Stored, second: Stored, readers: Readers) -> bool:
    """Whether two stored tensors, such as a head and an embedding, are equal.

    Precision, shape and all elements count. Raises an OSError if a file cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    ours, theirs = readers.read(first).reshape(-1), readers.read(second).reshape(-1)
    # Compare the beginning first: `torch.equal` reads to the end in any case.
    return torch.equal(ours[:PROBE], theirs[:PROBE]) and torch.equal(ours, theirs)


def align(
    base: Checkpoint,
    model: Checkpoint,
    readers: Readers,
    same: Callable[[Stored, Stored], bool] | None = None,
) -> Alignment:
    """Pair the tensors of base and model; a weight counts once.

    Every floating-point tensor that both have, stored or by a tie, is paired by its
    output name. If two names mean the same stored tensors in base and model, as with a
    tied head, the pair counts once, under the first. Tensors are read only to find out
    whether a stored head equals its embedding.

    Args:
        base: the base.
        model: a fine-tune of it.
        readers: the files of this scan.
        same: compares a head with its embedding; `same_bits` if None.

    Returns:
        the pairs.

    Raises:
        ValueError: as `check_pair`.
        OSError: a file cannot be read.
    """
    check_pair(base, model)
    shared = counterparts(base, model)
    ours = {**base.tensors, **{name: pair[0] for name, pair in shared.items()}}
    theirs = {**model.tensors, **{name: pair[1] for name, pair in shared.items()}}
    same = same or functools.partial(same_bits, readers=readers)
    our_roots = _roots(ours, base.tied_names, same)
    their_roots = _roots(theirs, model.tied_names, same)
    tied = {*base.tied_names, *model.tied_names}
    counted: dict[tuple[str, str], SharedTensor] = {}
    counted_as: dict[str, str] = {}
    for name in sorted(our_roots.keys() & their_roots, key=lambda n: (n in tied, n)):
        roots = our_roots[name], their_roots[name]
        if roots not in counted:
            first, second = ours[roots[0]], theirs[roots[1]]
            shape = _overlap(first.shape, second.shape)
            if shape is None:
                raise ValueError(
                    f"{name} is {list(second.shape)} in {model.label} and "
                    f"{list(first.shape)} in {base.label}; only one axis may differ"
                )
            counted[roots] = SharedTensor(name, first, second, shape)
        counted_as[name] = counted[roots].name
    layers: dict[str, str] = {}
    for checkpoint in (base, model):
        for alias, name in checkpoint.renamed.items():
            if name in counted_as:
                counted_as.setdefault(alias, counted_as[name])
                layers.setdefault(layer_key(alias), layer_key(counted_as[name]))
    return Alignment(
        layers=layers,
        shared=tuple(sorted(counted.values(), key=lambda pair: pair.name)),
        counted_as=counted_as,
    )
