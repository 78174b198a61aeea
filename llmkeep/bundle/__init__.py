"""What an estate is made of: pinned, fetched, built, signed and verified."""
