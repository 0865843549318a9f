"""The base, its chat format, and the adapter stack on it."""

import logging

# When first imported, by us or by PEFT, it warns that an optional CPU kernel is missing: one
# without a backward pass, which we do without (see `base`).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
