"""Waivers: vulnerabilities that an owner accepts until a given day, in files with one list each.

- id: CVE-2026-1234
  package: openssl          # source package, distribution or package of npm
  hosts: [llm1]             # left out: all
  state: not_affected       # or false_positive; left out: the risk is accepted
  justification: code_not_reachable
  reason: The server's certificate has no such extension.
  owner: ops@example.org
  until: 2027-03-31         # the last day
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError
from llmkeep.vulnerabilities.model import OPEN, UNDETERMINED, Finding

ACCEPTED, NOT_AFFECTED, FALSE_POSITIVE = STATES = (
    "exploitable",
    "not_affected",
    "false_positive",
)  # CycloneDX's names
JUSTIFICATIONS = (
    "code_not_present", "code_not_reachable", "requires_configuration", "requires_dependency", "requires_environment",
    "protected_by_compiler", "protected_at_runtime", "protected_at_perimeter", "protected_by_mitigating_control",
)  # fmt: skip


class WaiverRefused(LlmkeepError):
    """A file of waivers cannot be used. The message names file, entry, value and what to do."""


@dataclass(frozen=True)
class Waiver:
    """One entry. `until`: the last day on which it holds (UTC). `hosts`: none for all."""

    id: str
    package: str
    reason: str
    owner: str
    until: datetime.date
    hosts: tuple[str, ...] = ()
    state: str = ACCEPTED
    justification: str = ""

    def covers(self, host: str, finding: Finding) -> bool:
        """Whether it applies to this finding on this host, whatever the day."""
        return (
            finding.state in (OPEN, UNDETERMINED)
            and self.package == finding.package
            and self.id in (finding.id, *finding.aliases)
            and (not self.hosts or host in self.hosts)
        )

    def expired(self, day: datetime.date) -> bool:
        return day > self.until


def read(folder: Path) -> list[Waiver]:
    """All waivers of a folder's `*.yml`, which may not exist. Raises WaiverRefused."""
    return [_waiver(path.name, entry) for path in sorted(folder.glob("*.yml")) for entry in _entries(path)]


def _entries(path: Path) -> list[Any]:
    try:
        entries = yaml.safe_load(path.read_text()) or []
    except (yaml.YAMLError, ValueError) as error:
        raise WaiverRefused(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, list):
        raise WaiverRefused(f"{path} is {type(entries).__name__}: write a list of waivers")
    return entries


def _waiver(name: str, entry: Any) -> Waiver:
    where = f"{name}: the waiver {entry!r:.200}"
    if not isinstance(entry, dict):
        raise WaiverRefused(f"{where} is not a mapping: write id, package, reason, owner and until")
    if unread := sorted(map(str, entry.keys() - {each.name for each in fields(Waiver)})):
        raise WaiverRefused(f"{where} has {', '.join(unread)}, which is unknown: remove it")
    hosts = entry.get("hosts", [])
    if (
        not isinstance(hosts, list)
        or not all(isinstance(each, str) for each in hosts)
        or ("hosts" in entry and not hosts)
    ):
        raise WaiverRefused(
            f"{where} has hosts {hosts!r}: write a list of names, or leave it out for all hosts"
        )
    for key in ("id", "package", "reason", "owner"):
        if not (isinstance(entry.get(key), str) and entry[key].strip()):
            raise WaiverRefused(f"{where} has no {key}: write it")
    if type(entry.get("until")) is not datetime.date:
        raise WaiverRefused(f"{where} has until {entry.get('until')!r}: write a day, such as 2027-03-31")
    waiver = Waiver(**{**entry, "hosts": tuple(hosts)})
    if waiver.state not in STATES:
        raise WaiverRefused(f"{where} has the state {waiver.state!r}: take one of {', '.join(STATES)}")
    if (waiver.state == NOT_AFFECTED) != (waiver.justification in JUSTIFICATIONS):
        raise WaiverRefused(f"{where} has the justification {waiver.justification!r}: with state {NOT_AFFECTED}, and only "
                            f"with it, one of {', '.join(JUSTIFICATIONS)}")  # fmt: skip
    return waiver


def waiver_of(waivers: Iterable[Waiver], host: str, finding: Finding, day: datetime.date) -> Waiver | None:
    """The waiver that covers a finding; an expired one only if no other does."""
    covering = [each for each in waivers if each.covers(host, finding)]
    return max(covering, key=lambda each: (not each.expired(day), each.until), default=None)
