"""Benchmarks that a user can run: what a part of the program costs, beside other ways to do it."""

import logging

# A process of a benchmark's own begins here, not in the command line: as in `model`.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
