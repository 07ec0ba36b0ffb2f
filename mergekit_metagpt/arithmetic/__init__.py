"""Arithmetic on tensors in memory: squared norms, coefficients and scaled sums.

It never touches a file, a tensor's name, or mergekit.
"""

__all__ = [
    "closed_form",
    "in_parts",
    "low_rank",
    "scaled_sums",
    "squared_norms",
    "standard_errors",
]
