#!/usr/bin/python
"""State module: tokens of an HSM whose user PIN is the new one, wherever a run before this one stopped."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hsm_pin
short_description: Change the user PIN of one or more tokens of an HSM
description:
  - Logs in with the old PIN, sets the new one, and verifies each token by one login with the new one. Both PINs are read from
    sealed credentials through pipes, and appear in no argument, environment or output.
  - Each step is recorded in I(record) before it is taken, so that an interrupted run can be continued. Where it is then
    unknown which PIN a token accepts, one is tried; if it is refused, the other one is, which resets the token's
    counter. A token never counts more than one wrong PIN.
  - Refuses a token whose flags warn that the next failed login might be its last, and a new PIN that is too long or too short.
author: [llmkeep contributors (@llmkeep)]
options:
  module: {description: Path of the PKCS#11 module., type: path, required: true}
  address: {description: Address of the server for p11-kit-client.so., type: str, default: ""}
  tokens: {description: Labels of the tokens., type: list, elements: str, required: true}
  pin: {description: Sealed credential that holds the current PIN., type: path, required: true}
  new_pin: {description: Sealed credential that holds the new PIN., type: path, required: true}
  record: {description: File that records the steps., type: path, default: /var/lib/llmkeep/hsm-pin.json}
  user: {description: Account that loads the PKCS#11 module; defaults to the current one., type: str, default: ""}
  seconds: {description: Time limit for each of the HSM's answers., type: int, default: 20}
"""

EXAMPLES = r"""
- name: Change the PIN in both tokens
  llmkeep.estate.hsm_pin:
    module: /usr/lib/vendor/libpkcs11.so
    tokens: [llmkeep, llmkeep-spare]
    pin: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
    new_pin: /var/lib/llmkeep/hsm-pin-next/llmkeep.hsm-pin
"""

RETURN = r"""
tokens: {description: Labels of the tokens whose PIN this run changed., returned: success, type: list, elements: str}
fault: {description: Name of the fault; docs/operate/hsm.md has a runbook for each., returned: failure, type: str}
"""

import dataclasses
import hashlib
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

OLD, NEW = "old", "new"


@dataclasses.dataclass
class Entry:
    """What is known of a token. `asked`: PINs shown without an answer that was kept. `refused`: what it does not take."""

    changed: bool = False
    asked: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)

    @property
    def explains(self) -> bool:
        """Whether a wrong PIN that the token counts is one that this rotation showed, so that the other one is right."""
        return bool(self.refused or self.asked)

    def next(self) -> str:
        """The PIN to show: never one that may have been counted as wrong."""
        for which in (NEW, OLD):
            if which not in self.refused and which not in self.asked:
                return which
        left = [which for which in (NEW, OLD) if which not in self.refused]
        return left[0] if len(left) == 1 else ""


