"""Many runs side by side, measured alike, into one table."""
