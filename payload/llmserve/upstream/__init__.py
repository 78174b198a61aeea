"""Engines as the gateway sees them: connections, instances, admission."""
