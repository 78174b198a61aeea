"""Refusals of callers without an identity. Anyone may cause them, so the record of a minute has a bounded number of them.

The first refusal of an address in a minute is recorded as it is; the following ones are counted, and their number is recorded
when the minute is over. Beyond MOST_ADDRESSES addresses, the rest of a minute is counted together.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable

MOST_ADDRESSES = 32  # of a minute; with both records of each at most 2.7 MB an hour
MINUTE = 60.0  # seconds
OTHERS = "others"


def source(address: object) -> str:
    """An IPv4 address, or the /64 of an IPv6 address, all of which its holder can use; OTHERS for anything else."""
    try:
        parsed = ipaddress.ip_address(str(address))
    except ValueError:
        return OTHERS
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


class Strangers:
    """Counts of the current minute."""

    def __init__(self, note: Callable[[dict[str, object]], None]) -> None:
        """`note` sends an event to the record."""
        self.note = note
        self.minute = 0
        self.counts: dict[str, Counter[str]] = {}

    def add(self, event: dict[str, object], now: float) -> None:
        """Record or count a refusal. `now`: time.monotonic()."""
        self.tick(now)
        name = source(event.get("source.ip"))
        if name not in self.counts and len(self.counts) >= MOST_ADDRESSES:
            name = OTHERS
        if name in self.counts:
            self.counts[name][str(event.get("error.code"))] += 1
            return
        self.counts[name] = Counter()
        self.note(event)

    def tick(self, now: float) -> None:
        """Record the counts of a minute that is over."""
        if int(now // MINUTE) == self.minute:
            return
        self.minute = int(now // MINUTE)
        self.flush()

    def flush(self) -> None:
        """Record the counts."""
        counted, self.counts = self.counts, {}
        for name, codes in counted.items():
            if codes:
                self.note(
                    {
                        "event.kind": "event",
                        "event.category": ["api"],
                        "event.action": "unknown",
                        "llmkeep.audit.phase": "refused",
                        "event.type": ["denied"],
                        "event.outcome": "failure",
                        "llmkeep.audit.source": name,
                        "llmkeep.audit.count": codes.total(),
                        "llmkeep.audit.codes": dict(codes),
                    }
                )
