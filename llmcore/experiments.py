"""What names a run of an experiment, on the control node, on hosts and in what they keep."""

import hashlib


def identifier(name: str, salt: str) -> str:
    """What names an experiment in files: another salt makes another experiment of it."""
    return hashlib.sha256(f"{name}\0{salt}".encode()).hexdigest()[:16]
