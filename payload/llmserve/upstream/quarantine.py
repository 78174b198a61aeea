"""Instances whose GPUs are quarantined (`llm-gpu watch`): they get no new request while the model has another one that
is available.

The rule is applied here because only here the instances of a model are known, at each request: there is no lease to
expire and no vote to lose, and however many hosts are sick at once, the last available instance keeps serving.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import Gauge

from llmcore.files import Stamp, stamp
from llmgpu.quarantine import Entry, StateError, quarantined
from llmgpu.record import event
from llmserve.upstream.engine_client import EngineClient
from llmserve.upstream.instances import Instances

log = logging.getLogger("llmserve.quarantine")
LOOK_SECONDS = 0.5
# What becomes of a quarantined instance: "gpu.admission_closed" while another one serves, then "gpu.engine_drained" once
# it has no request left; "gpu.admission_kept" while it is the last one; "gpu.admission_opened" afterwards.
CLOSED, DRAINED, KEPT, OPENED = (
    f"gpu.{what}" for what in ("admission_closed", "engine_drained", "admission_kept", "admission_opened")
)


@dataclass(slots=True)
class Quarantine:
    """Applies the file of `llm-gpu watch` to the instances, and records what that changes.

    A file that cannot be read changes nothing: neither a sick instance returns by that, nor a healthy one leaves.
    """

    path: Path
    instances: Iterable[Instances]
    note: Callable[[dict[str, object]], None]  # puts an event on the audit record
    admission: Gauge  # 1 for each instance's socket and last action: `llm-gpu settings` waits for it
    seen: Stamp | None = None
    trouble: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)  # by socket
    told: dict[EngineClient, str] = field(default_factory=dict)  # last action on the record

    async def watch(self) -> None:
        """Look again and again; runs until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Read the file if it has changed, and bring all instances in line with it."""
        now = stamp(self.path)
        if now != self.seen:
            try:
                self.entries = quarantined(self.path)
                self.seen, self.trouble = now, ""
            except StateError as error:
                if str(error) != self.trouble:
                    self.trouble = str(error)
                    log.error("quarantine unknown", extra={"fields": {"reason": self.trouble}})
        for each in self.instances:
            for engine in each.engines:
                entry = self.entries.get(str(engine.socket))
                engine.held = entry.reason if entry else ""
            for engine in each.engines:
                self.apply(each, engine)

    def apply(self, instances: Instances, engine: EngineClient) -> None:
        """Close or open the admission of one instance; who else is quarantined is known by now."""
        entry = self.entries.get(str(engine.socket))
        known = self.told.get(engine)
        before = known or OPENED
        if entry is None:
            action = OPENED
        elif not any(other.up and not other.quarantined for other in instances.engines):
            action = KEPT
        elif before == DRAINED:
            action = DRAINED  # what came since was on its way when admission closed
        elif before == CLOSED:
            action = CLOSED if engine.load else DRAINED
        else:
            action = CLOSED
            engine.send_away()
        if action != known:
            self.show(engine, action)
        if action != before:
            self.tell(engine, action, entry)

    def show(self, engine: EngineClient, action: str) -> None:
        socket = str(engine.socket)
        if known := self.told.get(engine):
            self.admission.remove(socket, known.removeprefix("gpu."))
        self.admission.labels(socket, action.removeprefix("gpu.")).set(1)
        self.told[engine] = action

    def tell(self, engine: EngineClient, action: str, entry: Entry | None) -> None:
        fields: dict[str, object] = {
            "llmkeep.engine.socket": str(engine.socket),
            "gen_ai.request.model": engine.model,
            "event.reason": entry.reason if entry else "its GPUs are no longer quarantined",
            "user.name": entry.by if entry else "llm-gateway",
        }
        self.note(event(action, fields))
        log.warning(action, extra={"fields": fields})
