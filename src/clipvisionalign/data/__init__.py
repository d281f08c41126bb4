"""Images and captions: reading every published layout, checking it, drawing scenes, making batches."""
