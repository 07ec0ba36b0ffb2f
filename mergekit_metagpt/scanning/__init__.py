"""How far models moved: squared norms of each pair of base and model, measured once.

It never merges, and it never touches a GPU or torch's random state.
"""

__all__ = [
    "at_hand",
    "cache",
    "dealing",
    "once",
    "pools",
    "ranks",
    "results",
    "sampling",
    "sharing",
]
