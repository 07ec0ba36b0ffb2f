"""Remembers what follows from open checkpoints, for as long as these are open."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")


T = TypeVar("T")


def while_open(find: Callable[P, T]) -> Callable[P, T]:
    """Remember what a function of checkpoints returns, without keeping them open.

    An ordinary cache would hold the checkpoints of earlier merges, and so the files
    that they map. Threads may find the same twice; errors are not remembered.

    Args:
        find: takes one or more objects that weak references can point to, which tell
            each other apart by identity, and returns nothing that holds one of them.

    Returns:
        the function, with a method `cache_clear()`.

    Example:
        >>> class Opened: ...
        >>> @while_open
        ... def number_of(opened):
        ...     return next(numbers)
        >>> numbers, first = iter([1, 2]), Opened()
        >>> number_of(first), number_of(first), number_of(Opened())
        (1, 1, 2)
    """
    lock = threading.Lock()
    kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def remembering(*opened: Any) -> Any:
        with lock:
            level = kept
            for one in opened[:-1]:
                level = level.setdefault(one, weakref.WeakKeyDictionary())
            if opened[-1] in level:
                return level[opened[-1]]
        found = cast(Callable[..., T], find)(*opened)
        with lock:
            level[opened[-1]] = found
        return found

    def cache_clear() -> None:
        with lock:
            kept.clear()

    remembering.cache_clear = cache_clear  # type: ignore[attr-defined]
    return cast(Callable[P, T], remembering)
