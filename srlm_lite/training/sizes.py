"""What a training holds in memory by a choice of ours; a plan counts with it."""

PIECE = 256
"""Target tokens whose logits a loss computes at once."""
AT_ONCE_ON_A_CPU = 1280
"""Tokens in memory at once that a recipe does not set: a CPU gains nothing by more."""
