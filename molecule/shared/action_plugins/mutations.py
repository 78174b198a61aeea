"""Break what a role's checks look at, one thing after the other, and compare which checks say so.

On the control node, so that a mutation costs one connection to break, one call of the checks, and one
connection to repair.
"""

from __future__ import annotations

import shlex
import time
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

KEPT = "/run/mutation.keep"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Arguments: `checks` (as llmkeep.estate.checks takes them), and `mutations`, each with

    fails   ids of the checks that must fail, no others may
    break   argv
    file    a path that is put back afterwards (optional)
    then    argv after breaking and after putting back: the service takes it in (optional)
    repair  argv (optional)
    on      group of the inventory; other hosts leave this mutation out (optional)
    """

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        here = variables["inventory_hostname"]
        checks = self._task.args["checks"]
        known = {check["id"] for check in checks}
        wrong: list[str] = []
        for mutation in self._task.args["mutations"]:
            if here not in variables["groups"][mutation.get("on", "all")]:
                continue
            named = sorted(mutation["fails"])
            if set(named) - known:
                raise AnsibleActionFail(f"{here} has no checks {sorted(set(named) - known)}")
            started = time.monotonic()
            self._hands(broken(mutation))
            seen = self._execute_module(
                "llmkeep.estate.checks", module_args={"checks": checks, "collect": True}, task_vars=variables
            )
            self._hands(repaired(mutation))
            if "checks" not in seen:
                raise AnsibleActionFail(f"{named}: the checks did not run: {seen.get('msg', seen)}")
            failed = {check["id"]: check["observed"] for check in seen["checks"] if not check["ok"]}
            took = f"{time.monotonic() - started:.1f} s"
            if sorted(failed) == named:
                Display().display(f"{here}: {', '.join(named)} failed, as named ({took})")
                continue
            how = shlex.join(mutation["break"])
            wrong.append(f"broken by {how}: {named} had to fail, and {failed or 'nothing'} did")
            Display().display(f"{here}: {wrong[-1]} ({took})", color="red")
        if wrong:
            result.update(failed=True, msg=f"{len(wrong)} mutations went wrong. " + " | ".join(wrong))
        return result

    def _hands(self, script: str) -> None:
        """Run a script on the host; a mutation that cannot be made or mended ends the test."""
        done = self._low_level_execute_command(f"/bin/sh -ec {shlex.quote(script)}")
        if done["rc"] != 0:
            raise AnsibleActionFail(f"{script!r} ended with {done['rc']}: {done['stdout']}{done['stderr']}")


def broken(mutation: dict[str, Any]) -> str:
    """The script that breaks it."""
    steps = [f"cp --archive {shlex.quote(mutation['file'])} {KEPT}"] if "file" in mutation else []
    steps.append(shlex.join(mutation["break"]))
    return "\n".join([*steps, *followed(mutation)])


def repaired(mutation: dict[str, Any]) -> str:
    """The script that mends it."""
    steps = [f"mv --no-target-directory {KEPT} {shlex.quote(mutation['file'])}"] if "file" in mutation else []
    if "repair" in mutation:
        steps.append(shlex.join(mutation["repair"]))
    return "\n".join([*steps, *followed(mutation)])


def followed(mutation: dict[str, Any]) -> list[str]:
    """What lets the service take it in."""
    return [shlex.join(mutation["then"])] if "then" in mutation else []
