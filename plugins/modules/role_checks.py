#!/usr/bin/python
"""State module that only reads: the named checks of a role, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: role_checks
short_description: Run a role's named checks and report expected and observed results
description:
  - A check is one command, or a limit of units (C(units)).
  - A command passes when its exit status and, where given, its output are as expected.
  - Several checks may be findings of one program, which is then run once. It prints a JSON object whose C(checks)
    has C(ok) and C(observed) for each name.
  - A limit is read from the kernel rather than from systemd, which reports a limit even where nothing enforces it. It is
    C(memory.max) of the cgroup of the unit's process, or the programs attached to it. Where the kernel cannot enforce
    the limit, the result is C(not_enforceable), which neither passes nor fails.
  - A command that is missing, is killed by a signal or runs into its time limit has failed.
  - Changes nothing and runs in check mode.
author: [llmkeep contributors (@llmkeep)]
options:
  checks:
    description: The checks, run one after the other.
    type: list
    elements: dict
    required: true
    suboptions:
      id: {description: "Name of the check, as C(role.name).", type: str, required: true}
      title: {description: "The condition that the check verifies, in one line.", type: str, required: true}
      argv: {description: Program and arguments., type: list, elements: str}
      rc: {description: Expected exit status., type: int, default: 0}
      stdout: {description: Expected output without its surrounding white space., type: str}
      match: {description: Multi-line regular expression that output or error output must match., type: str}
      named: {description: "Name of the finding in the program's output; exit status and output are then its own.", type: str}
      timeout: {description: Limit in seconds., type: int, default: 10}
      accepted: {description: "Why the check need not hold, where the inventory accepts that.", type: str, default: ""}
      limit:
        description: Limit that the kernel must enforce, on C(units), or as a precondition of C(argv).
        type: str
        choices: [MemoryMax, IPAddressDeny]
      units:
        description: Units, each with its C(MemoryMax) in bytes or C(infinity); with C(any) where addresses are denied.
        type: dict
  collect:
    description: Return the results without failing, for playbooks that collect the results of all roles first.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Verify
  llmkeep.estate.role_checks:
    checks:
      - id: redis.answers
        title: Redis refuses a client without a password
        argv: [redis-cli, -s, /run/redis/redis.sock, ping]
        match: NOAUTH
      - id: redis.memory_is_bounded
        title: Redis's memory is bounded
        limit: MemoryMax
        units: {redis-server.service: 167772160}
"""

RETURN = r"""
checks:
  description: One entry per check.
  returned: always
  type: list
  elements: dict
  contains:
    id: {description: Its name., type: str}
    title: {description: The condition that it verifies., type: str}
    expected: {description: Expected result., type: str}
    observed: {description: Observed result., type: str}
    ok: {description: Whether the check passed., type: bool}
    not_enforceable: {description: Why this host's kernel cannot enforce it; absent where it can., type: str}
    accepted: {description: Why it does not hold and need not; absent where it holds., type: str}
"""

import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config.checks import (
    OPTIONS,
    WHOLE,
    has_failed,
    run,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "checks": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": OPTIONS,
                **WHOLE,
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
                msg=f"{check['id']}: match is not a regular expression ({problem}): {check['match']}"
            )
    results = run(module.params["checks"])
    for result in results:
        if "not_enforceable" in result:
            module.warn(f"{result['id']} is not enforceable on this host: {result['not_enforceable']}")
        if "accepted" in result:
            module.warn(f"{result['id']} does not hold, which is accepted: {result['accepted']}")
    failed = [result for result in results if has_failed(result)]
    if failed and not module.params["collect"]:
        lines = [
            f"{result['id']} ({result['title']}): expected {result['expected']}; observed {result['observed']}"
            for result in failed
        ]
        module.fail_json(
            msg=f"{len(failed)} of {len(results)} checks failed. "
            + " | ".join(lines)
            + ". Run site.yml to bring the host to its declared state; remaining failures are listed here.",
            checks=results,
        )
    module.exit_json(changed=False, checks=results)


if __name__ == "__main__":
    main()
