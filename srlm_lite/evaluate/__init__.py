"""Measuring a model: as a judge against human order, and as a policy against a gold scorer."""
