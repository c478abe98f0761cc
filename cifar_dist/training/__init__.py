"""The loop, and what makes it survive."""
