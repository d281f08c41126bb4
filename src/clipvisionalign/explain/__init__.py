"""Which patches and words carried a match, and pictures of it."""
