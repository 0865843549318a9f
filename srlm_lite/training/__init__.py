"""One step for all trainings, in trees of texts; and the proofs of it."""
