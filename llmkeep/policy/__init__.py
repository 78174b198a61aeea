"""The authorization policy: read, tested, signed."""
