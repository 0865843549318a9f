"""A run directory for the eyes: facts from its files, charts, one HTML page, a Markdown summary."""
