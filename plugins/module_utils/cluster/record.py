"""What was applied to a cluster, kept on the control node: it is what a failed roll-out goes back to, and what may be removed.

It is not kept in the cluster, where those who may write to a namespace could have this host apply what they wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import Manifest
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files, formats
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused


@dataclass(frozen=True)
class Record:
    """A cluster's folder. `applied.json` was healthy; `attempt.json` is there until a run that applies has ended."""

    folder: Path

    def applied(self) -> list[Manifest]:
        """The objects that were healthy last; none before the first time."""
        return self._objects("applied.json")

    def owned(self) -> list[Manifest]:
        """Objects that runs applied, those of a run that was cut short included."""
        return self._objects("applied.json") + self._objects("attempt.json")

    def begin(self, manifests: Sequence[Manifest]) -> None:
        """Note what a run is about to apply, and what it has still to remove."""
        self._write("attempt.json", manifests)

    def end(self) -> None:
        """Note that what the run applied was taken back, or is healthy."""
        with contextlib.suppress(FileNotFoundError):
            files.remove(self.folder / "attempt.json")

    def healthy(self, manifests: Sequence[Manifest]) -> None:
        """Note what is applied and healthy."""
        if self.applied() != list(manifests):
            self._write("applied.json", manifests)
        self.end()

    def _objects(self, name: str) -> list[Manifest]:
        try:
            objects: list[Manifest] = json.loads(files.read(self.folder / name))
        except FileNotFoundError:
            return []
        formats.require(self.folder / name, objects, Refused)
        return objects

    def _write(self, name: str, manifests: Sequence[Manifest]) -> None:
        files.make_directories(self.folder, 0o700)
        content = json.dumps(list(manifests), indent=1, sort_keys=True).encode()
        files.write_file(self.folder / name, content, os.geteuid(), os.getegid(), 0o600)
