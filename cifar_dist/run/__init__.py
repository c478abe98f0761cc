"""A run: what it is asked to do, its directory, its checkpoints, and what it reports."""
