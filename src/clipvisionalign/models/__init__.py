"""Towers, attention designs, and the aligner that combines them."""
