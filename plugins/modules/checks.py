#!/usr/bin/python
"""State module that only reads: the named checks of a role, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: checks
short_description: Run a role's named checks and say for each what was expected and what was seen
description:
  - Each check is one command. It passes when its exit status and, where given, its output are as expected.
  - A command that is missing, is killed by a signal or runs into its time limit has failed.
  - Changes nothing and runs in check mode.
author: [llmkeep contributors]
options:
  checks:
    description: The checks, run one after the other.
    type: list
    elements: dict
    required: true
    suboptions:
      id: {description: Name as C(role.what_it_is)., type: str, required: true}
      argv: {description: Program and arguments., type: list, elements: str, required: true}
      rc: {description: Expected exit status., type: int, default: 0}
      stdout: {description: Expected output without its surrounding white space., type: str}
      match: {description: Multi-line regular expression that output or error output must match., type: str}
      timeout: {description: Limit in seconds., type: int, default: 10}
  collect:
    description: Return the results without failing, for playbooks that gather them all first.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Verify
  llmkeep.estate.checks:
    checks:
      - {id: redis.answers, argv: [redis-cli, -s, /run/redis/redis.sock, ping], match: NOAUTH}
"""

RETURN = r"""
checks:
  description: One entry a check.
  returned: always
  type: list
  elements: dict
  contains:
    id: {description: Its name., type: str}
    expected: {description: What had to be., type: str}
    observed: {description: What was., type: str}
    ok: {description: Whether they agree., type: bool}
"""

import os
import re
import signal
import subprocess
from typing import Any

from ansible.module_utils.basic import AnsibleModule

SHOWN = 400
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}


def shortened(text: str) -> str:
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
    observed, ok = probe(check)
    return {"id": check["id"], "expected": expected(check), "observed": observed, "ok": ok}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "checks": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "id": {"type": "str", "required": True},
                    "argv": {"type": "list", "elements": "str", "required": True},
                    "rc": {"type": "int", "default": 0},
                    "stdout": {"type": "str"},
                    "match": {"type": "str"},
                    "timeout": {"type": "int", "default": 10},
                },
            },
            "collect": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    names = [check["id"] for check in module.params["checks"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        module.fail_json(msg=f"checks named twice: {', '.join(twice)}; give each its own id")
    for check in module.params["checks"]:
        try:
            re.compile(check["match"] or "")
        except re.error as problem:
            module.fail_json(
                msg=f"{check['id']}: match is no regular expression ({problem}): {check['match']}"
            )
    results = [run(check) for check in module.params["checks"]]
    failed = [result for result in results if not result["ok"]]
    if failed and not module.params["collect"]:
        lines = [
            f"{result['id']}: expected {result['expected']}; observed {result['observed']}"
            for result in failed
        ]
        module.fail_json(
            msg=f"{len(failed)} of {len(results)} checks failed. "
            + " | ".join(lines)
            + ". Run site.yml to bring the host to its declared state; what fails again is named here.",
            checks=results,
        )
    module.exit_json(changed=False, checks=results)


if __name__ == "__main__":
    main()
