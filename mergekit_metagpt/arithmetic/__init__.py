"""Numbers only: squared norms, coefficients, and scaled sums of tensors in memory.

It never touches a file, a name of a tensor, or mergekit.
"""

__all__ = [
    "closed_form",
    "in_parts",
    "low_rank",
    "scaled_sums",
    "squared_norms",
    "standard_errors",
]
