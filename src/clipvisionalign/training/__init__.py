"""The training loop, its loss, and the cache of a frozen tower's outputs."""
