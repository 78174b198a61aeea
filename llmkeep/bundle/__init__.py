"""The software of an estate: pinned, fetched, built, signed and verified."""
