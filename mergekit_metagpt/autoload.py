"""Entry point of `torch.backends`: registers the methods when mergekit is imported."""

from __future__ import annotations

import os
from typing import Any

SWITCH = "MERGEKIT_METAGPT_AUTOLOAD"

# Why autoloading did not register the methods, for our own command to say.
failure: str | None = (
    "torch has not loaded it (TORCH_DEVICE_BACKEND_AUTOLOAD=0, or not installed)"
)


def autoload() -> None:
    """Arrange for registration once mergekit's method registry is imported.

    torch calls this at the end of `import torch`. It imports no more than wrapt, and it
    never raises: an error here would break `import torch` for the whole environment.
    """
    global failure
    if os.environ.get(SWITCH, "1") == "0":
        failure = f"{SWITCH}=0 switches it off"
        return
    try:
        import wrapt

        failure = None
        wrapt.register_post_import_hook(_register, "mergekit.merge_methods.registry")
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"


def _register(registry: Any) -> None:
    global failure
    try:
        from mergekit_metagpt.method.registration import register

        register(registry)
    except Exception as error:
        # Raising here would break mergekit for every method.
        failure = f"{type(error).__name__}: {error}"
