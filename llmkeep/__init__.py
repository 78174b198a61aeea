"""llmkeep: the control node of an estate: bundle, lock, PKI, runs."""
