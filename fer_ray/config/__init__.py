"""Settings of a run: their schema, and how they are changed and given as flags."""
