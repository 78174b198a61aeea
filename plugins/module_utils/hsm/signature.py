"""A certificate authority's key in a token of an HSM: find or generate it, verify its attributes, sign with it.

`llmkeep pki` uses it on the control node. The rules are those of the volumes' keys (token_keys.py): at most one login, none
while a token warns that the next failed one might be its last, and a child process with a time limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins, token_keys
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import (
    SIGNATURE,
    Fault,
    Settings,
    described,
    generate,
    the_pair,
)


def use(settings: dict[str, Any], digest: bytes, make: bool) -> dict[str, str]:
    """The key's public point and the signature of a digest, in hexadecimal; a missing key is generated if `make`.

    SETTINGS has module, token, label, user, address, seconds, and pin, the file of the sealed PIN. Raises Fault.
    """
    with pins.shown(settings["pin"], settings["pin_name"]) as pin:
        return use_with(pin, settings, digest, make)


def use_with(pin: bytes, settings: dict[str, Any], digest: bytes, make: bool) -> dict[str, str]:
    """The same with a PIN that an operator typed, which is not noted where it is refused."""
    place = Settings(
        module=settings["module"],
        tokens=[settings["token"]],
        label=settings["label"],
        address=settings["address"],
        seconds=settings["seconds"],
        user=settings["user"],
        signs=True,
    )
    answer: dict[str, str] = token_keys.bounded(
        lambda step: signed(place, pin, digest, make, step), place.seconds, place.user
    )
    return answer


def signed(
    settings: Settings, pin: bytes, digest: bytes, make: bool, step: Callable[[str], None]
) -> dict[str, str]:
    step(f"load {settings.module}")
    module = token_keys.loaded(settings)
    step("list its tokens")
    token = token_keys.the_token(module.tokens(), settings.tokens[0], None, settings)
    step(f"log in to the token {token.label}")
    with module.session(token.slot) as session:
        token_keys.log_in(session, token, pin)
        step(f"find the key {settings.label} in the token {token.label}")
        key = the_pair(session, token, settings)
        if key is None and make:
            step(f"make the key {settings.label} in the token {token.label}")
            with module.session(token.slot, writes=True) as writing:
                generate(writing, settings)
            key = the_pair(session, token, settings)
        if key is None:
            raise Fault(
                "key_missing",
                f"the token {token.label} has no key {settings.label}. Restore it from the HSM's backup, or move the"
                " authority to a new key (docs/operate/certificates.md)",
            )
        public = described(session, key, token, settings, None)["public"]
        step(f"sign with the key {settings.label} of the token {token.label}")
        return {"public": public, "signature": session.sign(key[1], digest, SIGNATURE).hex()}
