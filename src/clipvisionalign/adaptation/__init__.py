"""Fine-tuned models measured against what they started from."""
