#!/usr/bin/python
"""State module: the accounts of a host's operators."""

from __future__ import annotations

DOCUMENTATION = r"""
module: operator_accounts
short_description: Make the accounts of operators, and lock those of former ones
description:
  - Accounts whose own group is I(group) are operators'. Declared ones exist, without a password, until the day that they end.
  - Any other account of the group is locked and has ended, has no shell, and its processes are killed, those by sudo included.
    It is kept, so that no later account has its id.
  - Refuses to touch an account that is not of the group, before anything is changed.
options:
  group: {description: "The group of operators, which is made.", type: str, required: true}
  accounts:
    description: Declared operators.
    type: list
    elements: dict
    required: true
    suboptions:
      name: {description: Name., type: str, required: true}
      expires: {description: "First day without it, as 2027-07-01; empty for no end.", type: str, default: ""}
attributes:
  check_mode: {description: Tells what would change., support: full}
author: [llmkeep contributors (@llmkeep)]
"""

EXAMPLES = r"""
- name: Make the accounts of operators
  llmkeep.estate.operator_accounts:
    group: llm-operators
    accounts: [{name: alice, expires: "2027-07-01"}]
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
"""

import os
import signal
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

LOCKED = "1"  # days since 1970: an account that ended before anything else did
NO_SHELL = "/usr/sbin/nologin"
SHELL = "/bin/bash"
NEW = [
    *("--no-user-group", "--create-home", "--shell", SHELL, "--key", "HOME_MODE=0700"),
    *("--key", "PASS_MAX_DAYS=-1", "--key", "PASS_MIN_DAYS=0"),  # it has no password that could grow old
]


class Account(NamedTuple):
    """What /etc/passwd and /etc/shadow have of one account."""

    uid: int
    gid: int
    shell: str
    secret: str
    ends: str  # days since 1970, or empty


class Step(NamedTuple):
    """A change: its line, and the command that makes it."""

    change: str
    command: list[str]


def accounts_of(passwd: str, shadow: str) -> dict[str, Account]:
    """By name, from the text of both files."""
    secrets = {fields[0]: fields for line in shadow.splitlines() if len(fields := line.split(":")) > 7}
    by_name = {}
    for line in passwd.splitlines():
        name, _, uid, gid, _, _, shell = line.split(":")
        hidden = secrets.get(name, [""] * 8)
        by_name[name] = Account(int(uid), int(gid), shell, hidden[1], hidden[7])
    return by_name


def days(day: str) -> str:
    """Since 1970, as /etc/shadow has the end of an account."""
    return str((date.fromisoformat(day) - date(1970, 1, 1)).days) if day else ""


def steps(declared: dict[str, str], present: dict[str, Account], gid: int, group: str) -> list[Step]:
    """What has to be done, those that lock first; Refused for a declared name that another account has."""
    for name in sorted(declared.keys() & present.keys()):
        if present[name].gid != gid:
            raise Refused(
                f"{name} is an account of this host that does not belong to an operator (id {present[name].uid}); nothing "
                "was changed. "
                "Give the operator another name, or remove the account"
            )
    plan = []
    for name, account in sorted(present.items()):
        if account.gid != gid or name in declared:
            continue
        if (account.shell, account.ends, account.secret[:1]) != (NO_SHELL, LOCKED, "!"):
            lock = ["usermod", "--lock", "--expiredate", LOCKED, "--shell", NO_SHELL, name]
            plan.append(Step(f"locked: {name}", lock))
    for name, end in sorted(declared.items()):
        expiry = ["--expiredate", end]
        if name not in present:
            plan.append(Step(f"account: {name}", ["useradd", "--gid", group, *NEW, *expiry, name]))
        elif (present[name].shell, present[name].ends) != (SHELL, days(end)) or present[name].secret[
            :1
        ] not in ("!", "*"):
            plan.append(Step(f"account: {name}", ["usermod", "--lock", "--shell", SHELL, *expiry, name]))
    return plan


def processes(uids: set[int], proc: Path = Path("/proc")) -> list[int]:
    """Of these users, and of what they became by sudo: the kernel keeps whose login a process is of."""
    numbers = []
    for folder in proc.glob("[0-9]*"):
        try:
            own = (folder / "status").read_text().split("\nUid:\t")[1].split()[:4]
            login = (folder / "loginuid").read_text().strip() if (folder / "loginuid").exists() else ""
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if uids & {int(each) for each in [*own, *([login] if login.isdecimal() else [])]}:
            numbers.append(int(folder.name))
    return sorted(numbers)


def end_sessions(uids: set[int]) -> None:
    """Kill until none is left; Refused where one stays for five seconds."""
    deadline = time.monotonic() + 5
    while left := processes(uids):
        if time.monotonic() > deadline:
            raise Refused(
                f"processes {left} of former operators cannot be killed: look at them, and run it again"
            )
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def applied(group: str, accounts: list[dict[str, Any]], check: bool) -> list[str]:
    """Bring the host's accounts to the declared ones; the changes."""
    changes = []
    groups = dict(line.split(":")[0:3:2] for line in Path("/etc/group").read_text().splitlines())
    present = accounts_of(Path("/etc/passwd").read_text(), Path("/etc/shadow").read_text())
    gid = int(groups.get(group, -1))
    plan = steps({each["name"]: each["expires"] for each in accounts}, present, gid, group)
    if group not in groups:
        plan.insert(0, Step(f"group: {group}", ["groupadd", "--system", group]))
    for step in plan:
        changes.append(step.change)
        if not check:
            done = subprocess.run(step.command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Refused(f"{' '.join(step.command)} ended with {done.returncode}: {done.stderr.strip()}")
    declared = {each["name"] for each in accounts}
    former = {each.uid for name, each in present.items() if each.gid == gid and name not in declared}
    if running := processes(former) if former else []:
        changes.append(f"sessions ended: {len(running)} processes")
        if not check:
            end_sessions(former)
    return changes


def main() -> None:
    account = {"name": {"type": "str", "required": True}, "expires": {"type": "str", "default": ""}}
    module = AnsibleModule(
        argument_spec={
            "group": {"type": "str", "required": True},
            "accounts": {"type": "list", "elements": "dict", "required": True, "options": account},
        },
        supports_check_mode=True,
    )
    try:
        changes = applied(module.params["group"], module.params["accounts"], module.check_mode)
    except Refused as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(
        changed=bool(changes),
        changes=changes,
        diff=[{"prepared": "\n".join([*changes, ""])}] if changes else [],
    )


if __name__ == "__main__":
    main()
