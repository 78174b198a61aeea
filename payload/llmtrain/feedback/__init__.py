"""User feedback as training examples and rows."""
