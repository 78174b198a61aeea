#!/usr/bin/python
"""State module: a host's units moved onto a release one after the other, and back where it does not work."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_rollout
short_description: Move units to a release one at a time, and roll all of them back if one fails
description:
  - Each unit has a link C(ROOT/units/UNIT) to the release that it runs, code and configuration (C(etc/)) together. During a
    rollout, and after a crash or a power cut, some units may run the new release while others run the previous one.
  - A unit is restarted if its link names another release, it is not running, its unit file changed, or
    M(llmkeep.estate.config_tree) marked it. A unit with a C(socket) is ready once C(/readyz) on it has answered 200 for a second.
  - Of the units with a socket, those that are not ready are restarted first, so that the last ready one is not stopped.
  - If a unit fails on a new release, all moved units return to the previous one, unit files included, and the call fails.
  - C(ROOT/current) is switched once all units are ready.
author: [llmkeep contributors (@llmkeep)]
options:
  release: {description: Name of the release under C(ROOT/releases)., type: str, required: true}
  root: {description: Directory of releases and links., type: path, default: /opt/llmkeep}
  units:
    description: Units to move, in this order.
    type: list
    elements: dict
    required: true
    suboptions:
      name: {description: Name of the unit., type: str, required: true}
      socket: {description: UNIX socket that answers C(/readyz)., type: path}
      hold: {description: Leave the unit on its release while it is running., type: bool, default: false}
      settle_seconds:
        description: >-
          Seconds to wait after the unit is ready, for waiting requests to be served, before the next one is moved. For a unit
          without a former release no request waits.
        type: int
        default: 0
  stopped_others:
    description: Patterns; matching units that are not in I(units) are stopped.
    type: list
    elements: str
    default: []
  ready_seconds: {description: Time limit for a unit to become ready., type: int, default: 90}
  unit_files: {description: Directory of unit files., type: path, default: /etc/systemd/system}
"""

EXAMPLES = r"""
- name: Move the gateways onto the release
  llmkeep.estate.release_rollout:
    release: 0123456789ab
    units:
      - {name: llm-gateway@1.service, socket: /run/llm-gateway/1.sock}
      - {name: llm-gateway@2.service, socket: /run/llm-gateway/2.sock}
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
held: {description: Units that were left on another release., returned: always, type: list, elements: str}
"""

import http.client
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

QUARANTINED = '"code": "quarantined"'
STEADY_SECONDS = 1.0  # what starts and ends at once was never ready
ASK_SECONDS = 10.0


@dataclass
class Unit:
    """A unit as wanted, and what it ran when the call began (None: nothing yet)."""

    name: str
    socket: str | None
    hold: bool
    settle_seconds: int = 0
    former: str | None = None


@dataclass
class Rollout:
    """Where everything lies, and what was done so far."""

    root: Path
    release: str
    unit_files: Path
    ready_seconds: float
    check: bool
    changes: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    moved: list[Unit] = field(default_factory=list)

    def link(self, unit: Unit) -> Path:
        return self.root / "units" / unit.name

    def move(self, unit: Unit, release: str) -> None:
        """Let the unit run a release, and return once it does. Refused with the reason if it does not."""
        atomic.mark_pending([unit.name])
        self.link(unit).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        atomic.link(self.link(unit), f"../releases/{release}")
        now = states([unit.name])[unit.name]
        if now.get("UnitFileState") in {"disabled", "linked"}:
            must(unit.name, "enable")
        if now["ActiveState"] == "failed":
            systemctl("reset-failed", "--", unit.name)
        must(unit.name, "restart")
        if unit.socket:
            await_ready(unit.name, unit.socket, self.ready_seconds)
        if unit.former:
            time.sleep(unit.settle_seconds)
        (atomic.PENDING / unit.name).unlink(missing_ok=True)

    def go_back(self, former: str) -> None:
        """Give all that were moved what they ran before, the last one first."""
        folder = self.root / "releases" / former / "etc"
        for file in sorted(folder.glob("*.service")):
            place, content = self.unit_files / file.name, file.read_bytes()
            if not place.is_file() or place.read_bytes() != content:
                atomic.write_file(place, content, 0, 0, 0o644)
        systemctl("daemon-reload")
        for unit in reversed(self.moved):
            if unit.former:
                self.move(unit, unit.former)


def readiness(path: str) -> str:
    """What /readyz says on a UNIX socket; an empty text is a yes."""
    connection = http.client.HTTPConnection("gateway", timeout=ASK_SECONDS)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(ASK_SECONDS)
        connection.sock.connect(path)
        connection.request("GET", "/readyz", headers={"Connection": "close"})
        answer = connection.getresponse()
        text = answer.read(500).decode(errors="replace")
        # Unhealthy GPUs do not prevent a release, which may be their repair.
        return "" if answer.status == 200 or QUARANTINED in text else f"{answer.status} {text}"
    except (OSError, http.client.HTTPException) as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        connection.close()


