"""A check: one command, and what it has to end and print with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import Any

SHOWN = 400
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}

OPTIONS: dict[str, Any] = {
    "id": {"type": "str", "required": True},
    "argv": {"type": "list", "elements": "str", "required": True},
    "rc": {"type": "int", "default": 0},
    "stdout": {"type": "str"},
    "match": {"type": "str"},
    "timeout": {"type": "int", "default": 10},
}


def shortened(text: str) -> str:
    """What a message has room for."""
    text = text.strip()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def expected(check: dict[str, Any]) -> str:
    """What has to be, in words."""
    words = f"exit {check['rc']}"
    if check["stdout"] is not None:
        words += f", output {check['stdout']!r}"
    if check["match"] is not None:
        words += f", output like /{check['match']}/"
    return words


def probe(check: dict[str, Any]) -> tuple[str, bool]:
    """Run one check: what was seen, and whether it is what was expected."""
    try:
        process = subprocess.Popen(
            check["argv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as problem:
        return f"{check['argv'][0]}: {problem.strerror}", False
    try:
        raw_out, raw_err = process.communicate(timeout=check["timeout"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no answer within {check['timeout']} s", False
    out, err = raw_out.decode(errors="replace").strip(), raw_err.decode(errors="replace").strip()
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}", False
    ok = process.returncode == check["rc"]
    if check["stdout"] is not None:
        ok = ok and out == check["stdout"].strip()
    if check["match"] is not None:
        ok = ok and re.search(check["match"], f"{out}\n{err}", re.MULTILINE) is not None
    observed = f"exit {process.returncode}, output {shortened(out)!r}"
    return observed + (f", error output {shortened(err)!r}" if err else ""), ok


def run(check: dict[str, Any]) -> dict[str, Any]:
    """Run one check, given as OPTIONS has it: its result as role and report show it."""
    observed, ok = probe(check)
    return {"id": check["id"], "expected": expected(check), "observed": observed, "ok": ok}
