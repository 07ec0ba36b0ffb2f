"""Merges the tensors of this rank into files; a complete file has a manifest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mergekit.graph import Executor, TaskUniverse
from mergekit.io import TensorWriter
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.merge_config import dividing, plan
from mergekit_metagpt.scanning import ranks

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

# Tells which run works in a folder.
TOKEN = "token"
# Lists the names in the model of finished files.
NAMES = "names.json"
# Another node may see a new file only after so many seconds.
SEEN_S = 90.0


class Manifest(BaseModel):
    """A file that is complete.

    Attributes:
        key: key of its shard.
        file: its name; None if no tensor of the shard was written.
        bytes: its size.
        weights: bytes of its tensors.
        names: names of its tensors.
    """

    key: str
    file: str | None
    bytes: int
    weights: int
    names: list[str]


def await_token(folder: Path, token: str, group: ranks.Group) -> None:
    """Wait for the folder that rank 0 has made; ValueError if it never appears."""
    until = time.monotonic() + min(SEEN_S, ranks.timeout())
    while not holds(folder, token):
        if group.leads:
            raise ValueError(_taken_over(folder))
        group.check()
        if time.monotonic() > until:
            raise ValueError(
                f"{folder}, which rank 0 has made, does not appear here. All nodes "
                "must share the file system of OUT; expected one like NFS or Lustre"
            )
        time.sleep(0.25)


def require_none(folder: Path) -> None:
    """Refuse a folder in which an earlier run was working."""
    if folder.exists():
        raise ValueError(
            f"{folder} holds an unfinished merge (with --resume or under torchrun), "
            f"of which {len(manifest_files(folder))} files are finished. Give --resume "
            "to go on from them, or remove that folder"
        )


def _taken_over(folder: Path) -> str:
    return (
        f"another merge works in {folder}, or removed it. Wait for it, then run this "
        "again"
    )


def holds(folder: Path, token: str) -> bool:
    """Whether the run with this token works in a folder."""
    try:
        return (folder / TOKEN).read_text() == token
    except OSError:
        return False


def manifest_files(folder: Path) -> list[Path]:
    """The manifests in a folder, of which there is one for each finished file."""
    return list(folder.glob("shard-*.json"))


def finished(folder: Path) -> dict[str, Manifest]:
    """Find the complete files of an earlier run: their manifests by key."""
    found = {}
    for path in manifest_files(folder):
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
            file = manifest.file and folder / manifest.file
            if not file or file.stat().st_size == manifest.bytes:
                found[manifest.key] = manifest
        except (OSError, ValidationError):
            continue
    return found


def write(
    parts: Sequence[dividing.Part],
    shards: Sequence[dividing.Shard],
    folder: Path,
    options: MergeOptions,
    group: ranks.Group,
    *,
    token: str,
    reused: Mapping[str, Manifest],
) -> list[Manifest]:
    """Merge the tensors of this rank by mergekit's own tasks, file by file.

    Args:
        parts: all tensors of the merge.
        shards: shards of this rank.
        folder: folder in which all ranks work.
        options: mergekit's own, for this rank.
        group: group of this rank.
        token: token of this run.
        reused: manifests of complete files, by key.

    Returns:
        a manifest for each shard.

    Raises:
        ValueError: mergekit cannot merge a tensor; another rank has failed; another
            run works in the folder.
        OSError: a file cannot be read or written.
    """
    import transformers

    if options.random_seed is not None:  # as mergekit's `run_merge` does
        transformers.trainer_utils.set_seed(options.random_seed)
    written, done = [], 0
    for number, shard in enumerate(shards, start=1):
        if manifest := reused.get(shard.key):
            written.append(manifest)
            continue
        desc = f"file {number} of {len(shards)} of rank {group.rank}"
        quiet = options.quiet or not group.leads
        with _writer(folder, f"shard-{shard.key}", options) as writer:
            if any(part.drawn for part in parts):
                for at in shard.parts:
                    dividing.skip(sum(part.drawn for part in parts[done:at]))
                    done = at + 1
                    _merge(parts, [at], writer, options, group, quiet=True)
            else:
                _merge(parts, shard.parts, writer, options, group, desc, quiet=quiet)
        if not holds(folder, token):
            raise ValueError(_taken_over(folder))
        written.append(_note(folder, shard, writer))
    return written


def _merge(
    parts: Sequence[dividing.Part],
    positions: Sequence[int],
    writer: TensorWriter,
    options: MergeOptions,
    group: ranks.Group,
    desc: str = "",
    *,
    quiet: bool,
) -> None:
    tasks = [parts[at].task for at in positions]
    universe = TaskUniverse(tasks)
    writers = {universe.add_task(task.writer_task) for task in tasks}
    executor = Executor(
        [universe.add_task(task) for task in tasks],
        math_device=torch.device(options.device or "cpu"),
        storage_device=torch.device(
            (options.low_cpu_memory and options.device) or "cpu"
        ),
        cached_values=dict.fromkeys(writers, writer),
    )
    with plan.mergekits_errors():
        for _ in executor.run(quiet=quiet, desc=desc):
            group.check()


@contextmanager
def _writer(folder: Path, name: str, options: MergeOptions) -> Iterator[TensorWriter]:
    """mergekit's writer, for a single file that gets its name once it is complete."""
    writer = TensorWriter(
        str(folder),
        max_shard_size=0,
        safe_serialization=options.safe_serialization,
        override_basename=name,
        use_async=options.async_write,
    )
    try:
        yield writer
        with plan.mergekits_errors():
            writer.finalize()
    except BaseException:
        for path in folder.glob(f"{name}*"):
            path.unlink(missing_ok=True)  # makes room on a full disk
        raise