def await_ready(unit: str, path: str, seconds: float) -> None:
    """Until one process of the unit has been ready for a while. Refused with its last word if none is in time."""
    end, since, process = time.monotonic() + seconds, 0.0, ""
    while True:
        trouble, now, pid = readiness(path), time.monotonic(), states([unit])[unit].get("MainPID", "")
        if trouble or pid != process:
            since, process = now, pid
        elif now - since >= STEADY_SECONDS:
            return
        if now > end:
            raise Refused(
                f"{unit} is not ready after {seconds:g} s; {path} says: {trouble or 'ready, by another process'}"
            )
        time.sleep(0.1)


def planned(rollout: Rollout, units: list[Unit]) -> list[Unit]:
    """The units that have to be restarted, in the order in which that is safe."""
    now, changed = reread([unit.name for unit in units], rollout.check)
    units_in_order = []
    for unit in units:
        state = now[unit.name]
        if not there(unit.name, state, rollout.check):
            rollout.changes.append(f"{unit.name}: will be started once it exists")
            continue
        link = rollout.link(unit)
        unit.former = link.readlink().name if link.is_symlink() else None
        runs = state["ActiveState"] in {"active", "reloading"}
        if unit.hold and runs and unit.former:
            rollout.held += [unit.name] if unit.former != rollout.release else []
            continue
        pending = (atomic.PENDING / unit.name).exists() or unit.name in changed
        enabled = state.get("UnitFileState") not in {"disabled", "linked"}
        if not (runs and enabled) or unit.former != rollout.release or pending:
            units_in_order.append(unit)
    # Stable, so that what has no socket (record, engines) stays in front.
    return sorted(
        units_in_order, key=lambda unit: unit.socket is not None and (1 if readiness(unit.socket) else 2)
    )


def settle(params: dict[str, Any], check: bool) -> Rollout:
    """Bring all units onto the release. Refused where one does not work there; then all are back where they were."""
    rollout = Rollout(
        Path(params["root"]),
        params["release"],
        Path(params["unit_files"]),
        params["ready_seconds"],
        check,
    )
    units = [
        Unit(each["name"], each["socket"], each["hold"], each["settle_seconds"]) for each in params["units"]
    ]
    for unit in planned(rollout, units):
        rollout.changes.append(f"{unit.name}: {unit.former or 'nothing'} -> {rollout.release}")
        if check:
            continue
        rollout.moved.append(unit)
        try:
            rollout.move(unit, rollout.release)
        except Refused as problem:
            raise Refused(failed(rollout, unit, problem)) from problem
    names = [unit.name for unit in units]
    for unit in sorted({unit for pattern in params["stopped_others"] for unit in others(pattern, names)}):
        rollout.changes.append(f"{unit}: stopped and disabled")
        if not check:
            must(unit, "disable", "--now")
    current = rollout.root / "current"
    if not (current.is_symlink() and str(current.readlink()) == f"releases/{rollout.release}"):
        rollout.changes.append(f"current: {rollout.release}")
        if not check:
            atomic.link(current, f"releases/{rollout.release}")
    for link in (rollout.root / "units").glob("*"):
        if link.name not in names and not check:
            link.unlink()  # it would keep a release that no unit runs
    return rollout


def failed(rollout: Rollout, unit: Unit, problem: Refused) -> str:
    """Go back where there is something to go back to; the sentence for the operator."""
    message = f"release {rollout.release} does not work here: {problem}"
    if not unit.former or unit.former == rollout.release:
        return f"{message} There is no other release to roll back to: fix the reported problem, and run this again."
    try:
        rollout.go_back(unit.former)
    except Refused as second:
        return f"{message} The rollback to {unit.former} failed too: {second} Look at this host now; the others were not touched."
    names = ", ".join(each.name for each in rollout.moved)
    return (
        f"{message} {names} run release {unit.former} again and serve; the other services were not changed. Use a bundle "
        "whose payload works, and run this again."
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "release": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/opt/llmkeep"},
            "units": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "socket": {"type": "path"},
                    "hold": {"type": "bool", "default": False},
                    "settle_seconds": {"type": "int", "default": 0},
                },
            },
            "stopped_others": {"type": "list", "elements": "str", "default": []},
            "ready_seconds": {"type": "int", "default": 90},
            "unit_files": {"type": "path", "default": "/etc/systemd/system"},
        },
        supports_check_mode=True,
    )
    try:
        done = settle(module.params, module.check_mode)
    except (Refused, OSError) as problem:
        module.fail_json(msg=str(problem))
    if done.held:
        module.warn(
            f"{', '.join(done.held)} still run another release than {done.release}: site.yml moves them"
        )
    module.exit_json(changed=bool(done.changes), changes=done.changes, held=done.held)


if __name__ == "__main__":
    main()
