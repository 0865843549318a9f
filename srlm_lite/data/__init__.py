"""Seed data: OASST trees, ranked replies and prompt lists become IFT, EFT and prompts."""
