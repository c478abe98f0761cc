"""Who runs, where, and how precisely."""
