"""Models from outside: checked, licensed and copied into a candidate that `llmkeep release sign` takes."""
