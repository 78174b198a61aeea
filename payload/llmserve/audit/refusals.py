"""Refusals in the audit record. Callers determine their number, so the record of a minute holds a bounded number of them.

The first refusals of a source for a reason are recorded individually; later ones are counted by reason, and the counts are
recorded when the minute is over. Beyond a maximum number of sources, the rest of a minute is counted together.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable

from llmserve.asgi import Exchange

MINUTE = 60.0  # seconds
OTHERS = "others"
Source = dict[str, object]  # the fields of the record that identify it


def network(address: object) -> str:
    """An IPv4 address, or the /64 of an IPv6 address, since its holder can use all of it; OTHERS for anything else."""
    try:
        parsed = ipaddress.ip_address(str(address))
    except ValueError:
        return OTHERS
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def source(exchange: Exchange) -> Source:
    """The caller, or the address of an unauthenticated one."""
    identity = exchange.identity
    if identity is None:
        return {"llmkeep.audit.source": network(exchange.address)}
    return {
        "user.id": identity.subject,
        "organization.id": identity.tenant,
        "llmkeep.identity.kind": identity.kind,
        "llmkeep.identity.id": identity.id,
    }


class Refusals:
    """Counts of the current minute."""

    def __init__(
        self, note: Callable[[dict[str, object]], None], sources: int, singly: int, records: int
    ) -> None:
        """`note` sends an event to the record. Each minute, up to `sources` sources are counted separately; `singly` refusals of
        each source and reason, and `records` in total, are recorded individually.
        """
        self.note = note
        self.sources = sources
        self.singly = singly
        self.records = records
        self.minute = 0
        self.counts: dict[
            tuple[object, ...], tuple[Source, Counter[str]]
        ] = {}  # without those recorded singly
        self.recorded = Counter[tuple[object, ...]]()

    def add(self, event: dict[str, object], by: Source, now: float) -> None:
        """Record or count a refusal. `now`: time.monotonic()."""
        self.tick(now)
        name = tuple(by.values())
        if name not in self.counts and len(self.counts) >= self.sources:
            by, name = {"llmkeep.audit.source": OTHERS}, (OTHERS,)
        _, counted = self.counts.setdefault(name, (by, Counter()))
        code = str(event.get("error.code"))
        if self.recorded[*name, code] < self.singly and self.recorded.total() < self.records:
            self.recorded[*name, code] += 1
            self.note(event)
        else:
            counted[code] += 1

    def tick(self, now: float) -> None:
        """Record the counts of the last minute if it is over."""
        if int(now // MINUTE) != self.minute:
            self.minute = int(now // MINUTE)
            self.flush()

    def flush(self) -> None:
        """Record the counts."""
        counts, self.counts = self.counts, {}
        self.recorded.clear()
        for by, counted in counts.values():
            if counted:
                self.note(
                    {
                        "event.kind": "event",
                        "event.category": ["api"],
                        "event.action": "unknown",
                        "llmkeep.audit.phase": "refused",
                        "event.type": ["denied"],
                        "event.outcome": "failure",
                        "llmkeep.audit.count": counted.total(),
                        "llmkeep.audit.codes": dict(counted),
                    }
                    | by
                )
