"""What mergekit calls: the merge methods and their parameters.

It never sees a YAML or the plan, only what mergekit hands over.
"""

__all__ = [
    "advice",
    "announcing",
    "composed",
    "group_norms",
    "lengths",
    "parameters",
    "registration",
    "settings",
]
