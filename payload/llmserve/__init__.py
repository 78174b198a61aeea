"""Gateway and engines of llmkeep."""
