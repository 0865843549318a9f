"""Sampling engines behind one small protocol."""
