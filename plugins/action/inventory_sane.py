"""Refuse an inventory that no role would understand, before any host is touched."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase

# Group = feature. A host in none of these would silently get nothing.
GROUPS = ("control", "mirror", "softhsm", "storage", "serve", "vllm", "edge", "train", "search", "logs")
# What a group is called now; a host of the old name would silently get nothing.
RENAMED_GROUPS = {"hsm": "softhsm"}
REACH_SECONDS = 5


def specifications(roles: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Role to the options of all its entry points, from meta/argument_specs.yml."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        options: dict[str, dict[str, Any]] = {}
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            options.update(entry.get("options") or {})
        found[path.parents[1].name] = options
    return found


def unknown(names: list[str], known: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Variables that look like a role's and are none."""
    every = sorted({name for options in known.values() for name in options})
    prefixes = sorted((role for role in known if not role.startswith("_")), key=len, reverse=True)
    for name in sorted(names):
        role = next((role for role in prefixes if name.startswith(f"{role}_")), None)
        if role is None or name in every:
            continue
        near = difflib.get_close_matches(name, every, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"{role} has {', '.join(sorted(known[role])) or 'no variables'}"
        )
        yield f"{name} is no variable of the role {role}; {hint}"


def wrong(values: Mapping[str, Any], known: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Values that are not of the type their role's specification says."""
    for options in known.values():
        for name, option in options.items():
            if name not in values:
                continue
            kept = {
                key: value
                for key, value in option.items()
                if key in ("type", "elements", "choices", "options")
            }
            for message in ArgumentSpecValidator({name: kept}).validate({name: values[name]}).error_messages:
                yield f"{name} is {values[name]!r}: {message}"


def unplaced(groups: list[str]) -> Iterator[str]:
    """A host that no feature of the estate wants."""
    if not set(groups) & set(GROUPS):
        seen = ", ".join(group for group in groups if group not in ("all", "ungrouped")) or "no group"
        yield f"it is in {seen}, and none of the estate's groups; put it in one of {', '.join(GROUPS)}"
    for name in sorted(set(groups) & set(RENAMED_GROUPS)):
        yield f"it is in {name}, which is called {RENAMED_GROUPS[name]} now; rename the group in the inventory"


def keyless(values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Iterator[str]:
    """Encrypted volumes that no HSM would open."""
    if "storage" in values["group_names"] and not groups.get("softhsm") and not values.get("hsm_module"):
        yield (
            "it is in storage, whose volumes open by a key in an HSM, and has none; set hsm_module to your HSM's"
            " PKCS#11 module (docs/hsm.md), or put a host into softhsm, the lab's double"
        )


def unreachable(address: str, port: int, in_lab: bool) -> str | None:
    """Why the control node cannot be spoken to from here, in one sentence; None when it can."""
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
    """Runs on the controller and speaks to no host but for one TCP connection."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec({"roles": {"type": "path", "required": True}})
        variables = task_vars or {}
        groups: dict[str, list[str]] = variables["groups"]
        known = specifications(Path(arguments["roles"]))
        problems = [
            f"the group {group} is empty: {why}"
            for group, why in (
                ("control", "put the host there that was bootstrapped from the stick"),
                ("mirror", "put the host there that serves the bundle; it may be the control node"),
            )
            if not groups.get(group)
        ]
        for host in groups["all"]:
            of_host = variables["hostvars"][host]
            told = [*unplaced(list(of_host["group_names"])), *unknown(list(of_host), known)]
            told += keyless(of_host, groups)
            told += wrong(self._values(of_host, known), known)
            problems += [f"{host}: {problem}" for problem in told]
        if problems:
            result.update(failed=True, problems=problems)
            result["msg"] = (
                f"The inventory has {len(problems)} problem(s); nothing was changed. " + " | ".join(problems)
            )
            return result
        control = variables["hostvars"][groups["control"][0]]
        words = unreachable(
            str(control.get("ansible_host", groups["control"][0])),
            int(control.get("ansible_port", 22)),
            "lab_network" in control,
        )
        if words:
            raise AnsibleActionFail(words)
        result["changed"] = False
        return result

    def _values(
        self, of_host: Mapping[str, Any], known: dict[str, dict[str, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The host's values of the roles' variables. One that needs a fact is left to its role to judge."""
        found: dict[str, Any] = {}
        for name in {name for options in known.values() for name in options if name in of_host}:
            try:
                found[name] = of_host[name]
            except AnsibleError:
                continue
        return found
