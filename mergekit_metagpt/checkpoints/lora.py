"""Merges LoRA adapters through mergekit, and tells a copy of other versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.checkpoints.identity import FileIdentity, digest_of

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Beside the merged copy: of which adapter and base it was made, and how.
RECORD = "metagpt_adapter.json"
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


def merged_copy(
    model: ModelReference,
    cache: str,
    *,
    trust_remote_code: bool,
    dtype: str | None,
) -> Path:
    """Return the folder of a base with its adapter merged; let mergekit make it.

    `dtype` is the precision in which the adapter is merged. Raises a ValueError if it
    cannot be merged, or the copy is of another version.
    """
    assert model.lora is not None
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    folder = Path(cache) / name
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # left by a merge that failed
    new = not folder.exists()
    try:
        model.merged(
            cache_dir=cache,
            trust_remote_code=trust_remote_code,
            lora_merge_dtype=dtype,
        )
        if new:
            text = json.dumps(_made_from(model))
            (folder / RECORD).write_text(text, encoding="utf-8")
    except BaseException as error:
        if new and folder.exists():
            shutil.rmtree(folder)
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise ValueError(
                f"the adapter of {model} cannot be merged into its base: {error}. Does "
                "it belong to this base?"
            ) from error
        raise
    require_current(model, folder)
    return folder


def require_current(model: ModelReference, folder: Path) -> None:
    """Raise a ValueError for a merged copy of an earlier version of adapter or base."""
    try:
        made_from = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):  # mergekit-yaml made it
        made_from = None
    if made_from is None:
        made = max((f.stat().st_mtime_ns for f in folder.glob("*")), default=0)
        assert model.lora is not None
        files = _files(model.lora.path)
        current = all(file.modified_ns <= made for file in files)
    else:
        current = made_from == _made_from(model)
    if not current:
        raise ValueError(
            f"{folder} is a copy of {model} as it was earlier: adapter or base have "
            "changed since. Remove that folder, and the copy is made anew"
        )


def _made_from(model: ModelReference) -> dict[str, str]:
    """Digests of local base and adapter; the names of those on the hub."""
    parts = {"base": model.model, "adapter": model.lora}
    return {
        part: digest_of(files) if (files := _files(path.path)) else str(path)
        for part, path in parts.items()
        if path is not None
    }


def _files(path: str) -> tuple[FileIdentity, ...]:
    files = (file for pattern in _WEIGHTS for file in Path(path).glob(pattern))
    return tuple(map(FileIdentity.of, sorted(files)))
