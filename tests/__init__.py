"""Tests of mergekit_metagpt; `support` holds the oracle, `conftest` the checkpoints."""
