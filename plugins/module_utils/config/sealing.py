"""Secrets sealed to this host by systemd-creds (its TPM and a key on its disk; without a TPM that key alone).

They pass through pipes, never through arguments, the environment or files.
"""

from __future__ import annotations

import subprocess

SECONDS = 60


class Failed(Exception):
    """A step failed; the message says which, with what output, and what to do."""


def piped(argv: list[str], given: bytes, brings: str) -> bytes:
    """Output of a program that receives or returns a secret by pipe."""
    what = " ".join(argv[:2])
    try:
        done = subprocess.run(argv, input=given, capture_output=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Failed(f"{argv[0]} is not on this host; {brings} brings it") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end within {SECONDS} s") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        raise Failed(f"{what} ended with {done.returncode}: {words}")
    return done.stdout


def systemd_creds(verb: str, name: str, given: bytes) -> bytes:
    return piped(["systemd-creds", verb, f"--name={name}", "-", "-"], given, "systemd 250 or later")


def seal(name: str, secret: bytes) -> bytes:
    return systemd_creds("encrypt", name, secret)


def unseal(name: str, sealed: bytes) -> bytes:
    """Decrypt a sealed secret; Failed if it was sealed under another name or on another host."""
    return systemd_creds("decrypt", name, sealed)
