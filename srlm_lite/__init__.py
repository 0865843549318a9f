"""Self-Rewarding Language Models on one machine. Read `loop.py` first."""

__version__ = "0.1.0"
