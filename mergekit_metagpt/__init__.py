"""MetaGPT merging for mergekit: scaling coefficients in closed form, without data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_metagpt.arithmetic.closed_form import coefficients
    from mergekit_metagpt.method.registration import register
    from mergekit_metagpt.scanning.once import scan
    from mergekit_metagpt.scanning.results import ScanResult

__all__ = ["ScanResult", "coefficients", "register", "scan"]
__version__ = "0.1.0"

_HOMES = {
    "ScanResult": "scanning.results",
    "coefficients": "arithmetic.closed_form",
    "register": "method.registration",
    "scan": "scanning.once",
}


def __getattr__(name: str) -> Any:
    # Every `import torch` of the environment imports this package: keep it light.
    if name in _HOMES:
        if name == "register":
            # Importing mergekit's methods makes our hook import this module; it would
            # find it half imported if this module were the first to import them.
            importlib.import_module("mergekit.merge_methods")
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
