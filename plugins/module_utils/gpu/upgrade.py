"""What a host's driver upgrade asks of `llm-gpu`: which engines serve, to drain them, whether the GPUs are accepted."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed, Kind, Progress

OPERATOR = "upgrade-drivers"  # who drains for an upgrade, to llm-gpu
STATUS = re.compile(
    r"^(?P<engine>\S+): (in service|quarantined since (?P<since>\S+) by (?P<by>[^:]+): (?P<reason>.*))$"
)


def fields(progress: Progress) -> dict[str, str]:
    """What the record's events name besides the step."""
    return {
        "llmkeep.gpu.driver": progress.wanted,
        "llmkeep.gpu.driver_before": progress.previous.get("name", ""),
    }


KIND = Kind("driver upgrade", "gpu.driver_upgrade", OPERATOR, fields)


def call(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def engines(program: Path) -> dict[str, dict[str, str]]:
    """Engines of the host with `by`, `since` and `reason`, empty in service; none without the watch. Raises Failed."""
    if not program.exists():
        return {}
    answer = call([str(program), "status"])
    matches = [STATUS.match(line) for line in answer.stdout.splitlines()]
    if answer.returncode or not all(matches):
        raise Failed(f"{program} status: {(answer.stderr or answer.stdout).strip()[:300]}")
    return {
        each["engine"]: {name: each[name] for name in ("by", "since", "reason")} if each["by"] else {}
        for each in matches
        if each
    }


def order(program: Path, verb: str, reason: str, seconds: float, operator: str = OPERATOR) -> bool:
    """Drain, or undrain, all engines, and wait until llm-gpu has done it; whether that took a change. Raises Failed."""
    drains = verb == "drain"
    before = engines(program)
    for engine in before:
        done = call([str(program), verb, engine, "--operator", operator, "--reason", reason])
        # What was never drained is in service.
        if done.returncode and (drains or "no operator has drained" not in done.stderr):
            raise Failed(done.stderr.strip() or f"{program} {verb} ended with {done.returncode}")
    end = time.monotonic() + seconds
    while True:
        now = engines(program)
        wrong = {name: held for name, held in now.items() if (held.get("by") == operator) != drains}
        if not wrong:
            break
        if time.monotonic() > end:
            raise Failed(
                f"llm-gpu.service did not {verb} {', '.join(wrong)} within {seconds:g} s: see `journalctl -u llm-gpu`"
            )
        time.sleep(0.2)
    if not drains and (sick := {name: held for name, held in now.items() if held}):
        holders = "; ".join(f"{name}: by {held['by']}: {held['reason']}" for name, held in sick.items())
        raise Failed(f"engines are quarantined although the GPUs were accepted: {holders}")
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
    problems = [
        f"{'' if each['gpu'] is None else 'GPU ' + str(each['gpu']) + ': '}{each['text']}"
        f" (docs/operate/gpu-health.md#{each['runbook']})"
        for each in report["findings"]
        if each["drains"]
    ]
    if not problems and version and report["driver"] != version:
        problems = [f"NVML reports the driver {report['driver']}, and not {version}"]
    return "; ".join(problems)


def accept(program: Path, version: str, loaded: str | None, cuda: bool, seconds: float) -> None:
    """Return once the GPUs are accepted; raises Failed with what is wrong after so many seconds."""
    end = time.monotonic() + seconds
    while reasons := complaints(program, version, loaded, cuda):
        if time.monotonic() > end:
            raise Failed(f"the GPUs are not accepted: {reasons}")
        time.sleep(1)
