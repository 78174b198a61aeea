"""Open findings of the witness, in one file beside its copies.

An alteration stays until it is acknowledged. A silent record stays until it can be read again.

"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from llmkeep.durable import FORMAT, require_format, write
from llmkeep.record.runs import RecordError

NAME = "findings.json"
LONGEST = 1000  # letters of a finding, in which a host may have a say


@dataclass
class Finding:
    """`since`: time at which it was first seen, ISO 8601. `recorded`: whether the control node's record has it."""

    what: str
    since: str
    recorded: bool = False


@dataclass
class Findings:
    """`altered` by identifier; `unheard` by host or other source that did not answer last time."""

    altered: dict[str, Finding] = field(default_factory=dict)
    unheard: dict[str, Finding] = field(default_factory=dict)

    def add(self, altered: list[str], unheard: dict[str, str]) -> None:
        """Add the result of one check of all hosts."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for what in (each[:LONGEST] for each in altered):
            self.altered.setdefault(hashlib.sha256(what.encode()).hexdigest()[:8], Finding(what, now))
        self.unheard = {
            source: Finding(what, self.unheard[source].since if source in self.unheard else now)
            for source, what in unheard.items()
        }

    def lasting(self, minutes: int) -> list[Finding]:
        """Sources that have been silent for at least MINUTES."""
        now = datetime.now(UTC)
        return [
            each
            for each in self.unheard.values()
            if (now - datetime.fromisoformat(each.since)).total_seconds() >= 60 * minutes
        ]

    def save(self, folder: Path) -> None:
        """Replace the file in FOLDER. OSError."""
        write(folder / NAME, json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode(), 0o600)


def load(folder: Path) -> Findings | None:
    """The findings of the last complete check; None before the first one.

    RecordError if they cannot be read, LlmkeepError if a newer llmkeep wrote them.
    """
    path = folder / NAME
    try:
        kinds = json.loads(path.read_bytes())
        require_format(path, kinds)
        return Findings(
            *(
                {name: Finding(**each) for name, each in kinds[kind].items()}
                for kind in ("altered", "unheard")
            )
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path} was not written by the witness ({error}): examine the control node, then move the file "
            "away and keep it") from error  # fmt: skip
