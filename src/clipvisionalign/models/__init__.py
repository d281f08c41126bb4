"""The two towers, the attention designs between them, and the aligner that holds them together."""
