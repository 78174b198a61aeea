"""Debian packages as all roles install them; what an interrupted installation left behind is completed first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

SCRIPT = Path(__file__).resolve().parents[2] / "roles/_common/files/complete-dpkg.sh"
SETTINGS = {"install_recommends": False, "policy_rc_d": 101, "lock_timeout": 300}
# A fact, so that each host is looked at once a run.
WHOLE = "llmkeep_dpkg_is_whole"


class ActionModule(ActionBase):  # type: ignore[misc]
    """ansible.builtin.apt with the estate's settings, on a host whose dpkg has nothing half done."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        completed: list[str] = []
        if WHOLE not in (variables.get("ansible_facts") or {}):
            ask = "half_done" if self._task.check_mode else "complete"
            answer = self._low_level_execute_command(f"{SCRIPT.read_text()}\n{ask}", executable="/bin/sh")
            completed = answer["stdout"].strip().splitlines()
            if answer["rc"] != 0:
                seen = "; ".join([*completed, answer["stderr"].strip()])
                result.update(
                    failed=True,
                    msg=f"An installation was interrupted and could not be completed: {seen}. Put that right on the host "
                    "(dpkg --audit says what is half done, apt-get install --fix-broken mends it) and run it again.",
                )
                return result
            if completed and self._task.check_mode:
                # apt refuses to say more before that is done.
                result.update(changed=True, completed=completed)
                return result
            result["ansible_facts"] = {WHOLE: True}
        arguments = SETTINGS | self._task.args
        installed = self._execute_module("ansible.builtin.apt", module_args=arguments, task_vars=variables)
        result.update(installed, completed=completed)
        result["changed"] = bool(installed.get("changed")) or bool(completed)
        return result
