"""What lies on disk: sizes, precisions, versions, tensors that a merge leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.identity import digest_of, fingerprint, hub_revision
from mergekit_metagpt.checkpoints.layouts import counterparts, sources
from mergekit_metagpt.checkpoints.stored import StoredTensor, dtype_name
from mergekit_metagpt.checkpoints.unwritten import left_out
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.parts import natural


def describe(
    model: Checkpoint, written: Collection[str] | None, sq_norms: Mapping[str, float]
) -> schema.Stored:
    """Describe a checkpoint as it lies on disk.

    Args:
        model: the checkpoint.
        written: names under which mergekit reads it, or None if it plans no merge.
        sq_norms: of its task vector by tensor; empty for the base.

    Returns:
        the description.

    Raises:
        OSError: a file cannot be read.
    """
    every = _some(model.tensors)
    return schema.Stored(
        name=model.label,
        source=_source(model),
        parameters=every.parameters,
        bytes=every.bytes,
        precisions=precisions(model),
        not_written=not_written(model, written, sq_norms),
    )


def precisions(model: Checkpoint) -> dict[str, int]:
    """Count the elements of each stored dtype, by its name, the largest first."""
    counts: dict[str, int] = {}
    for tensor in model.tensors.values():
        name = dtype_name(tensor.dtype)
        counts[name] = counts.get(name, 0) + tensor.numel
    return dict(sorted(counts.items(), key=lambda count: -count[1]))


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


def not_written(
    model: Checkpoint, written: Collection[str] | None, sq_norms: Mapping[str, float]
) -> schema.Tensors | None:
    """Describe the tensors of a checkpoint that a merge leaves out.

    Args:
        model: the checkpoint.
        written: names under which mergekit reads it, or None if it plans no merge.
        sq_norms: of its task vector by tensor, if it was measured.

    Returns:
        the description; None if mergekit plans no merge.
    """
    if written is None:
        return None
    left = left_out(model, written)
    total = sum(sq_norms.values())
    share = sum(sq_norms.get(name, 0.0) for name in left) / total if total else None
    return _some(left, share)


def unshared(
    checkpoint: Checkpoint, other: Checkpoint, shared: Collection[str]
) -> schema.Tensors:
    """Describe the tensors of one checkpoint that another one lacks.

    Args:
        checkpoint: one of base and model.
        other: the other.
        shared: output names that the two share.

    Returns:
        tensors that the other lacks under any name and in any layout; none where one
        is an adapter, which stores factors.
    """
    if checkpoint.adapter or other.adapter:
        return _some({})
    used = {tensor.name for n, tensor in checkpoint.tensors.items() if n in shared}
    for mine, _ in counterparts(checkpoint, other).values():
        used.update(source.name for source in sources(mine))
    return _some({n: t for n, t in checkpoint.tensors.items() if t.name not in used})
