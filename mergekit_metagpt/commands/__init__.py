"""What a user types: the commands behind `mergekit-metagpt`.

It computes nothing of its own.
"""

__all__ = [
    "cli",
]
