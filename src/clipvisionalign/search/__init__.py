"""A trained aligner at work."""
