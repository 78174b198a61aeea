"""What users said, as examples and rows to learn from."""
