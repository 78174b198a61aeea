"""An Ansible callback that keeps what the last run of converge.yml changed, or would have: by host, a line each, handlers too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    """Writes the file `changes` of molecule's folder of the scenario, anew with each play `Converge`."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "changes"

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Begin anew, or leave the play alone."""
        self.converging = play.get_name() == "Converge"
        if self.converging:
            self.changes: dict[str, list[str]] = {}
            self.write()

    def v2_runner_on_ok(self, result: Any) -> None:
        """Each change that the module names, else the name of the task."""
        if self.converging and result.is_changed():
            turns = result.result["results"] if result.task.loop else [result.result]
            changes = [line for each in turns for line in each.get("changes", [])] or [result.task.name]
            self.changes.setdefault(result.host.get_name(), []).extend(changes)
            self.write()

    def write(self) -> None:
        """Write what there is so far, since the play that reads it comes before the end of the playbook."""
        path = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "changes"
        path.write_text(json.dumps(self.changes), encoding="utf-8")
