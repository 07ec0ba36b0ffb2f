"""What a user types: the commands behind `mergekit-metagpt`.

It never computes norms or coefficients itself.
"""

__all__ = [
    "cli",
]
