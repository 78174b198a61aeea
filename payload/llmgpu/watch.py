"""`llm-gpu watch`: reads the GPUs, remembers their Xids, quarantines the engines of sick ones, exports metrics.

One thread calls NVML. It may hang in the driver forever, where nothing can end it; another thread makes the decisions, and only
looks at the age of the last reading.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmcore.notify import notify, watchdog_seconds
from llmgpu import history, orders, quarantine
from llmgpu.health import Finding, judge
from llmgpu.metrics import Metrics, Snapshot, Stale
from llmgpu.nvml import Nvml, NvmlError, Reading
from llmgpu.quarantine import WATCH, Entry, Saved, StateError
from llmgpu.record import RecordError, record
from llmgpu.settings import GpuConfig
from llmgpu.xids import TABLE

log = logging.getLogger("llmgpu.watch")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
LOOK_SECONDS = 2.0
LOG_SECONDS = 60.0
FIRST_SECONDS = 5.0  # how long a start waits for the first reading before it judges
REOPEN = 6  # readings
REASON = 500  # characters of a reason on the record


@dataclass(slots=True)
class Reader:
    """The thread that calls NVML, and its readings."""

    seconds: float
    expected: int  # GPUs
    reading: Reading | None = None
    uuids: dict[int, str] = field(default_factory=dict)  # by index: a GPU that is lost no longer says its own
    trouble: str = "none was taken yet"
    xids: Counter[tuple[str, int]] = field(default_factory=Counter)  # by UUID and code; codes are few
    lock: threading.Lock = field(default_factory=threading.Lock)
    news: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        """Start reading, until the process ends; the thread only ends earlier through a bug in this program."""
        thread = threading.Thread(target=self.run, name="nvml", daemon=True)
        thread.start()
        return thread

    def run(self) -> None:
        while True:
            nvml = Nvml()
            try:
                nvml.open()
                self.read_on(nvml)
            except NvmlError as error:
                with self.lock:
                    self.trouble = str(error)
                self.news.set()
                time.sleep(self.seconds)
            finally:
                nvml.close()

    def read_on(self, nvml: Nvml) -> None:
        """Read until a GPU has been missing for a while: only a reopened library finds it again. Raises NvmlError."""
        missing = 0
        while missing < REOPEN:
            reading = self.with_uuids(nvml.read())
            with self.lock:
                self.reading, self.trouble = reading, ""
            self.news.set()
            due = time.monotonic() + self.seconds
            while (remaining := due - time.monotonic()) > 0:
                counts = nvml.wait(remaining)
                if counts:
                    with self.lock:
                        self.xids.update(counts)
                    self.news.set()
            missing = missing + 1 if reading.present < self.expected else 0

    def with_uuids(self, reading: Reading) -> Reading:
        """The reading, in which lost GPUs have the UUIDs that they had before."""
        self.uuids |= {gpu.index: gpu.uuid for gpu in reading.gpus if gpu.uuid}
        gpus = (replace(gpu, uuid=gpu.uuid or self.uuids.get(gpu.index, "")) for gpu in reading.gpus)
        return replace(reading, gpus=tuple(gpus))

    def latest(self, stale_seconds: float) -> tuple[Reading | None, str]:
        """The last reading unless it is too old, else None; and what prevents the next one, if known."""
        with self.lock:
            reading, trouble = self.reading, self.trouble
        if reading is None:
            return None, trouble
        if time.monotonic() - reading.at <= stale_seconds:
            return reading, trouble
        # Without the seconds that have passed: a reason that changes would be recorded again each time.
        hangs = f"NVML does not answer within {stale_seconds:g} s: the driver hangs, see `journalctl -k`"
        return None, trouble or hangs

    def take_xids(self) -> Counter[tuple[str, int]]:
        """The events since the last call."""
        with self.lock:
            counts, self.xids = self.xids, Counter()
        return counts


class Watch:
    """Decides and keeps the state. Everything but the reader's thread runs in `run`."""

    def __init__(self, config: GpuConfig) -> None:
        """Load the state; raises StateError. A boot since then is an event of all GPUs."""
        self.config = config
        self.reader = Reader(config.seconds, config.expect.count)
        self.metrics = Metrics(self.snapshot, config.expect.count)
        self.saved: Saved = quarantine.load(config.state)
        boot = Path(BOOT_ID).read_text().strip()
        if self.saved.boot != boot:
            if self.saved.boot:
                for uuid, state in self.saved.histories.items():
                    self.saved.histories[uuid] = history.after(state, history.Rebooted())
            self.saved.boot = boot
            quarantine.save(config.state, self.saved)
        self.findings: list[Finding] = []
        self.last_sick: dict[str, float] = {}  # by engine: time.monotonic()
        self.reports: dict[tuple[str, int | None], str] = {}  # findings that were logged
        self.xids = XidLog()
        self.messages: dict[str, float] = {}  # what was logged lately: time.monotonic()
        self.records = True  # whether the audit writer has taken all events of this round
        self.began = time.monotonic()
        self.indices: dict[str, int] = {}  # of GPUs by UUID

    def snapshot(self) -> Snapshot:
        """For a scrape; raises Stale."""
        reading, trouble = self.reader.latest(self.config.stale_seconds)
        if reading is None or trouble:
            raise Stale(f"no recent reading of the GPUs: {trouble}")
        counts: Counter[tuple[str, bool]] = Counter(
            ("" if each.gpu is None else str(each.gpu), each.drains) for each in self.findings
        )
        quarantines = self.saved.quarantine
        return Snapshot(
            reading,
            time.monotonic() - reading.at,
            dict(counts),
            {engine: engine in quarantines for engine in self.config.engines},
        )

    def run(self, stopped: Callable[[], bool]) -> bool:
        """Look every LOOK_SECONDS, and at once when there is something new, until `stopped()`; False if the reader broke."""
        server = self.metrics.listen(
            self.config.metrics_host, self.config.metrics_port, lambda: quarantine.serialized(self.saved)
        )
        log.info("metrics", extra={"fields": {"port": server.server_address[1]}})
        thread = self.reader.start()
        self.reader.news.wait(FIRST_SECONDS)
        notify("READY=1")
        watched = watchdog_seconds() is not None
        while not stopped() and thread.is_alive():
            self.reader.news.clear()
            try:
                self.look()
            except OSError as error:
                self.say(
                    f"{error.filename or self.config.state}: {error.strerror}: no decisions are made meanwhile"
                )
            if watched:
                notify("WATCHDOG=1")
            self.reader.news.wait(LOOK_SECONDS)
        notify("STOPPING=1")
        server.shutdown()
        return stopped()

    def look(self) -> None:
        """One round: events, findings, quarantine."""
        self.records = True
        reading, trouble = self.reader.latest(self.config.stale_seconds)
        if reading:
            self.indices |= {gpu.uuid: gpu.index for gpu in reading.gpus if gpu.uuid}
        self.remember(self.reader.take_xids())
        try:
            order_set = orders.load(self.config.orders)
        except StateError as error:
            order_set = orders.Orders(self.drains_as_saved())
            self.say(str(error))
        self.apply_repairs(order_set.repairs)
        if reading is None and time.monotonic() - self.began < self.config.stale_seconds:
            return  # the first reading of a driver that wakes its GPUs up takes long
        self.findings = judge(reading, trouble, self.config.expect, self.saved.histories)
        self.tell()
        self.decide(order_set)

    def remember(self, counts: Counter[tuple[str, int]]) -> None:
        """Count events, and keep what each does to its GPU's state; saved only if that changes it."""
        changed = False
        for (uuid, code), number in counts.items():
            index = self.indices.get(uuid)
            self.metrics.count(index, code, number)
            self.xids.add(index, uuid, code, number)
            before = self.saved.histories.get(uuid, history.HEALTHY)
            after = history.after(before, history.Happened(code))
            if uuid and after != before:
                self.saved.histories[uuid] = after
                changed = True
        self.xids.write()
        if changed:
            quarantine.save(self.config.state, self.saved)

    def apply_repairs(self, repairs: list[orders.Repair]) -> None:
        """Apply the operators' declarations, each once it is on record."""
        for each in repairs:
            if each.number <= self.saved.repairs:
                continue
            if not self.on_record(
                "gpu.repaired",
                {"llmkeep.gpu.uuid": each.uuid, "user.name": each.operator, "event.reason": each.reason},
            ):
                return
            self.saved.histories.pop(each.uuid, None)
            self.saved.repairs = each.number
            quarantine.save(self.config.state, self.saved)

    def drains_as_saved(self) -> dict[str, orders.Drain]:
        """The operators' drains, while the file with their orders cannot be read."""
        entries = self.saved.quarantine.items()
        return {
            name: orders.Drain(each.by, each.reason, each.since) for name, each in entries if each.by != WATCH
        }

    def decide(self, order_set: orders.Orders) -> None:
        """Compare what is quarantined with what must be; each change is recorded before it takes effect."""
        now = time.monotonic()
        for name, served in self.config.engines.items():
            wrong = [
                each
                for each in self.findings
                if each.drains and (each.gpu is None or each.gpu in served.gpus)
            ]
            if wrong:
                self.last_sick[name] = now
            current = self.saved.quarantine.get(name)
            socket = str(served.socket)
            if drain := order_set.drains.get(name):
                target: Entry | None = Entry(socket, drain.operator, drain.reason, drain.since)
            elif wrong:
                reason = "; ".join(map(str, wrong))[:REASON]
                since = current.since if current and current.by == WATCH else orders.now()
                target = Entry(socket, WATCH, reason, since)
            elif current and current.by == WATCH and not self.well_for(name, now):
                target = current
            else:
                target = None
            if target:
                if target != current:
                    self.put(name, target)
            elif current:
                ended = order_set.ended.get(name)
                self.take_back(
                    name, ended.reason if ended and current.by != WATCH else "its GPUs are healthy again"
                )
        for name in set(self.saved.quarantine) - set(self.config.engines):
            self.take_back(name, "this host no longer has such an engine")

    def well_for(self, engine: str, now: float) -> bool:
        """Whether its GPUs have been healthy for long enough to return; counted anew after a restart."""
        return now - self.last_sick.setdefault(engine, now) >= self.config.return_seconds

    def put(self, engine: str, entry: Entry) -> None:
        """Quarantine an engine once that is recorded; otherwise the next round tries again."""
        if self.on_record("gpu.engine_quarantined", fields(engine, entry.by, entry.reason)):
            self.saved.quarantine[engine] = entry
            quarantine.save(self.config.state, self.saved)

    def take_back(self, engine: str, reason: str) -> None:
        """End a quarantine, in the same way."""
        if self.on_record("gpu.engine_returned", fields(engine, self.saved.quarantine[engine].by, reason)):
            del self.saved.quarantine[engine]
            quarantine.save(self.config.state, self.saved)

    def on_record(self, action: str, fields: dict[str, object]) -> bool:
        """Whether the event was recorded, if there is a record; logs why not. After a failure no further one is tried in this
        round."""
        if not self.records:
            return False
        try:
            if self.config.audit is not None:
                record(self.config.audit, action, fields)
        except RecordError as error:
            self.records = False
            self.say(f"{action} waits for the audit record: {error}")
            return False
        log.warning(action, extra={"fields": fields})
        return True

    def tell(self) -> None:
        """Log new findings and those that are over, but not changes within one, such as a temperature."""
        now = {(each.check, each.gpu): each for each in self.findings}
        for key, each in now.items():
            if key not in self.reports:
                level = logging.ERROR if each.drains else logging.WARNING
                log.log(level, "finding", extra={"fields": {"finding": str(each), "runbook": each.runbook}})
        for key in self.reports.keys() - now.keys():
            log.info("finding is over", extra={"fields": {"finding": self.reports[key]}})
        self.reports = {key: self.reports.get(key, str(each)) for key, each in now.items()}

    def say(self, text: str) -> None:
        """Log it, unless it was logged less than LOG_SECONDS ago."""
        now = time.monotonic()
        self.messages = {each: at for each, at in self.messages.items() if now - at < LOG_SECONDS}
        if text not in self.messages:
            self.messages[text] = now
            log.error(text)


