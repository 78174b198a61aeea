"""How far a host's driver upgrade got: on disk, so that a run after an interruption goes on, and on the audit record.

`failed` never becomes `done`: a host whose upgrade failed is `returned` to the set before, or `stuck` and out of service.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files

OPERATOR = "upgrade-drivers"  # who drains for an upgrade, to llm-gpu
# Not ended: the next run goes on.
FORWARD = ("begun", "drained", "installed", "booting", "accepted", "answered")
BACKWARD = ("failed", "stuck")  # the next run tries the way back
STATUS = re.compile(
    r"^(?P<engine>\S+): (in service|quarantined since (?P<since>\S+) by (?P<by>[^:]+): (?P<reason>.*))$"
)
RECORD_SECONDS = 5.0


class Failed(Exception):
    """A step of the upgrade; the message says why and what to do."""


@dataclass
class Progress:
    """The file upgrade.json. `step`: one of FORWARD or BACKWARD, `done`, `returned`, or empty if there never was an upgrade."""

    step: str = ""
    wanted: str = ""  # set, driver and version
    cause: str = ""  # why it failed
    previous: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> Progress:
    """What was saved; raises Failed where the file cannot be used."""
    try:
        return Progress(**json.loads(files.read(path)))
    except FileNotFoundError:
        return Progress()
    except (OSError, ValueError, TypeError) as error:
        raise Failed(
            f"{path} cannot be read ({error}): see on the host what runs, then move the file away"
        ) from error


def save(path: Path, progress: Progress) -> None:
    """Durably, for root alone."""
    files.make_directories(path.parent, 0o700)
    content = json.dumps(asdict(progress), indent=1) + "\n"
    files.write_file(path, content.encode(), os.geteuid(), os.getegid(), 0o600)


def on_record(audit: Path, step: str, progress: Progress) -> None:
    """Return once the event is on the host's audit record; raises Failed.

    The writer's protocol, and the event's names, are those of payload/llmgpu/record.py.
    """
    event = {
        "event.kind": "event",
        "event.category": ["host"],
        "event.type": ["change"],
        "event.action": f"gpu.driver_upgrade_{step}",
        "event.outcome": "failure" if step in (*BACKWARD, "returned") else "success",
        "event.reason": progress.cause[:500],
        "user.name": OPERATOR,
        "llmkeep.gpu.driver": progress.wanted,
        "llmkeep.gpu.driver_before": progress.previous.get("name", ""),
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(RECORD_SECONDS)
            connection.connect(str(audit))
            connection.sendall((json.dumps({"n": 1, "event": event}) + "\n").encode())
            answer = connection.makefile("rb").readline(4096)
    except OSError as error:
        raise Failed(
            f"{audit}: {error.strerror or error}, so {step} is not on the audit record: start llm-audit.service"
        ) from error
    if answer != b"1\n":
        raise Failed(f"{audit} answered {answer[:200]!r} to {step}")


def note(path: Path, audit: Path | None, step: str, progress: Progress, log: Callable[[str], None]) -> None:
    """Take a step: on record, where the host has one, then on disk. Only going back does not wait for the record."""
    progress.step = step
    try:
        if audit:
            on_record(audit, step, progress)
    except Failed as problem:
        if step not in (*BACKWARD, "returned"):
            raise
        log(f"not on the audit record: {problem}")
    log(f"driver upgrade to {progress.wanted}: {step} {progress.cause}".strip())
    save(path, progress)


def call(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def engines(program: Path) -> dict[str, dict[str, str]]:
    """Engines of the host with `by`, `since` and `reason`, empty in service; none without the watch. Raises Failed."""
    if not program.exists():
        return {}
    told = call([str(program), "status"])
    found = [STATUS.match(line) for line in told.stdout.splitlines()]
    if told.returncode or not all(found):
        raise Failed(f"{program} status: {(told.stderr or told.stdout).strip()[:300]}")
    return {
        each["engine"]: {name: each[name] for name in ("by", "since", "reason")} if each["by"] else {}
        for each in found
        if each
    }


def order(program: Path, verb: str, reason: str, seconds: float) -> bool:
    """Drain, or undrain, all engines, and wait until llm-gpu has done it; whether that took a change. Raises Failed."""
    drains = verb == "drain"
    before = engines(program)
    for engine in before:
        done = call([str(program), verb, engine, "--operator", OPERATOR, "--reason", reason])
        # What was never drained is in service.
        if done.returncode and (drains or "no operator has drained" not in done.stderr):
            raise Failed(done.stderr.strip() or f"{program} {verb} ended with {done.returncode}")
    end = time.monotonic() + seconds
    while True:
        now = engines(program)
        wrong = {name: held for name, held in now.items() if (held.get("by") == OPERATOR) != drains}
        if not wrong:
            break
        if time.monotonic() > end:
            raise Failed(
                f"llm-gpu.service did not {verb} {', '.join(wrong)} within {seconds:g} s: see `journalctl -u llm-gpu`"
            )
        time.sleep(0.2)
    if not drains and (sick := {name: held for name, held in now.items() if held}):
        told = "; ".join(f"{name}: by {held['by']}: {held['reason']}" for name, held in sick.items())
        raise Failed(f"engines are quarantined although the GPUs were accepted: {told}")
    return before != now


def complaints(program: Path, version: str, loaded: str | None, cuda: bool) -> str:
    """Why the GPUs are not accepted; empty if they are.

    LOADED: version of the kernel's module, None where the host has no kernel of its own.
    """
    if loaded is not None and loaded != version:
        return f"the kernel has loaded the driver {loaded or 'none'}, and not {version}"
    if not program.exists():
        return ""
    done = call([str(program), "check", "--json", *(["--cuda"] if cuda else [])])
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return f"llm-gpu check ended with {done.returncode}: {done.stderr.strip()[:300]}"
    told = [
        f"{'' if each['gpu'] is None else 'GPU ' + str(each['gpu']) + ': '}{each['text']}"
        f" (docs/operate/gpu-health.md#{each['runbook']})"
        for each in report["findings"]
        if each["drains"]
    ]
    if not told and version and report["driver"] != version:
        told = [f"NVML reports the driver {report['driver']}, and not {version}"]
    return "; ".join(told)


def accept(program: Path, version: str, loaded: str | None, cuda: bool, seconds: float) -> None:
    """Return once the GPUs are accepted; raises Failed with what is wrong after so many seconds."""
    end = time.monotonic() + seconds
    while told := complaints(program, version, loaded, cuda):
        if time.monotonic() > end:
            raise Failed(f"the GPUs are not accepted: {told}")
        time.sleep(1)
