"""The processes that run models."""
