"""Names for a certificate authority, and what OpenSSL says of its work."""

import subprocess
from pathlib import Path

from llmkeep.places import Places

DOMAIN = "estate.internal"
NAMES = ["llm1.estate.internal", "10.77.0.12"]


def opened_with(escrow: Path, path: Path) -> bytes:
    """What the owner of the escrow key finds in the handed out file."""
    key = str(escrow.with_suffix(".key"))
    argv = ["openssl", "cms", "-decrypt", "-inform", "PEM", "-inkey", key, "-in", str(path)]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def openssl_accepts(places: Places, chain: bytes, *more: str) -> bool:
    """What a client that has only the root says."""
    path = places.root / "chain.pem"
    path.write_bytes(chain)
    argv = ["openssl", "verify", "-x509_strict", *more, "-CAfile", str(places.root_certificate)]
    done = subprocess.run([*argv, "-untrusted", str(path), str(path)], capture_output=True, check=False)
    return done.returncode == 0
