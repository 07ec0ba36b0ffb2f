"""What can be learned without merging: a report as data, tables, picture and Markdown.

It never changes a file but those that its caller names.
"""

__all__ = [
    "card",
    "comparison",
    "comparison_plot",
    "drawing",
    "figures",
    "headers",
    "inspecting",
    "parts",
    "peft_call",
    "ranking",
    "schema",
    "scoring",
    "tables",
]
