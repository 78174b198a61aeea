"""The engine processes, which run models."""
