"""Secrets of this host's services: systemd's credentials."""

import os
import subprocess
from pathlib import Path

SEALED = Path("/etc/credstore.encrypted")


class SealedError(Exception):
    """A secret is not available; the message says why and what to do."""


def credential(name: str) -> bytes | None:
    """Content of this unit's credential `name`, or None."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, name) if folder else None
    return path.read_bytes() if path and path.exists() else None


def unsealed(name: str) -> bytes:
    """The same, or, as root outside of a unit, the secret that the host has sealed under this name; raises SealedError."""
    if (content := credential(name)) is not None:
        return content
    sealed = SEALED / name
    if not sealed.exists():
        raise SealedError(f"there is neither a credential {name} nor {sealed}: provision this host")
    command = ["systemd-creds", "decrypt", f"--name={name}", str(sealed), "-"]
    opened = subprocess.run(command, capture_output=True, check=False)
    if opened.returncode:
        reason = opened.stderr.decode(errors="replace").strip()
        raise SealedError(f"cannot unseal {sealed} ({reason}): only root on this host can")
    return opened.stdout
