"""What can be learned without merging: a report as data, tables, picture and Markdown.

It changes nothing on disk but the files that its caller names.
"""

__all__ = [
    "card",
    "figures",
    "inspecting",
    "parts",
    "schema",
    "tables",
]
