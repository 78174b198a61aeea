"""Units whose processes run replaced files, by the kernel's word; and their restart.

needrestart, which knows more of interpreters, reads as root what other users' processes name: five holes in 2024
(CVE-2024-48990 to 48992, 10224, 11003). Here root reads /proc alone.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config.debs import Call
from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed

MAPPED = re.compile(r"^\S+ \S+ \S+ \S+ \d+ +(/(?:usr|lib\w*|s?bin|opt)/.*?)( \(deleted\))?$", re.MULTILINE)
UNIT = re.compile(r"^(?:0:|\d+:name=systemd):.*?/([^/\n]+\.(?:service|scope))(?:/|$)", re.MULTILINE)
MANAGER = "init.scope"  # systemd itself
# Restarted, they take sessions or their own bus along: a reboot does it.
BY_REBOOT = re.compile(r"(dbus|dbus-broker|systemd-logind)\.service")
# Ends with its session or its job.
LEFT = re.compile(
    r"session-.*\.scope|user@.*\.service|.*slurmstepd.*\.scope|llm-train@.*\.service|getty@.*|serial-getty@.*"
)
GATEWAY = "llm-gateway@"
SESSION = "sshd-session"  # ends with its connection, such as that of the run
NGINX = "nginx"  # the edge's, and that for hosts of the estate


def mapped(proc: Path = Path("/proc"), without: str = "") -> dict[str, set[tuple[str, bool]]]:
    """Files that processes have mapped, by their units, each with whether it was replaced since.

    Connections of SSH are left out, and the control group WITHOUT.
    """
    by_unit: dict[str, set[tuple[str, bool]]] = {}
    for process in proc.glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() == SESSION:
                continue
            files = MAPPED.findall((process / "maps").read_text(errors="replace"))
            cgroup = (process / "cgroup").read_text() if files else ""
        except OSError:  # it has ended
            continue
        if cgroup != without and (unit := UNIT.search(cgroup)):
            by_unit.setdefault(unit[1], set()).update((path, bool(deleted)) for path, deleted in files)
    return by_unit


def stale(proc: Path = Path("/proc")) -> dict[str, list[str]]:
    """The replaced files that processes have mapped, by their units."""
    replaced = {
        unit: sorted(path for path, deleted in files if deleted)
        for unit, files in sorted(mapped(proc).items())
    }
    return {unit: files for unit, files in replaced.items() if files}


def to_restart(units: Iterable[str]) -> list[str]:
    """In their order: gateways last, so that what they ask is there again."""
    ours = [
        unit
        for unit in units
        if unit != MANAGER and not BY_REBOOT.fullmatch(unit) and not LEFT.fullmatch(unit)
    ]
    return sorted(ours, key=lambda unit: (unit.startswith(GATEWAY), unit))


def by_reboot(units: Iterable[str]) -> list[str]:
    return sorted(unit for unit in units if BY_REBOOT.fullmatch(unit))


def replace_nginx(old: int, pid_file: Path, seconds: float) -> int:
    """Replace the nginx process `old`, with its listening sockets; returns the new process.

    A restart refuses connections until the longest answer of before has ended (nginx.org, Controlling nginx: Upgrading Executable
    on the Fly). Raises Failed where the new one does not start; the old one serves on then.
    """
    os.kill(old, signal.SIGUSR2)
    end = time.monotonic() + seconds
    while (new := _process(pid_file)) in (None, old):
        if time.monotonic() > end:
            raise Failed(
                f"no new nginx started beside process {old} within {seconds:g} s; the old one continues to serve: see its journal"
            )
        time.sleep(0.1)
    os.kill(old, signal.SIGQUIT)
    return new


def _process(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):  # between the two
        return None


def restart(units: Iterable[str], ready: Callable[[str], bool], seconds: float, call: Call) -> list[str]:
    """Restart what is stale, one unit after the other. Each gateway, by its instance, has to be `ready` before the next one.

    Returns what was restarted. Raises Failed where a unit does not start.
    """
    units = list(units)
    if MANAGER in units:
        call(["systemctl", "daemon-reexec"])
    for unit in (restarted := to_restart(units)):
        if unit.startswith(NGINX):
            names = [f"--property={name}" for name in ("MainPID", "PIDFile")]
            facts = dict(
                line.split("=", 1) for line in call(["systemctl", "show", *names, unit]).splitlines()
            )
            replace_nginx(int(facts["MainPID"]), Path(facts["PIDFile"]), seconds)
            continue
        call(["systemctl", "restart", unit])
        if unit.startswith(GATEWAY):
            end, instance = time.monotonic() + seconds, unit.removeprefix(GATEWAY).removesuffix(".service")
            while not ready(instance):
                if time.monotonic() > end:
                    raise Failed(
                        f"{unit} was restarted and not ready within {seconds:g} s: see `journalctl -u {unit}`"
                    )
                time.sleep(0.2)
    return restarted
