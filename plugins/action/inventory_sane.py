"""Validate the inventory before any host is touched."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.llmkeep.estate.plugins.plugin_utils.inventory import faults, specifications

REACH_SECONDS = 5


def unreachable(address: str, port: int, in_lab: bool) -> str | None:
    """Why the control node cannot be reached from here, in one sentence; None if it can."""
    try:
        socket.create_connection((address, port), timeout=REACH_SECONDS).close()
    except OSError as problem:
        words = f"{address}:{port}, the control node, cannot be reached from here ({problem}); nothing was "
        words += "changed. "
        if in_lab:
            return words + (
                "The lab's hosts live in a network namespace of their own: use `.venv/bin/lab site`, or put "
                "`.venv/bin/lab netns --` before your command; `.venv/bin/lab status` says whether they run."
            )
        return (
            words
            + "Run it on the control node itself (`llmkeep site -i INVENTORY`), or set ansible_host right."
        )
    return None


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller and contacts no host, except for one TCP connection to the control node."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        options = {"roles": {"type": "path", "required": True}, "reach": {"type": "bool", "default": True}}
        _, arguments = self.validate_argument_spec(options)
        variables = task_vars or {}
        groups: dict[str, list[str]] = variables["groups"]
        tags = [*variables.get("ansible_run_tags", ()), *variables.get("ansible_skip_tags", ())]
        limit = str(variables.get("ansible_limit", ""))
        problems = faults(
            groups, variables["hostvars"], specifications(Path(arguments["roles"])), tags, limit
        )
        if problems:
            result.update(failed=True, faults=problems)
            lines = "\n".join(f"- {fault}" for fault in problems)
            result["msg"] = f"The inventory has {len(problems)} fault(s); nothing was changed.\n{lines}"
            return result
        control = variables["hostvars"][groups["control"][0]]
        words = arguments["reach"] and unreachable(
            str(control.get("ansible_host", groups["control"][0])),
            int(control.get("ansible_port", 22)),
            "lab_network" in control,
        )
        if words:
            raise AnsibleActionFail(words)
        result["changed"] = False
        return result
