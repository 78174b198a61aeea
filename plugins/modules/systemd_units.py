#!/usr/bin/python
"""State module: the units of a role, enabled and running, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_units
short_description: Enable and start a role's units, and stop instances that are no longer declared
description:
  - Reads the state of all units with one call of systemctl and changes only those that differ.
  - Waits until a started unit is ready (C(Type=notify)); a failure is reported with the unit's last messages.
  - A unit whose unit file or drop-in changed is restarted, and a unit that config_tree marked is reloaded.
  - Check mode accepts units that do not exist yet.
author: [llmkeep contributors (@llmkeep)]
options:
  units: {description: Units to enable and start., type: list, elements: str, required: true}
  stopped_others:
    description: Pattern; matching units that are not in I(units) are stopped and disabled.
    type: str
  stopped: {description: Units that must not run nor start at boot., type: list, elements: str, default: []}
  state:
    description: C(restarted) and C(reloaded) act unconditionally, for handlers; a stopped unit is started.
    type: str
    choices: [started, restarted, reloaded]
    default: started
"""

EXAMPLES = r"""
- name: Start the engines
  llmkeep.estate.systemd_units:
    units: [llm-audit.service, llm-engine@echo.service]
    stopped_others: llm-engine@*.service
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config.units import (
    Refused,
    must,
    others,
    reread,
    states,
    systemctl,
    there,
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
    names = [str(unit) for unit in params["units"] or []]
    changes: list[str] = []
    now, changed = reread(names, check)
    for unit, state in now.items():
        if not there(unit, state, check):
            changes.append(f"{unit}: will be started once it exists")
            continue
        if state.get("UnitFileState") in {"disabled", "linked"}:
            changes.append(f"{unit}: enabled")
            if not check:
                must(unit, "enable")
        pending = (atomic.PENDING / unit).exists()
        verb = verb_for(str(params["state"]), state["ActiveState"], pending, unit in changed)
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
        for unit in others(str(params["stopped_others"]), names):
            changes.append(f"{unit}: stopped and disabled")
            if not check:
                must(unit, "disable", "--now")
    return changes


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "units": {"type": "list", "elements": "str", "required": True},
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
