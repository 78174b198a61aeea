"""Cached and shared answers."""
