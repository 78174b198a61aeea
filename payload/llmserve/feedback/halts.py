"""Which experiments may use their candidate on this host: those that are watched and have not been halted.

`llm-serve experiment guard` writes, in the folder `guard` of the journal's: `watched.json`, the experiments of the signed policy
that it judges, rewritten at each check; and `halted-ID.json` for each one that it halted. Gateways only read them. So whatever a
file contains, the worst case is that a user gets the control; and only another salt, in a signed policy, ends a halt.
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
ASKED_SECONDS = 120.0  # so long an experiment counts as one of the policy that a request has met: less than the alert waits
STALE_SECONDS = 6 * GUARD_SECONDS  # a guard that has not looked for so long is none


def halted(folder: Path) -> set[str]:
    """Ids of experiments that were halted on this host; `folder`: the journal's."""
    return {path.stem.removeprefix("halted-") for path in (folder / GUARD).glob("halted-*.json")}


class Halts:
    """A gateway's view of the guard on its host. Without a folder nothing is guarded, and all experiments may run."""

    def __init__(self, folder: Path | None, metrics: Metrics) -> None:
        """`folder`: the journal's."""
        self.folder = folder
        self.metrics = metrics
        self.watched: dict[str, str] = {}  # ids and names
        self.halted: set[str] = set()
        self.names: dict[str, str] = {}  # by id, of experiments that were watched or asked for
        self.request_times: dict[
            str, float
        ] = {}  # by id: time.monotonic() when its candidate last gave way here
        self.series: list[set[str]] = [set(), set()]  # names that have a series

    def reason(self, experiment: Experiment) -> Away:
        """Why the candidate must not answer; "" if it may."""
        if self.folder is None:
            return ""
        if experiment.id not in self.halted and experiment.id in self.watched:
            return ""
        self.names[experiment.id] = experiment.name
        self.request_times[experiment.id] = time.monotonic()
        return "halted" if experiment.id in self.halted else "unwatched"

    def look(self) -> None:
        """Read the guard's files."""
        if self.folder is None:
            return
        path = self.folder / GUARD / WATCHED
        watched: dict[str, str] = {}
        fresh = False
        with suppress(Exception):  # whatever is in the file: the control answers, and this process goes on
            if abs(time.time() - path.stat().st_mtime) < STALE_SECONDS:
                watched = {str(each): str(name) for each, name in json.loads(path.read_bytes()).items()}
                fresh = True
        # What was halted stays so in this process, also where its file was lost.
        self.halted |= halted(self.folder)
        self.watched = watched
        self.names |= watched
        self.tell(fresh)

    def tell(self, fresh: bool) -> None:
        """Set both series. A halt in force keeps its series while nothing watches, or while requests meet it."""
        since = time.monotonic() - ASKED_SECONDS
        recent = {each for each, at in self.request_times.items() if at > since}
        persistent = {each for each in self.halted & self.names.keys() if not fresh or each in recent}
        away = recent - self.halted - self.watched.keys()
        stopped = {self.names[each]: 1 for each in persistent}
        stopped |= {name: int(each in self.halted) for each, name in self.watched.items()}
        unwatched = {self.names[each]: 1 for each in away} | dict.fromkeys(self.watched.values(), 0)
        for nth, (gauge, values) in enumerate(
            ((self.metrics.experiment_halted, stopped), (self.metrics.experiment_unwatched, unwatched))
        ):
            for name in self.series[nth] - values.keys():
                gauge.remove(name)
            for name, value in values.items():
                gauge.labels(name).set(value)
            self.series[nth] = set(values)

    async def watch(self) -> None:
        """Check every second; runs until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)
