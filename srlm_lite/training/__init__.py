"""Our sections mapped onto TRL's trainers."""
