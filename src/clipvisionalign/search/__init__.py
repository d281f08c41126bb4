"""Indexes of images, queries, and the search service."""
