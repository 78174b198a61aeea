"""The gateway's clients of engines, the instances of each model, and admission control."""
