"""What a merge YAML asks for, as mergekit's own planner resolves it.

It never writes a weight.
"""

__all__ = [
    "candidates",
    "checks",
    "converting",
    "dividing",
    "families",
    "jobs",
    "merge_yaml",
    "plain_yaml",
    "plan",
    "plan_checks",
    "replaying",
    "running",
    "tensor_coefficients",
    "tokenizer_checks",
    "yaml_errors",
]
