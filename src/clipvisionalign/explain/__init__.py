"""Heat maps of the patches and words that contribute to a match."""