@dataclass(slots=True)
class XidLog:
    """Logs Xids: for each GPU and code the first one at once, and then their number once a minute, however many there are."""

    counts: Counter[tuple[int | None, str, int]] = field(default_factory=Counter)  # not logged yet
    logged: dict[tuple[int | None, str, int], float] = field(default_factory=dict)  # time.monotonic()

    def add(self, gpu: int | None, uuid: str, code: int, number: int) -> None:
        self.counts[gpu, uuid, code] += number

    def write(self) -> None:
        """Log what is due."""
        now = time.monotonic()
        self.logged = {key: at for key, at in self.logged.items() if now - at < LOG_SECONDS}
        for key in [key for key in self.counts if key not in self.logged]:
            gpu, uuid, code = key
            entry = TABLE.get(code)
            meaning = entry.meaning if entry else "not in this release's table"
            fields = {
                "gpu": gpu,
                "uuid": uuid,
                "xid": code,
                "times": self.counts.pop(key),
                "meaning": meaning,
            }
            log.log(
                logging.ERROR if entry and entry.drains else logging.WARNING, "Xid", extra={"fields": fields}
            )
            self.logged[key] = now


def fields(engine: str, by: str, reason: str) -> dict[str, object]:
    """The fields of a record about an engine."""
    return {"llmkeep.engine": engine, "user.name": by, "event.reason": reason}
