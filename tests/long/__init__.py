"""Checks that take minutes, for a person to run: `python -m tests.long.NAME`."""
