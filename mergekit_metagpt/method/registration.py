"""Registers the methods with mergekit, once."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from mergekit_metagpt.method.composed import COMPOSED, ComposedMerge
from mergekit_metagpt.method.metagpt import MetaGPTMerge

_METHODS: dict[str, MetaGPTMerge] = {}
_LOCK = threading.Lock()


def register(registry: Any | None = None) -> None:
    """Register `metagpt` and the composed methods; calling it again is harmless.

    Args:
        registry: the module `mergekit.merge_methods.registry`; imported if None.

    Raises:
        ValueError: another method is registered under one of these names.
        ImportError: mergekit cannot be imported.
    """
    if registry is None:
        registry = importlib.import_module("mergekit.merge_methods.registry")
    with _LOCK:
        if not _METHODS:
            methods = [MetaGPTMerge()]
            methods += [ComposedMerge(registry.get(name)) for name in COMPOSED]
            _METHODS.update((method.spec.name, method) for method in methods)
        registered = registry.registered_methods()
        for method in _METHODS.values():
            if method not in registered:
                registry.register(method)
