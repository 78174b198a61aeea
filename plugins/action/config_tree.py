"""Control-node half of config_tree: renders the templates, so that one call carries the whole tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader


class ActionModule(ActionBase):  # type: ignore[misc]
    """Renders `template` of each file that is to be present; a secret content goes in an argument that is never logged.

    An item of a list of entries may be such a list itself, as expressions make them.
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        for name in ("directories", "links"):
            if name in arguments:
                arguments[name] = flat(arguments[name])
        files: list[dict[str, Any]] = []
        secret_contents: dict[str, str] = {}
        for file in flat(arguments.get("files")):
            entry = dict(file)
            known = entry.pop("vars", None) or {}
            if entry.get("state", "present") == "absent":
                files.append({"dest": entry["dest"], "state": "absent"})
                continue
            if ("template" in entry) == ("content" in entry):
                raise AnsibleActionFail(
                    f"{entry.get('dest')} needs either template or content; it has {sorted(entry)}"
                )
            if "template" in entry:
                entry["content"] = self._render(entry["template"], task_vars or {}, known)
            if entry.get("secret"):
                secret_contents[entry["dest"]] = entry.pop("content")
            files.append(entry)
        arguments.update(files=files, secret_contents=secret_contents)
        result.update(
            self._execute_module(
                "llmkeep.estate.config_tree", module_args=arguments, task_vars=task_vars or {}
            )
        )
        result.pop("invocation", None)  # whole files, twice: the differences say it better
        return result

    def _render(self, template: str, task_vars: dict[str, Any], known: dict[str, Any]) -> str:
        lookup = lookup_loader.get("ansible.builtin.template", loader=self._loader, templar=self._templar)
        variables = {**task_vars, "ansible_search_path": self._task.get_search_path()}
        (text,) = lookup.run([template], variables=variables, template_vars=known)
        return "" if text is None else str(text)  # Ansible gives None for a template that yields nothing


def flat(entries: Iterable[Any] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in entries or []:
        rows += flat(entry) if isinstance(entry, list) else [entry]
    return rows
