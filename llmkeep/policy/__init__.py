"""Who may do what: read, tested, signed."""
