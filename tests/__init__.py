"""Tests of mergekit_metagpt; `support` holds the oracle, `conftest` the checkpoints."""

import os

# With two workers of two threads on two cores, spinning threads would hold up others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests neither read nor fill what their user's merges remember.
os.environ["MERGEKIT_METAGPT_CACHE"] = "0"
