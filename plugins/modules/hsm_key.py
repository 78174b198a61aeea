#!/usr/bin/python
"""State module: a host's key in the tokens of an HSM, made there and proven to open, or destroyed there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hsm_key
short_description: Manage a host's key pair in one or more tokens of an HSM, and prove that the key works
description:
  - Finds the pair by token label and key label; generates it in the token if it is missing and I(state) is C(present).
  - Verifies that the private key is sensitive, never extractable, generated in the token and usable, and has it
    derive (or decrypt) once over the configured path. A path that finds a key but cannot use it is refused.
  - Inspects all tokens before any login. Logs in once per token, and not at all while a token's flags warn that the
    next failed login might be its last; after a failed login, no other token is tried.
  - With I(record), a reinitialised token and a deleted or replaced key are reported, and never replaced by a new key.
  - C(absent) is for crypto-erasure and for the end of a rotation. It destroys the keys of all I(labels) with one login per
    token; volumes that only they opened stay closed for good. Labels that volumes are enrolled with (I(in_use)) are refused
    before any login.
  - The PIN is read from a sealed credential through a pipe, and appears in no argument, environment or output.
author: [llmkeep contributors (@llmkeep)]
options:
  module: {description: Path of the PKCS#11 module., type: path, required: true}
  address:
    description: Address of the server for p11-kit-client.so, as C(unix:path=SOCKET).
    type: str
    default: ""
  tokens: {description: Labels of the tokens., type: list, elements: str, required: true}
  label: {description: "Label of the key; required by C(present) and C(probed).", type: str}
  labels: {description: "Labels of the keys to destroy; required by C(absent), and of it only.", type: list, elements: str}
  in_use: {description: "Labels of keys that must be kept; required by C(absent), and of it only.", type: list, elements: str}
  type:
    description: C(ec) is P-384. C(rsa), 3072 bits, is for an HSM without elliptic curves; see C(findings).
    type: str
    choices: [ec, rsa]
    default: ec
  signs:
    description: >-
      Whether it is a server's key, which signs, rather than a key that opens volumes. It must then sign once,
      and C(public_pem) is returned.
    type: bool
    default: false
  state:
    description: C(probed) generates nothing; tokens without the key are listed in C(missing).
    type: str
    choices: [present, probed, absent]
    default: present
  pin: {description: Sealed credential that holds the PIN., type: path, required: true}
  pin_name: {description: Name it was sealed under; defaults to the file's name., type: str, default: ""}
  record: {description: File that records the tokens and keys that were found., type: path}
  user: {description: Account that loads the PKCS#11 module; defaults to the current one., type: str, default: ""}
  seconds: {description: Time limit for the HSM's answer., type: int, default: 20}
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
key_pairs:
  description: One entry per token.
  returned: "success, unless I(state=absent)"
  type: list
  elements: dict
  contains:
    token: {description: Its label., type: str}
    serial: {description: Its serial., type: str}
    manufacturer: {description: Its manufacturer., type: str}
    double: {description: Whether it is SoftHSM rather than a hardware HSM., type: bool}
    state: {description: "C(present), C(made) or C(missing).", type: str}
    uri: {description: URI of the public key; never with a PIN., type: str}
    public_sha256: {description: SHA-256 of the EC point or the RSA modulus., type: str}
    public_pem: {description: The public key (PEM); EC keys only., type: str}
missing: {description: Tokens without the key., returned: "success, unless I(state=absent)", type: list, elements: str}
findings: {description: Findings for an auditor., returned: "success, unless I(state=absent)", type: list, elements: str}
destroyed: {description: Objects destroyed by token., returned: "success, with I(state=absent)", type: dict}
fault: {description: Name of the fault; docs/operate/hsm.md has a runbook for each., returned: failure, type: str}
exit: {description: The fault's exit code in the program llmkeep-hsm., returned: failure, type: int}
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


def remember(path: str, keys: list[dict[str, Any]]) -> None:
    """Record the tokens and public keys."""
    proven = {
        each["token"]: {name: each[name] for name in RECORDED} for each in keys if each["state"] != "missing"
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
        keys = token_keys.look(settings, pin, make=params["state"] == "present", change=not check)
    missing = [each["token"] for each in keys if each["state"] == "missing"]
    made = [each["token"] for each in keys if each["state"] == "made"]
    if settings.record and not check:
        remember(settings.record, keys)
    return {
        "changed": bool(made or (missing and params["state"] == "present")),
        "key_pairs": keys,
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
    counts = {}
    for token in [token_keys.the_token(tokens, label, None, settings) for label in settings.tokens]:
        step(f"log in to the token {token.label}")
        with module.session(token.slot, writes=not check) as session:
            token_keys.log_in(session, token, pin)
            counts[token.label] = 0
            for label in labels:
                objects = session.find({pkcs11.LABEL: label.encode()})
                counts[token.label] += len(objects)
                step(f"destroy {label} in the token {token.label}")
                for key in [] if check else objects:
                    session.destroy(key)
                if not check and (left := session.find({pkcs11.LABEL: label.encode()})):
                    raise token_keys.Fault(
                        "failed", f"the token {token.label} still has {len(left)} objects called {label}"
                    )
    return counts


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
    parameters = module.params
    absent = parameters["state"] == "absent"
    if absent and (staying := sorted({*parameters["labels"]} & {*parameters["in_use"]})):
        module.fail_json(
            msg=f"{', '.join(staying)} is a key that volumes are enrolled with; nothing was destroyed. Set another"
            " hsm_key_label and run playbooks/rotate-keys.yml -e rotate_hsm_key=true first"
        )
    try:
        module.exit_json(**(destroyed if absent else settle)(parameters, module.check_mode))
    except token_keys.Fault as fault:
        names = ", ".join(parameters["labels"]) if absent else parameters["label"]
        module.fail_json(msg=f"{names}: {fault}", fault=fault.kind, exit=token_keys.EXIT[fault.kind])


if __name__ == "__main__":
    main()
