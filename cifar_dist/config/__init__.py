"""What was asked for, checked once; no torch here."""
