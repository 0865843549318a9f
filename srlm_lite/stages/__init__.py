"""The stages of the loop: each reads files, writes files, and does nothing twice."""
