"""What a recipe will take of a machine, from shapes alone."""
