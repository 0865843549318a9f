"""Seed data for the eyes, before a run learns from it: figures, what stands out, a page."""
