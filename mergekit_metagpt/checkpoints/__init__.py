"""What lies on disk: headers, values, and which tensors base and model share.

It measures nothing, and it never opens a model that the caller did not name.
"""

__all__ = [
    "checkpoint",
    "files",
    "identity",
    "layouts",
    "opening",
    "pairs",
    "stored",
    "unwritten",
]
