#!/usr/bin/python
"""State module: the units of a role, enabled and running, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: services
short_description: Enable and start a role's units, and stop instances that are no longer wanted
description:
  - Looks at all units by one question to systemd and touches only those that differ.
  - Starting waits until the unit is ready (C(Type=notify)); a failure comes with its last messages.
  - A unit whose unit file or drop-in changed is restarted, and one that config_tree marked is reloaded.
  - Check mode accepts units that do not exist yet.
author: [llmkeep contributors]
options:
  started: {description: Units to enable and start., type: list, elements: str, required: true}
  stopped_others:
    description: Pattern; units like it that are not in I(started) are stopped and disabled.
    type: str
  stopped: {description: Units that must not run nor start at boot., type: list, elements: str, default: []}
  state:
    description: C(restarted) and C(reloaded) act in any case, for handlers; what does not run is started.
    type: str
    choices: [started, restarted, reloaded]
    default: started
"""

EXAMPLES = r"""
- name: Start the engines
  llmkeep.estate.services:
    started: [llm-gateway.service, llm-engine@echo.service]
    stopped_others: llm-engine@*.service
"""

RETURN = r"""
changes: {description: What was or would be done, one line each., returned: always, type: list, elements: str}
"""

import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils import files as atomic  # type: ignore[import-not-found]

START_SECONDS = 1200  # weights of many gigabytes are hashed and loaded before an engine says that it is ready


class Refused(Exception):
    """A unit is not as wanted; the message says which, why, and what to do."""


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", *words], capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"systemctl {' '.join(words)} did not end within {START_SECONDS} s") from None


def states(units: list[str]) -> dict[str, dict[str, str]]:
    """LoadState, ActiveState, UnitFileState and NeedDaemonReload of each unit."""
    if not units:
        return {}
    shown = systemctl(
        "show", "--property=Id,LoadState,ActiveState,UnitFileState,NeedDaemonReload", "--", *units
    )
    blocks = shown.stdout.strip().split("\n\n")
    if shown.returncode != 0 or len(blocks) != len(units):
        raise Refused(f"systemctl show ended with {shown.returncode}: {shown.stderr.strip()}")
    return {
        unit: dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for unit, block in zip(units, blocks, strict=True)
    }


def others(pattern: str, wanted: list[str]) -> list[str]:
    """Units like the pattern that run or are enabled and are not wanted."""
    listed = systemctl("list-units", "--all", "--plain", "--no-legend", "--full", "--", pattern).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.split()}
    listed = systemctl("list-unit-files", "--plain", "--no-legend", "--full", "--", pattern).stdout
    names |= {line.split()[0] for line in listed.splitlines() if line.split()}
    enabled = Path("/etc/systemd/system").glob(f"*.wants/{pattern}")
    names |= {path.name for path in enabled}
    return sorted(name for name in names if name not in wanted and "@." not in name)


def must(unit: str, *words: str) -> None:
    """Run systemctl; Refused with the unit's last messages if it fails."""
    done = systemctl(*words, "--", unit)
    if done.returncode == 0:
        return
    journal = subprocess.run(
        ["journalctl", "--unit", unit, "--lines=15", "--no-pager", "--output=cat"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout.strip()
    raise Refused(
        f"{unit}: systemctl {words[0]} ended with {done.returncode}: {done.stderr.strip()}"
        f" Its last messages: {journal}"
    )


def verb_for(state: str, active: str, pending: bool, unit_changed: bool) -> str | None:
    """What systemctl has to do to a unit in a given ActiveState; None for nothing."""
    if active not in {"active", "reloading"}:
        return "start"
    if state == "restarted" or unit_changed:
        return "restart"
    return "reload-or-restart" if state == "reloaded" or pending else None


def settle(params: dict[str, str | list[str] | None], check: bool) -> list[str]:
    """Bring the units to their state; what was or would be done."""
    wanted = [str(unit) for unit in params["started"] or []]
    changes: list[str] = []
    now = states(wanted)
    reread = {unit for unit, state in now.items() if state.get("NeedDaemonReload") == "yes"}
    if reread or any(state["LoadState"] == "not-found" for state in now.values()):
        if not check:
            systemctl("daemon-reload")
        now = states(wanted)
    for unit, state in now.items():
        if state["LoadState"] != "loaded":
            if check and state["LoadState"] == "not-found":
                changes.append(f"{unit}: will be started once it exists")
                continue
            raise Refused(
                f"{unit} is {state['LoadState']} on this host; its package or unit file has to be there first"
            )
        if state.get("UnitFileState") in {"disabled", "linked"}:
            changes.append(f"{unit}: enabled")
            if not check:
                must(unit, "enable")
        pending = (atomic.PENDING / unit).exists()
        verb = verb_for(str(params["state"]), state["ActiveState"], pending, unit in reread)
        if verb:
            changes.append(f"{unit}: {verb} (was {state['ActiveState']})")
            if not check:
                if state["ActiveState"] == "failed":
                    systemctl("reset-failed", "--", unit)
                must(unit, verb)
        if pending and not check:
            (atomic.PENDING / unit).unlink(missing_ok=True)
    unwanted = [str(unit) for unit in params["stopped"] or []]
    for unit, state in states(unwanted).items():
        if state["ActiveState"] not in {"inactive", "failed"}:
            changes.append(f"{unit}: stopped (was {state['ActiveState']})")
            if not check:
                must(unit, "stop")
        if state.get("UnitFileState") == "enabled":
            changes.append(f"{unit}: disabled")
            if not check:
                must(unit, "disable")
    if params["stopped_others"]:
        for unit in others(str(params["stopped_others"]), wanted):
            changes.append(f"{unit}: stopped and disabled")
            if not check:
                must(unit, "disable", "--now")
    return changes


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "started": {"type": "list", "elements": "str", "required": True},
            "stopped": {"type": "list", "elements": "str", "default": []},
            "stopped_others": {"type": "str"},
            "state": {"type": "str", "choices": ["started", "restarted", "reloaded"], "default": "started"},
        },
        supports_check_mode=True,
    )
    try:
        changes = settle(module.params, module.check_mode)
    except Refused as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(changes), changes=changes)


if __name__ == "__main__":
    main()
