"""The estate's keys: made on the control node, the same on all hosts, and sealed on each.

What another host's gateway, page or model server has to know again derives from them: ids of answers, tenants' cache salts, the
seal of sessions, which have a credential in them; nothing that gives access by itself, since root on one host would have it on
all. Each line of the credential is `STATE HEX`. The
`current` key issues; `next` and `former` are accepted too, so that a rotation (playbooks/rotate-estate-keys.yml) leaves answers
ratable, and ends no session.
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
    """The keys of this unit's credentials. Without them the pepper stands for one, as in pods, whose replicas share it.

    Raises KeyFileError.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, CREDENTIAL) if folder else None
    return ring(path.read_text()) if path and path.exists() else (pepper,)


def ring(text: str) -> Ring:
    """The keys of a credential's text; raises KeyFileError, whose message holds none of them."""
    lines = [line.split(" ") for line in text.splitlines()]
    try:
        keys = {state: bytes.fromhex(digits) for state, digits in lines}
    except ValueError:
        keys = {}
    if "current" not in keys or len(keys) < len(lines) or not keys.keys() <= set(STATES):
        raise KeyFileError(
            f"the credential {CREDENTIAL} is not one line each of {', '.join(STATES)}, with a key in hexadecimal, of which "
            "'current' is there: run site.yml, which hands this host the control node's"
        )
    if short := [state for state, key in keys.items() if len(key) < KEY_BYTES]:
        raise KeyFileError(
            f"the credential {CREDENTIAL} has {len(keys[short[0]])} bytes as '{short[0]}': it needs {KEY_BYTES}; run site.yml"
        )
    return tuple(keys[state] for state in STATES if state in keys)


def derived(keys: Ring, purpose: str) -> Ring:
    """Keys for one purpose, of which none says anything about those for another."""
    return tuple(hmac.digest(key, f"llmkeep {purpose}".encode(), "sha256") for key in keys)
