#!/usr/bin/python
"""State module: a key that is no more in any token of an HSM."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hsm_key_destroyed
short_description: Destroy key pairs of a host in one or more tokens of an HSM
description:
  - For crypto-erasure and after a rotation. What the key opened opens by it no more, and nothing brings it back.
  - Refuses labels that volumes are enrolled with now. Rules of logins are those of M(llmkeep.estate.hsm_key).
author: [llmkeep contributors]
options:
  module: {description: Path of the PKCS#11 module., type: path, required: true}
  address: {description: Where p11-kit-client.so finds its server., type: str, default: ""}
  tokens: {description: Labels of the tokens., type: list, elements: str, required: true}
  labels: {description: Labels of the keys that go., type: list, elements: str, required: true}
  in_use: {description: Labels of keys that stay., type: list, elements: str, required: true}
  pin: {description: Sealed credential that holds the PIN., type: path, required: true}
  user: {description: Account that the module is loaded as; that of the run if empty., type: str, default: ""}
  seconds: {description: The HSM has to answer within., type: int, default: 20}
"""

EXAMPLES = r"""
- name: Destroy the key that the erased volume was enrolled with
  llmkeep.estate.hsm_key_destroyed:
    module: /usr/lib/vendor/libpkcs11.so
    tokens: [llmkeep, llmkeep-spare]
    labels: [llm1, llm1-2]
    in_use: [llm1-3]
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
"""

RETURN = r"""
destroyed: {description: Objects destroyed by token., returned: success, type: dict}
"""

from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils import (  # type: ignore[import-not-found]
    hsm,
    pins,
    pkcs11,
)


def destroy(
    settings: Any, labels: list[str], pin: bytes, check: bool, step: Callable[[str], None]
) -> dict[str, int]:
    """Objects of the labels by token, destroyed unless CHECK. One login a token."""
    step("list its tokens")
    module = hsm.loaded(settings)
    tokens = module.tokens()
    found = {}
    for token in [hsm.the_token(tokens, label, None, settings) for label in settings.tokens]:
        step(f"log in to the token {token.label}")
        with module.session(token.slot, writes=not check) as session:
            hsm.log_in(session, token, pin)
            found[token.label] = 0
            for label in labels:
                objects = session.find({pkcs11.LABEL: label.encode()})
                found[token.label] += len(objects)
                step(f"destroy {label} in the token {token.label}")
                for key in [] if check else objects:
                    session.destroy(key)
                if not check and (left := session.find({pkcs11.LABEL: label.encode()})):
                    raise hsm.Fault(
                        "failed", f"the token {token.label} still has {len(left)} objects called {label}"
                    )
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **{name: option for name, option in hsm.OPTIONS.items() if name != "label"},
            "labels": {"type": "list", "elements": "str", "required": True},
            "in_use": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    given = module.params
    if staying := sorted({*given["labels"]} & {*given["in_use"]}):
        module.fail_json(
            msg=f"{', '.join(staying)} is a key that volumes are enrolled with; nothing was destroyed. Set another"
            " hsm_key_label and run playbooks/rotate-keys.yml -e rotate_hsm_key=true first"
        )
    settings = hsm.settings_of({**given, "label": ""})
    try:
        with pins.shown(given["pin"]) as pin:
            gone: dict[str, int] = hsm.bounded(
                lambda step: destroy(settings, given["labels"], pin, module.check_mode, step),
                settings.seconds,
                settings.user,
            )
    except hsm.Fault as fault:
        module.fail_json(
            msg=f"{', '.join(given['labels'])}: {fault}", fault=fault.kind, exit=hsm.EXIT[fault.kind]
        )
    module.exit_json(changed=any(gone.values()), destroyed=gone)


if __name__ == "__main__":
    main()
