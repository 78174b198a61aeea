"""An HSM's PIN, decrypted from its sealed credential for one process at a time, and never again once a token refused it.

Not every HSM warns that the next wrong login is the last one, so a refusal is recorded beside the credential and holds until
another PIN is sealed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import Fault


def memory(credential: Path) -> Path:
    """Path of the record of a refusal. Hidden, since systemd imports every `cryptsetup.*` in the folder."""
    return credential.with_name(f".{credential.name}.refused")


def digest(sealed: bytes) -> str:
    return hashlib.sha256(sealed).hexdigest()


def refuse_again(credential: Path, sealed: bytes) -> None:
    """Raise Fault if a token refused this credential before."""
    known = memory(credential)
    if known.exists() and known.read_text() == digest(sealed):
        raise Fault(
            "pin_wrong",
            f"the HSM rejected the PIN in {credential} before. It is not tried again until another one is sealed"
            f" (docs/operate/hsm.md). If the HSM's PIN was corrected instead, remove {known}",
        )


def remember(credential: Path, sealed: bytes) -> None:
    """Record the refusal, on disk before anything else, since the host may lose power now."""
    atomic.write_file(memory(credential), digest(sealed).encode(), os.geteuid(), os.getegid(), 0o600)


def unsealed(credential: Path, name: str = "") -> tuple[bytes, bytes]:
    """The sealed credential, and the PIN in it; `name`: what it was sealed under, if not its file name."""
    try:
        sealed = credential.read_bytes()
        pin = sealing.unseal(name or credential.name, sealed)
    except (OSError, sealing.Failed) as problem:
        raise no_pin(credential, str(problem)) from None
    if not pin or pin != pin.strip():
        raise no_pin(credential, "it begins or ends with white space" if pin else "it is empty")
    return sealed, pin


@contextlib.contextmanager
def shown(path: str | Path, name: str = "") -> Iterator[bytes]:
    """The PIN in a credential, sealed under NAME or its file's; a `pin_wrong` that comes out of the block is remembered."""
    credential = Path(path)
    with contextlib.ExitStack() as held:
        try:
            fcntl.flock(held.enter_context(credential.open("rb")), fcntl.LOCK_EX)
        except OSError as problem:
            raise no_pin(credential, str(problem)) from None
        sealed, pin = unsealed(credential, name)
        refuse_again(credential, sealed)
        try:
            yield pin
        except Fault as fault:
            if fault.kind == "pin_wrong":
                remember(credential, sealed)
            raise


def no_pin(credential: Path, words: str) -> Fault:
    return Fault(
        "no_pin",
        f"{credential} gives no PIN: {words}. No login was tried. Seal it again (docs/operate/hsm.md)",
    )
