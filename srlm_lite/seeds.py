"""Seeds that belong to an item, not to its place in a batch."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits from a path such as (run seed, iteration, stage, item).

    The same path gives the same seed whatever else the run does, in whatever order.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
