"""The search service: FastAPI, its middleware and its page."""
