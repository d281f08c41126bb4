"""Which patches and words carried a match, and contact sheets of it."""
