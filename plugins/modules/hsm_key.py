#!/usr/bin/python
"""State module: a host's key in the tokens of an HSM, made there and proven to open, or destroyed there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hsm_key
short_description: Keep or destroy a host's key pair in one or more tokens of an HSM, and prove that it opens what it encloses
description:
  - Finds the pair by token label and key label; generates it in the token if there is none and I(state) is C(present).
  - Reads back that the private key is sensitive, never extractable, generated in the token and usable, and has it
    derive (or decrypt) once through the path by which it is reached. A path that finds a key and cannot use it is refused.
  - Tokens are looked at before any login. There is one login a token, and none while a token's flags say that it
    might be the last; after one that fails, no other token is tried.
  - With I(record), a token that was made anew and a key that was deleted or exchanged are reported, and never
    replaced by a new key.
  - C(absent) is for crypto-erasure and for after a rotation. It destroys the keys of all I(labels) with one login a token;
    what they opened stays closed for good. Labels that volumes are enrolled with now (I(in_use)) are refused before any login.
  - The PIN comes from a sealed credential by pipe, and is in no argument, environment or output.
author: [llmkeep contributors]
options:
  module: {description: Path of the PKCS#11 module., type: path, required: true}
  address:
    description: Where p11-kit-client.so finds its server, as C(unix:path=SOCKET).
    type: str
    default: ""
  tokens: {description: Labels of the tokens., type: list, elements: str, required: true}
  label: {description: "Label of the key; required by C(present) and C(probed).", type: str}
  labels: {description: "Labels of the keys to destroy; required by C(absent), and of it only.", type: list, elements: str}
  in_use: {description: "Labels of keys that must stay; required by C(absent), and of it only.", type: list, elements: str}
  type:
    description: C(ec) is P-384. C(rsa), 3072 bits, is for an HSM without elliptic curves; see C(findings).
    type: str
    choices: [ec, rsa]
    default: ec
  signs:
    description: >-
      Whether it is the key of a server, which signs, and not one that opens volumes. It has to sign once then,
      and C(public_pem) is told of it.
    type: bool
    default: false
  state:
    description: With C(probed) nothing is generated; tokens without the key are listed in C(missing).
    type: str
    choices: [present, probed, absent]
    default: present
  pin: {description: Sealed credential that holds the PIN., type: path, required: true}
  pin_name: {description: Name that it was sealed under; that of its file if empty., type: str, default: ""}
  record: {description: File that keeps which tokens and keys they were., type: path}
  user: {description: Account that the module is loaded as; that of the run if empty., type: str, default: ""}
  seconds: {description: The HSM has to answer within., type: int, default: 20}
"""

EXAMPLES = r"""
- name: Make the key of this host
  llmkeep.estate.hsm_key:
    module: /usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so
    address: unix:path=/run/llmkeep-hsm/pkcs11
    tokens: [llmkeep, llmkeep-spare]
    label: llm1
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
    record: /var/lib/llmkeep/hsm.json

- name: Destroy the keys that the erased volume was enrolled with
  llmkeep.estate.hsm_key:
    state: absent
    module: /usr/lib/vendor/libpkcs11.so
    tokens: [llmkeep, llmkeep-spare]
    labels: [llm1, llm1-2]
    in_use: [llm1-3]
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
"""

