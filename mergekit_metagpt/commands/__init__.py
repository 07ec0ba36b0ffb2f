"""What a user types: the commands behind `mergekit-metagpt`.

It never computes anything of its own.
"""

__all__ = [
    "cli",
]
