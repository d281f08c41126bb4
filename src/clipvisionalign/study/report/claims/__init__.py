"""The sentences of a report's summary, and what they cite."""
