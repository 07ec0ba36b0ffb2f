"""Which ranks share the scans that this process asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mergekit_metagpt.scanning.ranks import Group

T = TypeVar("T")
# Groups that share scans, the innermost last; None where each rank scans alone.
_SHARING: list[Group | None] = []


@contextmanager
def among(group: Group | None) -> Iterator[None]:
    """Let a group share the scans that all of its ranks ask for, in the same order.

    With None, each process scans for itself.
    """
    before = _SHARING[:]
    _SHARING.append(group)
    try:
        yield
    finally:
        _SHARING[:] = before


def stop_sharing() -> None:
    """Let this rank, which goes on without the others, scan for itself."""
    _SHARING.clear()


def group() -> Group | None:
    """Return the group that shares scans now, or None."""
    return _SHARING[-1] if _SHARING else None


def leads() -> bool:
    """Return whether this rank keeps what the group that shares scans found."""
    sharers = group()
    return sharers is None or sharers.leads


def from_leader(function: Callable[[], T]) -> T:
    """Call a function on rank 0 of the group that shares scans; all get its result."""
    sharers = group()
    if sharers is None:
        return function()
    result: Any = function() if sharers.leads else None
    return sharers.share(result)


@contextmanager
def leader_first() -> Iterator[None]:
    """Let rank 0 of the group that shares scans go first, and the others after it.

    For work that leaves files behind of which the others make use.
    """
    sharers = group()
    if sharers is not None and not sharers.leads:
        sharers.share(None)
    yield
    if sharers is not None and sharers.leads:
        sharers.share(None)