class Rotation:
    """The tokens on their way to the new PIN."""

    def __init__(self, settings: Any, pins: dict[str, bytes], record: Path, which: str) -> None:
        """WHICH names the new PIN, without saying it: a record of another rotation is not gone on with."""
        self.settings, self.pins, self.path, self.which = settings, pins, record, which
        begun = json.loads(record.read_text()) if record.exists() else {}
        formats.require(record, begun, partial(token_keys.Fault, "failed"))
        known: dict[str, Any] = {"rotation": which, "tokens": {}, **begun}
        self.entries = {label: Entry(**fields) for label, fields in known["tokens"].items()}
        if known["rotation"] != which and all(entry.changed for entry in self.entries.values()):
            self.entries = {}
        elif known["rotation"] != which:
            raise token_keys.Fault(
                "pin_held_back",
                f"{record} tells of a change to another new PIN than the one given now, which ended in the middle; no login"
                " was tried. Put that one back on the control node, or find out which PIN each token takes and remove the"
                " record (docs/operate/hsm.md)",
            )

    def keep(self) -> None:
        tokens = {label: dataclasses.asdict(entry) for label, entry in self.entries.items()}
        document = {"format": formats.FORMAT, "rotation": self.which, "tokens": tokens}
        content = json.dumps(document, indent=1).encode() + b"\n"
        atomic.write_file(self.path, content, os.geteuid(), os.getegid(), 0o600)

    def asking(
        self, doing: str, work: Callable[[Any, Any, Any], None], label: str, writes: bool = False
    ) -> None:
        """WORK with module, session and token, in a process of its own."""

        def asked(step: Callable[[str], None]) -> None:
            step("list its tokens")
            module = token_keys.loaded(self.settings)
            token = self.ready(module.tokens(), label)
            step(f"{doing} in the token {label}")
            with module.session(token.slot, writes=writes) as session:
                work(module, session, token)

        token_keys.bounded(asked, self.settings.seconds, self.settings.user)

    def ready(self, tokens: list[Any], label: str) -> Any:
        """The one token of a label, which a login cannot lock and the new PIN fits."""
        entry = self.entries.get(label)
        if entry and entry.explains:
            tokens = [dataclasses.replace(token, flags=token.flags & ~pkcs11.COUNT_LOW) for token in tokens]
        token = token_keys.the_token(tokens, label, None, self.settings)
        shortest, longest = token.pin_lengths
        if not shortest <= len(self.pins[NEW]) <= longest:
            raise token_keys.Fault(
                "failed",
                f"the token {label} takes PINs of {shortest} to {longest} characters, and the new one has"
                f" {len(self.pins[NEW])}; nothing was changed. Set hsm_pin_bytes (2 characters each) and remove the new one"
                " on the control node",
            )
        return token

    def shown(self, label: str, which: str) -> bool:
        """Whether the token takes a PIN: one login."""
        try:
            self.asking(
                f"log in with the {which} PIN",
                lambda _module, session, token: token_keys.log_in(session, token, self.pins[which]),
                label,
            )
        except token_keys.Fault as fault:
            if fault.kind != "pin_wrong":
                raise
            return False
        return True

    def taken(self, label: str) -> str:
        """Which PIN a token takes, after a run that ended between two steps."""
        entry = self.entries[label]
        while which := entry.next():
            entry.asked.append(which)
            self.keep()
            accepted = self.shown(label, which)
            entry.asked = []
            if accepted:
                return which
            entry.refused.append(which)
            self.keep()
        raise token_keys.Fault(
            "pin_wrong" if len(entry.refused) > 1 else "pin_held_back",
            f"it is not known which PIN the token {label} takes: {' and '.join(entry.refused) or 'none'} refused,"
            f" {' and '.join(entry.asked) or 'none'} shown by runs that were killed meanwhile. No further login is tried."
            f" Log in by hand, set the PIN to the new one, and set `changed` of {label} in {self.path} to true"
            " (docs/operate/hsm.md)",
        )

    def change(self, label: str) -> None:
        """From the old PIN to the new one; what is in between is on disk before."""
        fresh = label not in self.entries
        self.entries[label] = Entry()
        self.keep()

        def exchange(_module: Any, session: Any, token: Any) -> None:
            token_keys.log_in(session, token, self.pins[OLD])
            session.change_pin(self.pins[OLD], self.pins[NEW])

        try:
            self.asking("change the PIN", exchange, label, writes=True)
        except token_keys.Fault as fault:
            if fault.kind == "pin_wrong" and fresh:  # the login comes first: nothing was changed
                del self.entries[label]
                self.keep()
            raise
        self.entries[label].changed = True
        self.keep()

    def settle(self) -> list[str]:
        """Bring all tokens to the new PIN; labels of those that were changed."""

        def look(step: Callable[[str], None]) -> None:
            step("list its tokens")
            tokens = token_keys.loaded(self.settings).tokens()
            for label in self.settings.tokens:
                self.ready(tokens, label)

        token_keys.bounded(look, self.settings.seconds, self.settings.user)  # all of them, before any login
        changed = []
        for label in self.settings.tokens:
            entry = self.entries.get(label)
            if entry and entry.changed:
                continue
            if entry is None or self.taken(label) == OLD:
                self.change(label)
                changed.append(label)
            else:
                self.entries[label] = Entry(changed=True)
                self.keep()
        for label in self.settings.tokens:
            if not self.shown(label, NEW):
                raise token_keys.Fault(
                    "pin_wrong",
                    f"the token {label} rejects the new PIN, to which it was set: the PIN was changed since. Nothing was "
                    "sealed; find out who changed it before any host is restarted",
                )
        return changed


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **{name: option for name, option in token_keys.OPTIONS.items() if name != "label"},
            "new_pin": {"type": "path", "required": True, "no_log": False},
            "record": {"type": "path", "default": "/var/lib/llmkeep/hsm-pin.json"},
        },
        supports_check_mode=False,
    )
    parameters = module.params
    paths = {OLD: Path(parameters["pin"]), NEW: Path(parameters["new_pin"])}
    try:
        known = {which: pins.unsealed(path)[1] for which, path in paths.items()}
        settings = token_keys.settings_of({**parameters, "label": "", "record": None})
        which = hashlib.sha256(paths[NEW].read_bytes()).hexdigest()  # of the sealed one, which says nothing
        changed = Rotation(settings, known, Path(parameters["record"]), which).settle()
    except token_keys.Fault as fault:
        module.fail_json(msg=str(fault), fault=fault.kind, exit=token_keys.EXIT[fault.kind])
    module.exit_json(changed=bool(changed), tokens=changed)


if __name__ == "__main__":
    main()
