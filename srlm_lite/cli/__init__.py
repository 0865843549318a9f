"""The command line: thin, and quick to start. Everything heavy is imported inside a command."""
