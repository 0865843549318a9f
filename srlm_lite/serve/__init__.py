"""An OpenAI-compatible endpoint of a run's models, on the one base in memory."""
