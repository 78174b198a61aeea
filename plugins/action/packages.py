"""Debian packages as all roles install them; what an interrupted installation left behind is completed first."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

SCRIPT = Path(__file__).resolve().parents[2] / "roles/_common/files/complete-dpkg.sh"
SETTINGS = {"install_recommends": False, "policy_rc_d": 101, "lock_timeout": 300}
# A fact, so that each host is looked at once a run.
WHOLE = "llmkeep_dpkg_is_whole"
# What the shell ends with where apt has something to do. Python and its bindings of apt take 0.4 s to find out that it has not.
MISSING = 10
SOURCE = "/etc/apt/sources.list.d/llmkeep.sources"  # role base writes it
NO_SOURCE = 11  # in check mode, of a host that does not have it yet
UPDATE = "apt-get update --quiet=2 --error-on=any > /dev/null 2>&1"


class ActionModule(ActionBase):  # type: ignore[misc]
    """ansible.builtin.apt with the estate's settings, on a host whose dpkg has nothing half done."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        completed: list[str] = []
        commands: list[str] = []
        if WHOLE not in (variables.get("ansible_facts") or {}):
            commands.append("half_done" if self._task.check_mode else "complete || exit 1")
        names = shlex.join(self._task.args["name"])
        if self._task.check_mode and self._task.args.get("state", "present") == "present":
            commands.append(f"test -e {SOURCE} || all_there {names} || exit {NO_SOURCE}")
        may_be_there = set(self._task.args) <= {"name", "update_cache"}
        if may_be_there:
            if self._task.args.get("update_cache") and not self._task.check_mode:
                commands.append(f"{UPDATE} || exit {MISSING}")
            commands.append(f"all_there {names} || exit {MISSING}")
        there = False
        if commands:
            script = "\n".join([SCRIPT.read_text(), *commands])
            answer = self._low_level_execute_command(script, executable="/bin/sh")
            completed = answer["stdout"].strip().splitlines()
            if answer["rc"] not in (0, MISSING, NO_SOURCE):
                reason = "; ".join([*completed, answer["stderr"].strip()])
                result.update(
                    failed=True,
                    msg=f"An installation was interrupted and could not be completed: {reason}. Fix that on the host (dpkg "
                    "--audit lists what is half done, apt-get install --fix-broken repairs it) and run it again.",
                )
                return result
            if completed and self._task.check_mode:
                # apt refuses to say more before that is done.
                result.update(changed=True, completed=completed)
                return result
            result["ansible_facts"] = {WHOLE: True}
            if answer["rc"] == NO_SOURCE:
                # Asked now, apt would say that Debian's own mirror, or no source, has them.
                preview = f"packages, and what they depend on, from the estate's mirror: {names}\n"
                result.update(changed=True, completed=completed, diff={"prepared": preview})
                return result
            there = may_be_there and answer["rc"] == 0
        if not there:
            arguments = SETTINGS | self._task.args
            if self._task.check_mode:
                del arguments["policy_rc_d"]  # which apt would write, and take away again
            result.update(
                self._execute_module("ansible.builtin.apt", module_args=arguments, task_vars=variables)
            )
        result.update(changed=bool(result.get("changed")) or bool(completed), completed=completed)
        return result
