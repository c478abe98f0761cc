"""Terminal output, figures and reports."""
