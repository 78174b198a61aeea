#!/usr/bin/python
"""Break what a role's checks look at, one thing after the other, and compare which checks say so.

All of it is one call on the host: a mutation costs its commands and the checks, and no connection. Mutations of one `round` are
broken at once and share the checks: each has checks of its own to fail, and together exactly those have to.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import limits
from ansible_collections.llmkeep.estate.plugins.module_utils.config.checks import (
    OPTIONS,
    WHOLE,
    has_failed,
    run,
)

KEPT = "/run/mutation.keep"
MUTATION: dict[str, Any] = {
    "fails": {"type": "list", "elements": "str", "required": True},  # ids that must fail, no others may
    "break": {"type": "list", "elements": "str", "required": True},  # argv
    "file": {"type": "str"},  # a path that is put back afterwards
    "then": {"type": "list", "elements": "str"},  # argv, after breaking and after mending: it is taken in
    "repair": {"type": "list", "elements": "str"},  # argv
    "needs": {
        "type": "str",
        "choices": list(limits.LIMITS),
    },  # left out, and said, where the kernel cannot enforce it
    "round": {"type": "str"},  # name of a round, whose mutations are broken at once; alone without it
    "on": {"type": "str"},  # group of the inventory; the playbook leaves it out on other hosts
}


class MutationError(Exception):
    """A mutation that could not be made or mended, or that names a check which is not there."""


def broken(mutations: Sequence[dict[str, Any]]) -> str:
    """The script that breaks them."""
    steps = []
    for number, mutation in enumerate(mutations):
        if mutation.get("file"):
            steps.append(f"cp --archive {shlex.quote(mutation['file'])} {KEPT}.{number}")
        steps.append(shlex.join(mutation["break"]))
    return "\n".join([*steps, *followed(mutations)])


def repaired(mutations: Sequence[dict[str, Any]]) -> str:
    """The script that mends them, the last one first."""
    steps = []
    for number, mutation in reversed([*enumerate(mutations)]):
        if mutation.get("file"):
            steps.append(f"mv --no-target-directory {KEPT}.{number} {shlex.quote(mutation['file'])}")
        if mutation.get("repair"):
            steps.append(shlex.join(mutation["repair"]))
    return "\n".join([*steps, *followed(mutations)])


def followed(mutations: Sequence[dict[str, Any]]) -> list[str]:
    """What lets the services take it in, each command once."""
    return [*dict.fromkeys(shlex.join(each["then"]) for each in mutations if each.get("then"))]


def rounds(mutations: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Which mutations are broken at once. MutationError where two of a round name one check."""
    found: dict[object, list[dict[str, Any]]] = {}
    for number, mutation in enumerate(mutations):
        found.setdefault(mutation.get("round") or number, []).append(mutation)
    for name, together in found.items():
        named = [check for mutation in together for check in mutation["fails"]]
        if twice := sorted({check for check in named if named.count(check) > 1}):
            raise MutationError(f"round {name} breaks {twice} twice: put one of the two into another round")
    return [*found.values()]


def hands(script: str) -> None:
    """Run a script; one that fails ends the test."""
    done = subprocess.run(
        ["/bin/sh", "-ec", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MutationError(f"{script!r} ended with {done.returncode}: {done.stdout}{done.stderr}")


def outcome(
    mutations: Sequence[dict[str, Any]], checks: list[dict[str, Any]], slow: Sequence[str] = ()
) -> dict[str, Any]:
    """Break, check, mend: which checks had to fail, and which did with what they saw.

    SLOW: checks that are run only after mutations that name them.
    """
    begun = time.monotonic()
    named = sorted(name for mutation in mutations for name in mutation["fails"])
    hands(broken(mutations))
    seen = run([check for check in checks if check["id"] not in slow or check["id"] in named])
    hands(repaired(mutations))
    failed = {result["id"]: result["observed"] for result in seen if has_failed(result)}
    return {
        "named": named,
        "failed": failed,
        "by": "; ".join(shlex.join(mutation["break"]) for mutation in mutations),
        "seconds": round(time.monotonic() - begun, 1),
    }


def left_out(mutation: dict[str, Any]) -> str:
    """Why this host cannot show what the mutation breaks; nothing where it can."""
    return limits.lacking(mutation["needs"]) if mutation.get("needs") else ""


def require_known(mutations: list[dict[str, Any]], checks: list[dict[str, Any]]) -> None:
    """MutationError where a mutation names a check that the role does not have."""
    gone = {name for mutation in mutations for name in mutation["fails"]} - {check["id"] for check in checks}
    if gone:
        raise MutationError(f"the role has no checks {sorted(gone)}: name them as its verify.yml does")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "checks": {"type": "list", "elements": "dict", "required": True, "options": OPTIONS, **WHOLE},
            "mutations": {"type": "list", "elements": "dict", "required": True, "options": MUTATION},
            "slow": {"type": "list", "elements": "str", "default": []},
        }
    )
    try:
        require_known(module.params["mutations"], module.params["checks"])
        reasons = {index: left_out(mutation) for index, mutation in enumerate(module.params["mutations"])}
        seen = [
            outcome(together, module.params["checks"], module.params["slow"])
            for together in rounds(
                [each for index, each in enumerate(module.params["mutations"]) if not reasons[index]]
            )
        ]
    except MutationError as problem:
        module.fail_json(msg=str(problem))
    wrong = [
        f"broken by {each['by']}: {each['named']} had to fail, and {each['failed'] or 'nothing'} did"
        for each in seen
        if sorted(each["failed"]) != each["named"]
    ]
    if wrong:
        module.fail_json(msg=f"{len(wrong)} of {len(seen)} mutations went wrong. " + " | ".join(wrong))
    skipped = [
        f"SKIPPED, {reason}: {', '.join(module.params['mutations'][index]['fails'])}"
        for index, reason in reasons.items()
        if reason
    ]
    took = [f"{each['seconds']} s: {', '.join(each['named'])}" for each in seen]
    module.exit_json(changed=False, took=took + skipped)


if __name__ == "__main__":
    main()
