"""Suggests what was meant by a path that does not exist; reads no file."""

from __future__ import annotations

import difflib
from pathlib import Path

# Endings by which a path is that of a file of a certain kind.
_KINDS = {".yml": "YAML", ".yaml": "YAML", ".txt": "text", ".jsonl": "text"}


def missing(path: str | Path, expected: str, *, folders: bool = False) -> str:
    """Say that a path does not exist, and what was probably meant.

    Args:
        path: as its user wrote it.
        expected: what should be there.
        folders: whether that is a folder.

    Returns:
        a message without a full stop.
    """
    meant = nearest(Path(path), folders=folders)
    hint = f". Did you mean {meant}?" if meant else ""
    given = str(path)
    shown = given if given == given.strip() else repr(given)  # else blanks are unseen
    return f"{shown} does not exist; expected {expected}{hint}"


def is_local(path: str) -> bool:
    """Whether a model is named by a path, even of a folder that does not exist."""
    place = Path(path)
    return place.exists() or place.is_absolute() or path.startswith((".", "~"))


def nearest(path: Path, *, folders: bool = False) -> str | None:
    """Return the file or folder beside a missing path with the most similar name.

    Case is ignored, and backslashes count as slashes. A folder above it may be
    misspelt, too. Only YAML files are similar to one, and only texts to a text. The
    answer is an absolute path, or one with a leading `./`, which tells a folder from a
    repository; None if no name is similar.
    """
    path = Path(str(path).replace("\\", "/"))
    above = path.expanduser().parent
    if not above.is_dir():
        meant = nearest(path.parent, folders=True)
        if meant is None:
            return None
        path = Path(meant, path.name)
        above = path.expanduser().parent
    names: dict[str, str] = {}
    kind = None if folders else _KINDS.get(path.suffix.lower())
    for entry in sorted(above.iterdir()) if above.is_dir() else []:
        if folders and not entry.is_dir():
            continue
        if kind in (None, _KINDS.get(entry.suffix.lower())):
            names.setdefault(entry.name.lower(), entry.name)
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.75)
    if not close:
        return None
    # pathlib drops the leading ./
    meant = str(path.with_name(names[close[0]]))
    return meant if meant.startswith((".", "/", "~")) else f"./{meant}"
