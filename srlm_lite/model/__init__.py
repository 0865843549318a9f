"""The base, its chat format, and the adapter stack on it."""
