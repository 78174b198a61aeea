"""Filters of playbooks/identities.yml: the record of a new key, made on the control node, and what the hosts list."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # as in payload/llmserve/access/api_keys.py
LIFETIME = re.compile(r"([1-9][0-9]{0,4})([dh])")

Hosts = dict[str, list[dict[str, Any]]]


def lifetime(text: str) -> timedelta:
    """A lifetime such as 90d or 12h; raises ValueError."""
    match = LIFETIME.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a lifetime: specify days or hours, such as 90d or 12h")
    return timedelta(**{"days" if match[2] == "d" else "hours": int(match[1])})


def identity_record(request: dict[str, Any], hosts: Hosts, serving: list[str]) -> dict[str, Any]:
    """The record that all hosts import, without the key: its holder is the REQUEST's, or that of the key which it replaces.

    HOSTS: what each host that answered lists; SERVING: all hosts that should. Raises ValueError.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    record = {"id": secrets.token_hex(6), "kind": "api_key", "created": now.isoformat()}
    holder = {name: request[name] for name in ("subject", "tenant", "roles")}
    duration = lifetime(request["expires"]) if request["expires"] else None
    if request["verb"] == "rotate":
        old = agreed_record(request["id"], holder, hosts, serving)
        holder = {name: old[name] for name in holder}
        ends = now + lifetime(request["overlap"])
        if old["expires"]:
            old_end = datetime.fromisoformat(old["expires"])
            ends = min(ends, old_end)
            duration = duration or old_end - datetime.fromisoformat(old["created"])
        record |= {"replaces": old["id"], "replaced_expires": ends.isoformat()}
    if not holder["roles"]:
        raise ValueError("there is no role: set identity_roles")
    for name in holder["subject"], holder["tenant"], *holder["roles"]:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name: use up to 64 letters, digits and . _ @ -")
    if request["certificate"]:
        record |= {"kind": "certificate", "certificate": request["certificate"]}
    expires = (now + duration).isoformat() if duration else None
    return {**record, **holder, "expires": expires}


def agreed_record(number: str, holder: dict[str, Any], hosts: Hosts, serving: list[str]) -> dict[str, Any]:
    """The live key NUMBER, which all hosts list alike, and of this HOLDER where one is stated; raises ValueError.

    A single host of several could name any holder for all of them: then the holder has to be stated.
    """
    # Of several records with one id, identity_differences compares the last.
    listed = {
        host: [each for each in records if each["id"] == number][-1:] for host, records in hosts.items()
    }
    if not any(listed.values()):
        raise ValueError(
            f"there is no key {number!r} on {', '.join(hosts)}: identity_verb=list shows the ids"
        )
    if differences := identity_differences(listed):
        raise ValueError(f"{'; '.join(differences)}: import or revoke it there first")
    if len(hosts) < min(2, len(serving)) and not all(holder.values()):
        raise ValueError(
            f"only {', '.join(hosts)} of {', '.join(serving)} says whose key {number} is: set identity_subject, "
            "identity_tenant and identity_roles to what you expect"
        )
    record = next(iter(listed.values()))[0]
    expected = {
        "kind": "api_key",
        "state": "live",
        **{name: value for name, value in holder.items() if value},
    }
    for name, value in expected.items():
        if record[name] != value:
            raise ValueError(
                f"{name} of {number} is {record[name]} on {', '.join(hosts)}, and expected {value}"
            )
    for host, records in hosts.items():
        for each in records:
            if each["replaces"] == number and each["state"] == "live":
                raise ValueError(f"{number} has been replaced by {each['id']} on {host}: rotate that one")
    return record


def identity_fault(request: dict[str, Any], hosts: Hosts, serving: list[str]) -> str:
    """Why there is no `identity_record`; empty if there is one."""
    try:
        identity_record(request, hosts, serving)
    except ValueError as error:
        return str(error)
    return ""


def with_new_key(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a new random key, or as it is with its certificate. Each evaluation makes another key."""
    if "certificate" in record:
        return record
    return {**record, "key": f"llmk_{record['id']}_{secrets.token_hex(24)}"}


def identity_lines(hosts: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What `llm-serve keys list --json` says on each host, as one list for people; a key is one line."""
    identities: dict[str, dict[str, Any]] = {}
    for records in hosts.values():
        for record in records:
            merged = identities.setdefault(record["id"], dict(record))
            merged["last_used"] = max(merged["last_used"] or "", record["last_used"] or "") or None
    return [
        f"{record['id']}  {record['kind']}  {record['state']}  {record['subject']}  {record['tenant']}"
        f"  {','.join(record['roles'])}  until {record['expires'] or 'for ever'}"
        f"  last used {record['last_used'] or 'never'}"
        for record in identities.values()
    ]


def identity_differences(hosts: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Where the hosts disagree about a key: one has it and another lacks it, or a field of it differs."""
    by_host = {host: {record["id"]: record for record in records} for host, records in hosts.items()}
    lines = []
    for number in dict.fromkeys(number for records in by_host.values() for number in records):
        lacking = [host for host, records in by_host.items() if number not in records]
        lines += [f"{number} is missing on {', '.join(lacking)}"] if lacking else []
        for name in "kind", "fingerprint", "state", "created", "expires", "subject", "tenant", "roles":
            values = {host: records[number][name] for host, records in by_host.items() if number in records}
            if len({repr(value) for value in values.values()}) > 1:
                observed = ", ".join(f"{value} on {host}" for host, value in values.items())
                lines.append(f"{name} of {number} is {observed}")
    return lines


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "identity_record": identity_record,
            "identity_fault": identity_fault,
            "with_new_key": with_new_key,
            "identity_lines": identity_lines,
            "identity_differences": identity_differences,
        }
