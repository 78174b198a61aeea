"""A check: a command with its expected exit status and output, a named finding of a program, or a limit of units.

If a host's kernel cannot enforce a limit, or the program of a named finding says why its host cannot have what it asks for, the
result is neither a pass nor a failure: `ok` is false, and `not_enforceable` says why. So it is where the inventory accepts a
failure, by `accepted`. A reader of `ok` alone takes both for failures.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import limits

SHOWN = 400
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}

OPTIONS: dict[str, Any] = {
    "id": {"type": "str", "required": True},
    "title": {"type": "str", "required": True},
    "argv": {"type": "list", "elements": "str"},
    "rc": {"type": "int", "default": 0},
    "stdout": {"type": "str"},
    "match": {"type": "str"},
    "named": {"type": "str"},
    "timeout": {"type": "int", "default": 10},
    "limit": {"type": "str", "choices": list(limits.LIMITS)},
    "units": {"type": "dict"},
    "accepted": {"type": "str", "default": ""},
}
# A limit alone, with its units, or what a command proves of it.
WHOLE: dict[str, Any] = {
    "required_one_of": [("argv", "units")],
    "mutually_exclusive": [("argv", "units")],
    "required_by": {"units": ["limit"]},
}


def shortened(text: str) -> str:
    """The text, shortened to fit into a message."""
    text = text.strip()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def expected(check: dict[str, Any]) -> str:
    """The expected result in words."""
    if check["units"] is not None:
        values = [f"{unit} {value}" for unit, value in check["units"].items()]
        return f"the kernel enforces {check['limit']} of {', '.join(values)}"
    if check["named"] is not None:
        like = "" if check["match"] is None else f", and is told like /{check['match']}/"
        return f"{check['named']} holds{like}"
    words = f"exit {check['rc']}"
    if check["stdout"] is not None:
        words += f", output {check['stdout']!r}"
    if check["match"] is not None:
        words += f", output like /{check['match']}/"
    return words


def ended(check: dict[str, Any]) -> str | tuple[int, str, str]:
    """Run a check's command: exit status, output and error output, or in words why there are none."""
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
        return f"{check['argv'][0]}: {problem.strerror}"
    try:
        raw_out, raw_err = process.communicate(timeout=check["timeout"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no answer within {check['timeout']} s"
    out, err = raw_out.decode(errors="replace").strip(), raw_err.decode(errors="replace").strip()
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    return process.returncode, out, err


def judged(check: dict[str, Any], answer: str | tuple[int, str, str]) -> tuple[str, bool]:
    """The observed result, and whether it is the expected one."""
    if isinstance(answer, str):
        return answer, False
    code, out, err = answer
    if check["named"] is not None:
        words, holds = finding(check["named"], code, out, err)
        return words, holds and re.search(check["match"] or "", words) is not None
    ok = code == check["rc"]
    if check["stdout"] is not None:
        ok = ok and out == check["stdout"].strip()
    if check["match"] is not None:
        ok = ok and re.search(check["match"], f"{out}\n{err}", re.MULTILINE) is not None
    return ended_with(code, out, err), ok


def ended_with(code: int, out: str, err: str) -> str:
    return f"exit {code}, output {shortened(out)!r}" + (f", error output {shortened(err)!r}" if err else "")


def lacking(check: dict[str, Any], answer: str | tuple[int, str, str]) -> dict[str, str]:
    """`not_enforceable`, where a program gives a reason why this host cannot have what its finding asks for."""
    try:
        return {"not_enforceable": str(json.loads(answer[1])["checks"][check["named"]]["not_enforceable"])}
    except (ValueError, KeyError, TypeError, IndexError):
        return {}


def finding(name: str, code: int, out: str, err: str) -> tuple[str, bool]:
    """One of the findings in a program's JSON, which is evidence and never shortened."""
    try:
        outcome = json.loads(out)["checks"][name]
        return str(outcome["observed"]), outcome["ok"] is True
    except (ValueError, KeyError, TypeError):
        return f"there is no result for {name}: {ended_with(code, out, err)}", False


def limited(check: dict[str, Any]) -> dict[str, Any] | None:
    """The result for a limit of units, or for a command that this kernel cannot pass; None if the command has to be run."""
    if check["units"] is not None:
        units = {unit: str(limit) for unit, limit in check["units"].items()}
        observed, ok, reason = limits.judged(check["limit"], units)
    else:
        try:
            reason = limits.lacking(check["limit"])
        except OSError as problem:
            return result(check, str(problem), ok=False)
        if not reason:
            return None
        observed, ok = f"{check['limit']} is not enforced", False
    return result(check, observed, ok) | ({"not_enforceable": reason} if reason and not ok else {})


def result(check: dict[str, Any], observed: str, ok: bool) -> dict[str, Any]:
    """A check's result as the role and the report show it."""
    names = {"id": check["id"], "title": check["title"]}
    accepted = {"accepted": check["accepted"]} if check["accepted"] and not ok else {}
    return {**names, "expected": expected(check), "observed": observed, "ok": ok, **accepted}


def has_failed(outcome: dict[str, Any]) -> bool:
    """Whether a result counts as a failure; what a host cannot enforce and what the inventory accepts are reported separately."""
    return not (outcome["ok"] or "not_enforceable" in outcome or "accepted" in outcome)


def run(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run checks, given as in OPTIONS; returns their results as roles and reports show them.

    Named findings of one program come from a single run of it.
    """
    answers: dict[tuple[str, ...], str | tuple[int, str, str]] = {}
    results = []
    for check in checks:
        if check["limit"] is not None and (seen_limit := limited(check)):
            results.append(seen_limit)
            continue
        argv = tuple(check["argv"])
        answer = answers[argv] if check["named"] is not None and argv in answers else ended(check)
        if check["named"] is not None:
            answers[argv] = answer
        observed, ok = judged(check, answer)
        results.append(result(check, observed, ok) | ({} if ok else lacking(check, answer)))
    return results
