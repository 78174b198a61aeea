"""Instances whose GPUs are quarantined (`llm-gpu watch`): they get no new request while the model has another one that
is available.

The rule is applied here because only here the instances of a model are known, at each request: there is no lease to
expire and no vote to lose, and however many hosts are sick at once, the last available instance keeps serving. For this host, a
file lists what is quarantined; for other hosts, their `llm-gpu watch` does, through their role `engine_access`.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import Gauge

from llmcore.config import ConfigError
from llmcore.files import Stamp, stamp
from llmgpu.quarantine import Entry, StateError, quarantined, received
from llmgpu.record import event
from llmserve.http_client import BadAnswer, HttpClient, Lost
from llmserve.upstream.engine_client import EngineClient
from llmserve.upstream.instances import Instances
from llmserve.upstream.offered import OfferedAddress

log = logging.getLogger("llmserve.quarantine")
LOOK_SECONDS = 0.5
REQUEST_SECONDS = 5.0  # of another host's watch
ANSWER_BYTES = 1024 * 1024
PROTOCOL = "llmkeep-gpu-health"  # by which role `engine_access` leads to it
# What becomes of a quarantined instance: "gpu.admission_closed" while another one serves, then "gpu.engine_drained" once
# it has no request left; "gpu.admission_kept" while it is the last one; "gpu.admission_opened" afterwards.
CLOSED, DRAINED, KEPT, OPENED = (
    f"gpu.{what}" for what in ("admission_closed", "engine_drained", "admission_kept", "admission_opened")
)


@dataclass(slots=True)
class Quarantine:
    """Applies the file of `llm-gpu watch`, if there is one, and what other hosts report, to the instances, and records what that
    changes.

    A file that cannot be read changes nothing, nor does a host that does not answer: no sick instance returns and no healthy one
    leaves because of it.
    """

    path: Path | None
    instances: Iterable[Instances]
    note: Callable[[dict[str, object]], None]  # puts an event on the audit record
    admission: Gauge  # 1 for each instance's socket and last action: `llm-gpu settings` waits for it
    version: Stamp | None = None  # of the file, as last read
    trouble: dict[str, str] = field(default_factory=dict)  # by source; logged once
    entries: Mapping[str, Entry] = field(default_factory=dict)  # of this host, by socket
    elsewhere: dict[str, Mapping[str, Entry]] = field(default_factory=dict)  # by host, then by socket there
    actions: dict[EngineClient, str] = field(default_factory=dict)  # last action on the record

    async def watch(self) -> None:
        """Check repeatedly; runs until cancelled."""
        hosts = {(each.engine.host, each.engine.port): each for each in self.offered() if each.engine.gpus}
        async with asyncio.TaskGroup() as tasks:
            for address in hosts.values():
                tasks.create_task(self.watch_host(address))
            while True:
                self.look()
                await asyncio.sleep(LOOK_SECONDS)

    def offered(self) -> list[OfferedAddress]:
        """Addresses of the engines that other hosts offer."""
        engines = [engine for each in self.instances for engine in each.engines]
        return [engine.address for engine in engines if isinstance(engine.address, OfferedAddress)]

    async def watch_host(self, address: OfferedAddress) -> None:
        """Ask the host for its quarantine repeatedly; runs until cancelled."""
        host = address.engine.host
        http = HttpClient(address.url, address.tls.tls, None, PROTOCOL)
        while True:
            try:
                http.refresh()
                async with asyncio.timeout(REQUEST_SECONDS), http.request("GET", "/quarantine") as response:
                    body = await response.whole(ANSWER_BYTES)
                if response.status != 200:
                    raise BadAnswer(f"GET /quarantine returned {response.status}")
                self.elsewhere[host] = received(body)
                self.trouble.pop(host, None)
            except (OSError, TimeoutError, Lost, BadAnswer, ValueError, ConfigError) as error:
                self.report(host, f"{type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_SECONDS)

    def report(self, source: str, trouble: str) -> None:
        """Log that a source cannot be read, once for each reason."""
        if self.trouble.get(source) != trouble:
            self.trouble[source] = trouble
            log.error("quarantine unknown", extra={"fields": {"source": source, "reason": trouble}})

    def look(self) -> None:
        """Read the file if it has changed, and bring all instances in line with it and with the other hosts."""
        if self.path and (now := stamp(self.path)) != self.version:
            try:
                self.entries = quarantined(self.path)
                self.version = now
                self.trouble.pop(str(self.path), None)
            except StateError as error:
                self.report(str(self.path), str(error))
        for each in self.instances:
            for engine in each.engines:
                entry = self.entry(engine)
                engine.quarantine_reason = entry.reason if entry else ""
            for engine in each.engines:
                self.apply(each, engine)

    def entry(self, engine: EngineClient) -> Entry | None:
        """The instance's entry in its own host's quarantine."""
        if isinstance(engine.address, OfferedAddress):
            there = engine.address.engine
            return self.elsewhere.get(there.host, {}).get(str(there.socket))
        return self.entries.get(str(engine.socket))

    def apply(self, instances: Instances, engine: EngineClient) -> None:
        """Close or open the admission of one instance, once the quarantine of all others is known."""
        entry = self.entry(engine)
        previous = self.actions.get(engine)
        before = previous or OPENED
        if entry is None:
            action = OPENED
        elif not any(other.up and not other.quarantined for other in instances.engines):
            action = KEPT
        elif before == DRAINED:
            action = DRAINED  # what came since was on its way when admission closed
        elif before == CLOSED:
            action = CLOSED if engine.own_load else DRAINED
        else:
            action = CLOSED
            engine.send_away()
        if action != previous:
            self.show(engine, action)
        if action != before:
            self.tell(engine, action, entry)

    def show(self, engine: EngineClient, action: str) -> None:
        socket = str(engine.socket)
        if previous := self.actions.get(engine):
            self.admission.remove(socket, previous.removeprefix("gpu."))
        self.admission.labels(socket, action.removeprefix("gpu.")).set(1)
        self.actions[engine] = action

    def tell(self, engine: EngineClient, action: str, entry: Entry | None) -> None:
        fields: dict[str, object] = {
            "llmkeep.engine.socket": str(engine.socket),
            "gen_ai.request.model": engine.model,
            "event.reason": entry.reason if entry else "its GPUs are no longer quarantined",
            "user.name": entry.by if entry else "llm-gateway",
        }
        self.note(event(action, fields))
        log.warning(action, extra={"fields": fields})
