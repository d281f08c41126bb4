"""A run for other programs: ONNX, and the layout of the Hugging Face hub."""
