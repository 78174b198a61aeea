"""What the witness found and an operator has yet to deal with, in one file beside the copies that it keeps.

An alteration stays until it is acknowledged. A record of which nothing was learnt stays until something is.
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
    """`since`: time of the first look that had it, ISO 8601. `recorded`: whether the control node's record has it."""

    what: str
    since: str
    recorded: bool = False


@dataclass
class Findings:
    """`altered` by identifier; `unheard` by the host, or other source, of which the last look learnt nothing."""

    altered: dict[str, Finding] = field(default_factory=dict)
    unheard: dict[str, Finding] = field(default_factory=dict)

    def add(self, altered: list[str], unheard: dict[str, str]) -> None:
        """The result of one look at all hosts."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for what in (each[:LONGEST] for each in altered):
            self.altered.setdefault(hashlib.sha256(what.encode()).hexdigest()[:8], Finding(what, now))
        self.unheard = {
            source: Finding(what, self.unheard[source].since if source in self.unheard else now)
            for source, what in unheard.items()
        }

    def lasting(self, minutes: int) -> list[Finding]:
        """Sources of which nothing was learnt for at least MINUTES."""
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
    """The findings of the last complete look; None before the first one. RecordError where they cannot be read, LlmkeepError
    where a newer llmkeep wrote them."""
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
        raise RecordError(f"{path} is not what the witness wrote ({error}): look at the control node, "
                          "then move the file away and keep it") from error  # fmt: skip
