"""Filters of role operators: why declared operators are refused, and the commands of each verb."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from datetime import date, timedelta
from typing import Any

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9_.-]+)?\.(service|timer)")
COMMENT = re.compile(r"[A-Za-z0-9 ._@+-]{0,80}")
TOKENS = ("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
PLAIN = "ssh-ed25519"
BREAKGLASS = "breakglass"
# Accounts of Debian and of our packages with an id below 1000; the host's own are compared with its /etc/passwd.
SYSTEM = re.compile(
    r"(root|daemon|bin|sys|sync|games|man|lp|mail|news|uucp|proxy|www-data|backup|list|irc|nobody|sshd|sudo|chrony|ansible"
    r"|adm|operator|messagebus|polkitd|dnsmasq|redis|opa|vllm|slurm|munge|kibana|elasticsearch|logstash|filebeat|prometheus"
    r"|systemd-.*|llm-.*|llmkeep-.*|_.*)"
)
SYSTEMCTL = "/usr/bin/systemctl --no-ask-password --no-pager"
JOURNALCTL = "/usr/bin/journalctl --no-pager"
# By verb, of a unit on any host.
OF_UNITS = {
    "status": (f"{SYSTEMCTL} --full status UNIT",),
    "restart": (f"{SYSTEMCTL} restart UNIT",),
    "logs": tuple(
        f"{JOURNALCTL} --unit=UNIT {which}" for which in ("--lines=1000", "--since=today", "--follow")
    ),
}
# By verb, on the control node alone. The inventory is root's: one of an operator's own could run anything.
LLMKEEP = "/usr/local/bin/llmkeep"
INVENTORY = "/etc/llmkeep/inventory"
OF_CONTROL = {
    "site": (f"{LLMKEEP} site -i {INVENTORY}", f"{LLMKEEP} site -i {INVENTORY} --check --diff"),
    "verify": (f"{LLMKEEP} verify -i {INVENTORY}", f"{LLMKEEP} verify -i {INVENTORY} --json"),
    "audit": (
        f"{LLMKEEP} audit verify",
        f"{LLMKEEP} audit show",
        f"{LLMKEEP} audit findings",
        f"{LLMKEEP} audit collect -i {INVENTORY}",
    ),
}

Accounts = list[dict[str, Any]]


def key_fault(text: Any, plain: bool) -> str:
    """Why a public key in OpenSSH's form is refused; empty for one that is taken."""
    kinds = (*TOKENS, PLAIN) if plain else TOKENS
    kind, _, rest = str(text).partition(" ")
    encoded, _, comment = rest.partition(" ")
    if kind not in kinds:
        hint = "" if plain or kind != PLAIN else ", or set operators_plain_keys_allowed"
        return (
            f"the key {str(text)[:60]!r} begins with none of {', '.join(kinds)}: give a key of a token{hint}"
        )
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return f"the key {str(text)[:60]!r} has no base64 after its type: copy the line of the .pub file"
    if blob[:4] != len(kind).to_bytes(4, "big") or blob[4 : 4 + len(kind)] != kind.encode():
        return f"the key {str(text)[:60]!r} is not of the type that it names: copy the line of the .pub file"
    if not COMMENT.fullmatch(comment):
        return f"the key {str(text)[:60]!r} has a comment with other characters than letters, digits and ._@+-: shorten it"
    return ""


def account_faults(account: dict[str, Any], plain: bool, today: date) -> list[str]:
    """Why one operator is refused, a sentence each."""
    name = str(account.get("name"))
    verbs, units = account.get("verbs") or [], account.get("units") or []
    faults = []
    if not NAME.fullmatch(name):
        faults.append(f"{name!r} is not a valid account name: use a-z, 0-9 and -, a letter first, at most 31")
    elif SYSTEM.fullmatch(name) or name == BREAKGLASS:
        faults.append(f"{name} is a name of the system: give the operator another one")
    if not account.get("keys"):
        faults.append(f"{name} has no key: add one, or remove the operator")
    faults += [f"{name}: {fault}" for key in account.get("keys") or [] if (fault := key_fault(key, plain))]
    verbs_known = [*OF_UNITS, *OF_CONTROL]
    faults += [
        f"{name} has the verb {verb!r}, which is none of {', '.join(verbs_known)}"
        for verb in verbs
        if verb not in verbs_known
    ]
    faults += [
        f"{name} has the unit {unit!r}: give the exact name of a .service or .timer"
        for unit in units
        if not UNIT.fullmatch(str(unit))
    ]
    if {*verbs} & {*OF_UNITS} and not units:
        faults.append(f"{name} has {', '.join(sorted({*verbs} & {*OF_UNITS}))} and no units: name them")
    if until := account.get("until"):
        try:
            if date.fromisoformat(str(until)) < today:
                faults.append(
                    f"{name} was an operator until {until}, which is past: remove the entry, which locks the account"
                )
        except ValueError:
            faults.append(f"{name} has until {str(until)!r}, which is not a day: write it as 2027-06-30")
    return faults


def operator_faults(
    accounts: Accounts, breakglass: list[str], plain: bool, today: date | None = None
) -> list[str]:
    """One sentence for each reason why these operators are refused. A break-glass key may be without a token."""
    faults = [fault for each in accounts for fault in account_faults(each, plain, today or date.today())]
    faults += [f"{BREAKGLASS}: {fault}" for key in breakglass if (fault := key_fault(key, True))]
    names = Counter(str(each.get("name")) for each in accounts)
    faults += [
        f"{name} is declared {count} times: keep one entry" for name, count in names.items() if count > 1
    ]
    every = [key for each in accounts for key in each.get("keys") or []] + breakglass
    keys = Counter(" ".join(str(key).split(" ")[:2]) for key in every)
    faults += [
        f"the key {key[:60]!r} is there {count} times: a key names one person"
        for key, count in keys.items()
        if count > 1
    ]
    return faults


def operator_commands(account: dict[str, Any], control: bool) -> list[str]:
    """The commands that sudo takes from an operator, exact to the last argument; CONTROL: on a control node."""
    commands: list[str] = []
    for verb in account.get("verbs") or []:
        for unit in account.get("units") or []:
            commands += [command.replace("UNIT", str(unit)) for command in OF_UNITS.get(verb, ())]
        commands += OF_CONTROL.get(verb, ()) if control else ()
    return list(dict.fromkeys(commands))


def operator_accounts(accounts: Accounts, breakglass: list[str]) -> list[dict[str, str]]:
    """Name and the day on which each account ends, the one after the last day, or nothing."""
    ends = {
        str(each["name"]): str(date.fromisoformat(str(each["until"])) + timedelta(days=1))
        if each.get("until")
        else ""
        for each in accounts
    }
    return [
        {"name": name, "expires": end}
        for name, end in (ends | ({BREAKGLASS: ""} if breakglass else {})).items()
    ]


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        """By name."""
        return {
            "operator_accounts": operator_accounts,
            "operator_commands": operator_commands,
            "operator_faults": operator_faults,
        }
