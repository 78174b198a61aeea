#!/usr/bin/python
"""State module: the tokens of the lab's HSM, which is SoftHSM and thus none."""

from __future__ import annotations

DOCUMENTATION = r"""
module: softhsm_tokens
short_description: Initialise SoftHSM's tokens, once
description:
  - Initialises a token for each label that has none, with PINs from sealed credentials, which appear in no argument,
    environment or output.
  - An existing token is never initialised again. A recorded token that is missing, two tokens with one label, and a
    token with another user PIN are refused, since volumes may depend on them.
  - A token that an interrupted run left without a user PIN receives it.
author: [llmkeep contributors (@llmkeep)]
options:
  tokens: {description: Labels of the tokens., type: list, elements: str, required: true}
  user_pin: {description: Sealed credential with the user PIN., type: path, required: true}
  officer_pin: {description: Sealed credential with the security officer's PIN., type: path, required: true}
  module:
    description: SoftHSM's PKCS#11 module.
    type: path
    default: /usr/lib/softhsm/libsofthsm2.so
  user: {description: Account that owns SoftHSM's files; defaults to the current one., type: str, default: ""}
  record:
    description: File that records the tokens that were initialised.
    type: path
    default: /var/lib/softhsm/llmkeep-tokens.json
"""

EXAMPLES = r"""
- name: Make the tokens
  llmkeep.estate.softhsm_tokens:
    tokens: [llmkeep, llmkeep-spare]
    user_pin: /etc/credstore.encrypted/softhsm.user-pin
    officer_pin: /etc/credstore.encrypted/softhsm.so-pin
    user: softhsm
"""

RETURN = r"""
made: {description: Labels of the tokens that were or would be initialised., returned: success, type: list, elements: str}
serials: {description: Serial by label., returned: success, type: dict}
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins, pkcs11, token_keys

SECONDS = 60


def one(tokens: list[Any], label: str, known: dict[str, str]) -> Any:
    """The token of a label; None where one may be made."""
    fitting = [token for token in tokens if token.initialised and token.label == label]
    if len(fitting) > 1:
        raise token_keys.Fault(
            "two_tokens",
            f"SoftHSM has {len(fitting)} tokens {label} (serials {', '.join(token.serial for token in fitting)});"
            " nothing was changed. Delete the one that no host uses (`softhsm2-util --delete-token --serial`)",
        )
    if not fitting and label in known:
        raise token_keys.Fault(
            "token_missing",
            f"the token {label} (serial {known[label]}) is gone, and with it every host's key. No new one is made "
            "automatically, since it could not open volumes. Restore the token's directory from a copy; if it is lost, "
            "remove it from the record, run again, and enrol the hosts' new keys",
        )
    if fitting and known.get(label, fitting[0].serial) != fitting[0].serial:
        raise token_keys.Fault(
            "token_reinitialised",
            f"the token {label} was initialized again: its serial is {fitting[0].serial}, formerly {known[label]}. Restore "
            "the old one from a copy, or remove it from the record and enrol the hosts' new keys",
        )
    return fitting[0] if fitting else None


def make(
    module: Any, labels: list[str], known: dict[str, str], pins: tuple[bytes, bytes], change: bool
) -> dict[str, Any]:
    """Look at all labels first, then make what is missing; labels made, and the serials of all."""
    user, officer = pins
    tokens = {label: one(module.tokens(), label, known) for label in labels}
    made = [label for label, token in tokens.items() if token is None or not has_pin(token)]
    for label in made if change else []:
        if tokens[label] is None:
            free = next(token.slot for token in module.tokens() if not token.initialised)
            module.initialise(free, officer, label)
        token = one(module.tokens(), label, {})
        with module.session(token.slot, writes=True) as session:
            session.login(officer, pkcs11.SECURITY_OFFICER)
            session.set_user_pin(user)
    now = {label: one(module.tokens(), label, {}) for label in labels}
    for token in now.values():
        if token and token.label not in made:
            with module.session(token.slot) as session:
                token_keys.log_in(session, token, user)
    return {"made": made, "serials": {label: token.serial for label, token in now.items() if token}}


def has_pin(token: Any) -> bool:
    return bool(token.flags & pkcs11.USER_PIN_INITIALIZED)


def settle(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    record = Path(params["record"])
    known = json.loads(record.read_text()) if record.exists() else {}
    formats.require(record, known, partial(token_keys.Fault, "failed"))

    with pins.shown(params["user_pin"]) as user, pins.shown(params["officer_pin"]) as officer:

        def work(step: Callable[[str], None]) -> dict[str, Any]:
            step("make SoftHSM's tokens")
            return make(pkcs11.Module(params["module"]), params["tokens"], known, (user, officer), not check)

        result: dict[str, Any] = token_keys.bounded(work, SECONDS, params["user"])
    if not check and {**known, **result["serials"]} != known:
        content = json.dumps({**known, **result["serials"]}, sort_keys=True).encode() + b"\n"
        atomic.write_file(record, content, os.geteuid(), os.getegid(), 0o644)
    return {"changed": bool(result["made"]), **result}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "tokens": {"type": "list", "elements": "str", "required": True, "no_log": False},
            "user_pin": {"type": "path", "required": True, "no_log": False},
            "officer_pin": {"type": "path", "required": True, "no_log": False},
            "module": {"type": "path", "default": "/usr/lib/softhsm/libsofthsm2.so"},
            "user": {"type": "str", "default": ""},
            "record": {"type": "path", "default": "/var/lib/softhsm/llmkeep-tokens.json"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**settle(module.params, module.check_mode))
    except token_keys.Fault as fault:
        module.fail_json(msg=str(fault), fault=fault.kind)


if __name__ == "__main__":
    main()
