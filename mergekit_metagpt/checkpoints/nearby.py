"""Finds what was meant by a path that is not there; reads no file."""

from __future__ import annotations

import difflib
from pathlib import Path


def nearest(path: Path, *, folders: bool = False) -> str | None:
    """Name the file or folder beside it that is called much like a path.

    Upper and lower case count as equal, and backslashes as slashes. A folder above it
    may be misspelt, too.

    Args:
        path: what does not exist.
        folders: whether only a folder can be meant.

    Returns:
        a path with a leading `./`, which tells a folder from a repository, unless it is
        absolute; None where nothing is called alike.
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
    for entry in sorted(above.iterdir()) if above.is_dir() else []:
        if entry.is_dir() or not folders:
            names.setdefault(entry.name.lower(), entry.name)
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.75)
    if not close:
        return None
    # pathlib drops the leading ./
    meant = str(path.with_name(names[close[0]]))
    return meant if meant.startswith((".", "/", "~")) else f"./{meant}"
