"""What a training holds in memory by a choice of ours; a plan counts with it."""

PIECE = 256
"""Target tokens whose logits a loss computes at once."""
