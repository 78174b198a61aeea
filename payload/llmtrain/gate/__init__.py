"""The promotion gate: compares a new model with the old one on a held-out set."""