def _note(folder: Path, shard: dividing.Shard, writer: TensorWriter) -> Manifest:
    """Write the manifest of a file, once the file is on the disk."""
    made = [p for p in folder.glob(f"shard-{shard.key}.*") if p.suffix != ".json"]
    for path in made:
        _sync(path)
    manifest = Manifest(
        key=shard.key,
        file=made[0].name if made else None,
        bytes=made[0].stat().st_size if made else 0,
        weights=writer.total_size,
        names=list(writer.weight_map),
    )
    path = folder / f"shard-{shard.key}.json"
    temporary = folder / f"manifest-{shard.key}"  # a kill may leave it
    temporary.write_text(manifest.model_dump_json())
    _sync(temporary)
    temporary.replace(path)
    return manifest


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def assemble(
    manifests: Sequence[Manifest], folder: Path, made: Path, *, safe: bool
) -> None:
    """Move complete files into the model under the usual names, and index them."""
    held = [manifest for manifest in manifests if manifest.file]
    prefix, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    total = len(held)
    names = {
        str(manifest.file): f"{prefix}.{ending}"
        if total == 1
        else f"{prefix}-{number:05d}-of-{total:05d}.{ending}"
        for number, manifest in enumerate(held, start=1)
    }
    for manifest in held:
        _await_file(folder / str(manifest.file), manifest.bytes)
    if total > 1:
        index = {
            "metadata": {
                "total_size": sum(manifest.weights for manifest in held),
                "mergekit_version": version("mergekit"),
            },
            "weight_map": {
                name: names[str(manifest.file)]
                for manifest in held
                for name in manifest.names
            },
        }
        text = json.dumps(index, indent=2)
        (made / f"{prefix}.{ending}.index.json").write_text(text)
    (folder / NAMES).write_text(json.dumps(names))
    for old, new in names.items():
        (folder / old).rename(made / new)


def _await_file(path: Path, size: int) -> None:
    """Wait until this node sees a file that another one has written."""
    until = time.monotonic() + SEEN_S
    while not (path.exists() and path.stat().st_size == size):
        if time.monotonic() > until:
            raise OSError(f"{path}, which another rank has written, does not appear")
        time.sleep(0.25)


def take_apart(folder: Path, made: Path) -> None:
    """Move back the files of a run that ended after it had begun to `assemble`."""
    try:
        names = json.loads((folder / NAMES).read_text())
    except (OSError, ValueError):
        return
    for old, new in names.items():
        if (made / new).exists():
            (made / new).rename(folder / old)
