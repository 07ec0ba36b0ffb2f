"""What lies on disk: sizes, precisions, versions, tensors that a merge leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.identity import digest_of, fingerprint, hub_revision
from mergekit_metagpt.checkpoints.layouts import counterparts
from mergekit_metagpt.checkpoints.stored import ConvertedTensor, StoredTensor, layer_key
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.parts import natural


def describe(
    model: Checkpoint, base: Checkpoint, sq_norms: Mapping[str, float]
) -> schema.Stored:
    """Describe a checkpoint as it lies on disk.

    Args:
        model: the checkpoint.
        base: the base of the merge, whose architecture says what is written.
        sq_norms: of its task vector by tensor; empty for the base itself.

    Returns:
        the description.

    Raises:
        OSError: a file cannot be read.
    """
    tensors = model.tensors.values()
    precisions: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        precisions[name] = precisions.get(name, 0) + tensor.numel
    return schema.Stored(
        name=model.label,
        source=_source(model),
        parameters=sum(tensor.numel for tensor in tensors),
        bytes=sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors),
        precisions=dict(sorted(precisions.items(), key=lambda found: -found[1])),
        not_written=_not_written(model, base.written, sq_norms),
    )


def _source(model: Checkpoint) -> schema.Source:
    folders = {Path(file.path).parent for file in model.identity}
    revisions = {hub_revision(folder) for folder in folders}
    return schema.Source(
        revision=revisions.pop() if len(revisions) == 1 else None,
        digest=digest_of(model.identity),
        files=tuple(
            schema.File(
                name=found.name,
                bytes=found.size,
                digest=found.digest,
                whole=found.whole,
            )
            for found in map(fingerprint, model.identity)
        ),
    )


def _some(
    tensors: Mapping[str, StoredTensor], share: float | None = None
) -> schema.Tensors:
    return schema.Tensors(
        count=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors.values()),
        bytes=sum(t.numel * t.dtype.itemsize for t in tensors.values()),
        examples=tuple(sorted(tensors, key=natural)[:3]),
        share=share,
    )


def _not_written(
    model: Checkpoint, written: frozenset[str] | None, sq_norms: Mapping[str, float]
) -> schema.Tensors | None:
    """Tensors that mergekit's definition of the architecture does not write."""
    if written is None:
        return None
    # Where the definition has names that are not stored, what lies in their layer in
    # another layout (single experts) may make them.
    made = {layer_key(name) for name in written if name not in model.tensors}
    aliases: dict[str, set[str]] = {}
    for alias, own in model.renamed.items():
        aliases.setdefault(own, set()).add(alias)
    left = {
        name: tensor
        for name, tensor in model.tensors.items()
        if not aliases.get(name, {name}) & written
        and not any(layer_key(alias) in made for alias in aliases.get(name, {name}))
    }
    total = sum(sq_norms.values())
    share = sum(sq_norms.get(name, 0.0) for name in left) / total if total else None
    return _some(left, share)


def unshared(
    checkpoint: Checkpoint, other: Checkpoint, counted_as: Mapping[str, str]
) -> schema.Tensors:
    """Describe the tensors of one checkpoint that another one lacks.

    Args:
        checkpoint: one of base and model.
        other: the other.
        counted_as: output names that the two share.

    Returns:
        tensors that neither it nor a tie nor another layout of it matches.
    """
    used = {tensor.name for n, tensor in checkpoint.tensors.items() if n in counted_as}
    for mine, _ in counterparts(checkpoint, other).values():
        sources = mine.sources if isinstance(mine, ConvertedTensor) else (mine,)
        used.update(source.name for source in sources)
    return _some({n: t for n, t in checkpoint.tensors.items() if t.name not in used})
