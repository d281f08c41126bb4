"""Studies: many runs, trained and measured alike, in one report."""
