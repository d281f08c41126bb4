"""Which patches and words carried a match, and images of it."""
