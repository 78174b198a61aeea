"""The estate's keys: created on the control node, identical on all hosts, and sealed on each.

Everything that another host's gateway, page or model server must recognize derives from them: answer ids, tenants' cache salts,
and the seal of sessions, which contain a credential. Nothing that grants access by itself does, since root on one host would have
it on all. Each line of the credential is `STATE HEX`. The `current` key issues; `next` and `former` are accepted too, so that a
rotation (playbooks/rotate-estate-keys.yml) keeps answers ratable and ends no session.
"""

import hmac
import os
from pathlib import Path

from llmserve.access.api_keys import KeyFileError

CREDENTIAL = "llm-estate.keys"
STATES = ("current", "next", "former")
KEY_BYTES = 32

type Ring = tuple[bytes, ...]  # the first one issues


def estate_keys(pepper: bytes) -> Ring:
    """The keys from this unit's credentials. Without them the pepper takes their place, as in pods, whose replicas share it.

    Raises KeyFileError.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, CREDENTIAL) if folder else None
    return ring(path.read_text()) if path and path.exists() else (pepper,)


def ring(text: str) -> Ring:
    """Parse the keys of a credential; raises KeyFileError, whose message contains no key."""
    lines = [line.split(" ") for line in text.splitlines()]
    try:
        keys = {state: bytes.fromhex(digits) for state, digits in lines}
    except ValueError:
        keys = {}
    if "current" not in keys or len(keys) < len(lines) or not keys.keys() <= set(STATES):
        raise KeyFileError(
            f"the credential {CREDENTIAL} is not one line for each of {', '.join(STATES)} with a hexadecimal key, 'current' "
            f"included: run site.yml, which copies the control node's keys to this host"
        )
    if short := [state for state, key in keys.items() if len(key) < KEY_BYTES]:
        raise KeyFileError(
            f"the credential {CREDENTIAL} has a '{short[0]}' key of {len(keys[short[0]])} bytes: {KEY_BYTES} are needed; run "
            f"site.yml"
        )
    return tuple(keys[state] for state in STATES if state in keys)


def derived(keys: Ring, purpose: str) -> Ring:
    """Keys for one purpose; they reveal nothing about the keys for another."""
    return tuple(hmac.digest(key, f"llmkeep {purpose}".encode(), "sha256") for key in keys)
