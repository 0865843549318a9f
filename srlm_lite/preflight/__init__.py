"""What is asked before a run writes anything: everything that can fail, in seconds.

`iterate` refuses by it, `iterate --dry-run` and `doctor --recipe` show it.
"""
