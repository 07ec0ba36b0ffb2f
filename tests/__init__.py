"""Tests of mergekit_metagpt; `oracle` holds formulas, `conftest` the checkpoints."""

import os

# With two workers of two threads on two cores, spinning threads would hold up others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests neither read nor fill what their user's merges remember.
os.environ["MERGEKIT_METAGPT_CACHE"] = "0"
# pytest-xdist gives its workers the width of a terminal.
os.environ.pop("COLUMNS", None)