RETURN = r"""
keys:
  description: One entry a token.
  returned: "success, unless I(state=absent)"
  type: list
  elements: dict
  contains:
    token: {description: Its label., type: str}
    serial: {description: Its serial., type: str}
    manufacturer: {description: Its maker., type: str}
    double: {description: Whether it is SoftHSM and thus no HSM., type: bool}
    state: {description: C(present) or C(made) or C(missing)., type: str}
    uri: {description: URI of the public key; never with a PIN., type: str}
    public_sha256: {description: SHA-256 of the point or the modulus., type: str}
    public_pem: {description: The public key for openssl; of EC only., type: str}
missing: {description: Tokens without the key., returned: "success, unless I(state=absent)", type: list, elements: str}
findings: {description: Findings for an auditor., returned: "success, unless I(state=absent)", type: list, elements: str}
destroyed: {description: Objects destroyed by token., returned: "success, with I(state=absent)", type: dict}
fault: {description: Name of the fault; docs/hsm.md has a runbook for each., returned: failure, type: str}
exit: {description: Its exit code in the program llmkeep-hsm., returned: failure, type: int}
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins, pkcs11, token_keys

PADDING = (
    "volumes are enclosed with RSA and the padding of PKCS#1 v1.5, all that systemd 257 knows for RSA; take EC"
    " P-384 where the HSM has it"
)
RECORDED = ("serial", "manufacturer", "type", "public_sha256")


def remember(path: str, found: list[dict[str, Any]]) -> None:
    """Record the tokens and public keys."""
    proven = {
        each["token"]: {name: each[name] for name in RECORDED} for each in found if each["state"] != "missing"
    }
    place = Path(path)
    content = json.dumps({**everything(place), **proven}, indent=1, sort_keys=True).encode() + b"\n"
    if place.exists() and place.read_bytes() == content:
        return
    place.parent.mkdir(parents=True, mode=0o755, exist_ok=True)
    atomic.write_file(place, content, os.geteuid(), os.getegid(), 0o644)


def everything(place: Path) -> dict[str, Any]:
    """The whole record, including tokens that this call does not name."""
    known: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    return known


def settle(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    settings = token_keys.settings_of(params)
    with pins.shown(params["pin"], params["pin_name"]) as pin:
        found = token_keys.look(settings, pin, make=params["state"] == "present", change=not check)
    missing = [each["token"] for each in found if each["state"] == "missing"]
    made = [each["token"] for each in found if each["state"] == "made"]
    if settings.record and not check:
        remember(settings.record, found)
    return {
        "changed": bool(made or (missing and params["state"] == "present")),
        "keys": found,
        "missing": missing,
        "findings": [PADDING] if params["type"] == "rsa" else [],
    }


def destroy(
    settings: Any, labels: list[str], pin: bytes, check: bool, step: Callable[[str], None]
) -> dict[str, int]:
    """Objects of the labels by token, destroyed unless CHECK. One login a token."""
    step("list its tokens")
    module = token_keys.loaded(settings)
    tokens = module.tokens()
    found = {}
    for token in [token_keys.the_token(tokens, label, None, settings) for label in settings.tokens]:
        step(f"log in to the token {token.label}")
        with module.session(token.slot, writes=not check) as session:
            token_keys.log_in(session, token, pin)
            found[token.label] = 0
            for label in labels:
                objects = session.find({pkcs11.LABEL: label.encode()})
                found[token.label] += len(objects)
                step(f"destroy {label} in the token {token.label}")
                for key in [] if check else objects:
                    session.destroy(key)
                if not check and (left := session.find({pkcs11.LABEL: label.encode()})):
                    raise token_keys.Fault(
                        "failed", f"the token {token.label} still has {len(left)} objects called {label}"
                    )
    return found


def destroyed(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Destroy the keys of the labels; what the module returns with I(state=absent)."""
    settings = token_keys.settings_of({**params, "label": ""})
    with pins.shown(params["pin"], params["pin_name"]) as pin:
        gone: dict[str, int] = token_keys.bounded(
            lambda step: destroy(settings, params["labels"], pin, check, step),
            settings.seconds,
            settings.user,
        )
    return {"changed": any(gone.values()), "destroyed": gone}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **token_keys.OPTIONS,
            "label": {"type": "str"},
            "labels": {"type": "list", "elements": "str"},
            "in_use": {"type": "list", "elements": "str"},
            "type": {"type": "str", "choices": ["ec", "rsa"], "default": "ec"},
            "signs": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "probed", "absent"], "default": "present"},
            "pin_name": {"type": "str", "default": "", "no_log": False},
            "record": {"type": "path"},
        },
        required_if=[
            ("state", "present", ["label"]),
            ("state", "probed", ["label"]),
            ("state", "absent", ["labels", "in_use"]),
        ],
        mutually_exclusive=[("label", "labels")],
        supports_check_mode=True,
    )
    given = module.params
    absent = given["state"] == "absent"
    if absent and (staying := sorted({*given["labels"]} & {*given["in_use"]})):
        module.fail_json(
            msg=f"{', '.join(staying)} is a key that volumes are enrolled with; nothing was destroyed. Set another"
            " hsm_key_label and run playbooks/rotate-keys.yml -e rotate_hsm_key=true first"
        )
    try:
        module.exit_json(**(destroyed if absent else settle)(given, module.check_mode))
    except token_keys.Fault as fault:
        names = ", ".join(given["labels"]) if absent else given["label"]
        module.fail_json(msg=f"{names}: {fault}", fault=fault.kind, exit=token_keys.EXIT[fault.kind])


if __name__ == "__main__":
    main()
