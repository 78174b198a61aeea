"""systemd's units: their properties, and one systemctl verb at a time, with the reason if it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

START_SECONDS = (
    4 * 3600
)  # beyond the units' own limits, which decide: half a terabyte of weights takes most of an hour to load


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", *words], capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"systemctl {' '.join(words)} did not end within {START_SECONDS} s") from None


def states(units: list[str]) -> dict[str, dict[str, str]]:
    """LoadState, ActiveState, UnitFileState, NeedDaemonReload and MainPID of each unit."""
    return shown(units, ["LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload", "MainPID"])


def shown(units: list[str], properties: list[str]) -> dict[str, dict[str, str]]:
    """The given properties of each unit."""
    if not units:
        return {}
    answer = systemctl("show", f"--property=Id,{','.join(properties)}", "--", *units)
    blocks = answer.stdout.strip().split("\n\n")
    if answer.returncode != 0 or len(blocks) != len(units):
        raise Refused(f"systemctl show ended with {answer.returncode}: {answer.stderr.strip()}")
    return {
        unit: dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for unit, block in zip(units, blocks, strict=True)
    }


def reread(units: list[str], check: bool) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Reload systemd if a unit file of these changed; returns their states, and the units whose file had changed."""
    now = states(units)
    changed = {unit for unit, state in now.items() if state.get("NeedDaemonReload") == "yes"}
    if changed or any(state["LoadState"] == "not-found" for state in now.values()):
        if not check:
            systemctl("daemon-reload")
        now = states(units)
    return now, changed


def there(unit: str, state: dict[str, str], check: bool) -> bool:
    """Whether the unit can be started; in check mode it may not exist yet. Refused if it cannot."""
    if state["LoadState"] == "loaded":
        return True
    if check and state["LoadState"] == "not-found":
        return False
    raise Refused(f"{unit} is {state['LoadState']} on this host; install its package or unit file first")


def others(pattern: str, declarations: list[str]) -> list[str]:
    """Units that match the pattern, run or are enabled, and are not wanted."""
    listed = systemctl("list-units", "--all", "--plain", "--no-legend", "--full", "--", pattern).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.split()}
    listed = systemctl("list-unit-files", "--plain", "--no-legend", "--full", "--", pattern).stdout
    names |= {line.split()[0] for line in listed.splitlines() if line.split()}
    enabled = Path("/etc/systemd/system").glob(f"*.wants/{pattern}")
    names |= {path.name for path in enabled}
    return sorted(name for name in names if name not in declarations and "@." not in name)


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
