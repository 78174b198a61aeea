"""Pages for operators, served beside the gateway."""
