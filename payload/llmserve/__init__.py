"""The gateway and the engines of llmkeep."""
