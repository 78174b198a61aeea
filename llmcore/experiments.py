"""A run of an experiment, on the control node, on hosts and in what they keep: its name, and how much one subject may say."""

import hashlib

RATINGS_EACH = 10  # of a subject and arm that count: more say little that is new, and could decide alone
LARGEST_SHARE = 0.1  # of an arm's ratings by one subject; above it nothing is concluded


def identifier(name: str, salt: str) -> str:
    """What names an experiment in files: another salt makes another experiment of it."""
    return hashlib.sha256(f"{name}\0{salt}".encode()).hexdigest()[:16]
