"""Benchmarks that a user can run: what a part of the program costs, beside other ways to do it."""
