"""What llmkeep's other distributions share, below all of them."""
