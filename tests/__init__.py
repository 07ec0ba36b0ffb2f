"""Tests of mergekit_metagpt; `support` holds the oracle, `conftest` the checkpoints."""

import os

# With two workers of two threads on two cores, spinning threads would hold up others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
