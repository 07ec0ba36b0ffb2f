"""Models on disk or on the hub: headers, values, and what base and model share.

It measures nothing, and never opens a model that the caller did not name.
"""

__all__ = [
    "adapters",
    "checkpoint",
    "files",
    "identity",
    "layouts",
    "nearby",
    "opening",
    "pairs",
    "ranges",
    "remote",
    "stored",
    "unwritten",
]
