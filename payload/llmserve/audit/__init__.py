"""The gateway's side of the audit record."""
