"""Which experiments may give a candidate on this host: those that are watched, and were not halted.

`llm-serve experiment guard` writes, in the folder `guard` of the journal's: `watched.json`, the experiments of the signed policy
that it judges, anew at each look; and `halted-ID.json` for each one that it ended. Gateways only read. So whatever is in a file
there, a user gets the control at worst; and a halt ends by another salt, in a signed policy, alone.
"""

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path

from llmserve.access.experiments import Away, Experiment
from llmserve.metrics import Metrics

GUARD, WATCHED = "guard", "watched.json"
LOOK_SECONDS = 1.0  # of gateways
GUARD_SECONDS = 20.0  # of the guard
STALE_SECONDS = 6 * GUARD_SECONDS  # a guard that has not looked for so long is none


def halted(folder: Path) -> set[str]:
    """Ids of experiments that were halted on this host; `folder`: the journal's."""
    return {path.stem.removeprefix("halted-") for path in (folder / GUARD).glob("halted-*.json")}


class Halts:
    """What a gateway knows of the guard on its host. Without a folder nothing is guarded, and all may go on."""

    def __init__(self, folder: Path | None, metrics: Metrics) -> None:
        """`folder`: the journal's."""
        self.folder = folder
        self.metrics = metrics
        self.watched: dict[str, str] = {}  # ids and names
        self.halted: set[str] = set()

    def reason(self, experiment: Experiment) -> Away:
        """Why the candidate must not answer; "" if it may."""
        if self.folder is None:
            return ""
        if experiment.id in self.halted:
            return "halted"
        return "" if experiment.id in self.watched else "unwatched"

    def look(self) -> None:
        """Read the guard's files."""
        if self.folder is None:
            return
        path = self.folder / GUARD / WATCHED
        watched: dict[str, str] = {}
        with suppress(OSError, ValueError, AttributeError):
            if abs(time.time() - path.stat().st_mtime) < STALE_SECONDS:
                watched = {str(each): str(name) for each, name in json.loads(path.read_bytes()).items()}
        # What was halted stays so in this process, also where its file was lost.
        self.halted |= halted(self.folder)
        for name in {*self.watched.values()} - {*watched.values()}:
            self.metrics.experiment_halted.remove(name)
        self.watched = watched
        for identifier, name in watched.items():
            self.metrics.experiment_halted.labels(name).set(identifier in self.halted)

    async def watch(self) -> None:
        """Look each second; runs until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)
