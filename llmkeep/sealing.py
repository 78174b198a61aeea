"""Seal the control node's secrets to this host.

Secrets pass between programs by standard input, standard output and files in memory, never by a file on a disk, an argument or
the environment.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkeep.errors import LlmkeepError


class SealError(LlmkeepError):
    """A secret could not be sealed or decrypted. The message says what is wrong, the value seen, and what to do."""


def program(argv: list[str], data: bytes) -> bytes:
    """Standard output of ARGV with DATA as standard input; its own message becomes the error."""
    done = subprocess.run(argv, input=data, capture_output=True, check=False, timeout=60)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise SealError(f"`{' '.join(argv[:2])}` exited {done.returncode}: {words}")
    return done.stdout


def seal(secret: bytes, name: str) -> bytes:
    """Encrypt SECRET to this host (and its TPM, if any) under NAME, which `unseal` needs."""
    has_tpm = (
        subprocess.run(
            ["systemd-analyze", "has-tpm2", "--quiet"], capture_output=True, check=False
        ).returncode
        == 0
    )
    key = "host+tpm2" if has_tpm else "host"
    return program(["systemd-creds", "encrypt", f"--with-key={key}", f"--name={name}", "-", "-"], secret)


def unseal(sealed: bytes, name: str) -> bytes:
    """Decrypt a sealed secret in memory."""
    return program(["systemd-creds", "decrypt", f"--name={name}", "-", "-"], sealed)


@contextmanager
def in_memory(secret: bytes) -> Iterator[Path]:
    """Path of a file in memory, which child processes can read inside the context."""
    descriptor = os.memfd_create("llmkeep", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, secret)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
