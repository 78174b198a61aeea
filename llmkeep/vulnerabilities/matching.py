"""Match the components of a host with the databases.

Debian's tracker names source packages and the version that fixes each release; OSV names ranges (ossf.github.io/osv-schema,
"Evaluation"). A version that cannot be ordered makes the result unknown, never negative.

"""

import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from typing import Any

from llmkeep.vulnerabilities.database import Database
from llmkeep.vulnerabilities.model import (
    CRITICAL,
    DEBIAN,
    HIGH,
    LOW,
    MEDIUM,
    OPEN,
    SEVERITIES,
    UNASSIGNED,
    UNDETERMINED,
    UNIMPORTANT,
    UNKNOWN,
    Component,
    Finding,
    Host,
)  # fmt: skip
from llmkeep.vulnerabilities.versions import KEYS, Unparsable, debian

# A source that signs another's binaries, such as linux-signed-amd64: the tracker names the other one.
SIGNED = re.compile(r"(.+)-signed-\w+")
SIGNED_IMAGE = "-signed"  # ends the names of sources whose versions are not those of the boot loader in them
BACKPORT = "~bpo"
# The tracker writes what it took from NVD with asterisks.
URGENCIES = {"high": HIGH, "medium": MEDIUM, "low": LOW}
LEVELS = {"critical": CRITICAL, "high": HIGH, "moderate": MEDIUM, "medium": MEDIUM, "low": LOW}


def host(
    components: Iterable[Component],
    databases: dict[str, Database],
    problems: dict[str, str],
    release: str,
    vendors: Set[str] = frozenset(),
) -> Host:
    """Findings of one host, whose os-release names RELEASE (`debian trixie`).

    PROBLEMS: reasons by ecosystem why its database must not be relied on. VENDORS: binary packages that are not Debian's.
    """
    scan, by_ecosystem = Host(), {name: list[Component]() for name in KEYS}
    for component in components:
        if component.ecosystem == DEBIAN and (
            component.name in vendors or component.source.endswith(SIGNED_IMAGE)
        ):
            scan.uncovered.append(f"{component.name} {component.version}")
        else:
            by_ecosystem[component.ecosystem].append(component)
    for ecosystem, installed in by_ecosystem.items():
        if installed and ecosystem in problems:
            scan.unknown.append(problems[ecosystem])
        if not installed or ecosystem not in databases:
            continue
        if ecosystem != DEBIAN:
            scan.findings += osv(installed, databases[ecosystem])
        elif why := foreign(databases[ecosystem], release):
            scan.unknown.append(why)
        else:
            scan.findings += packages(installed, databases[ecosystem], release.partition(" ")[2])
    scan.unknown += [
        f"{each.package} {each.version}, {each.id}: {each.note}"
        for each in scan.findings
        if each.state == UNKNOWN
    ]
    scan.findings.sort(key=rank)
    return scan


def rank(finding: Finding) -> tuple[int, str, str]:
    """Sort key of findings: the worst first."""
    return SEVERITIES.index(finding.severity), finding.package, finding.id


def foreign(tracker: Database, release: str) -> str:
    """Reason why this database does not cover a host with this release; empty if it does."""
    distribution, _, codename = release.partition(" ")
    if distribution == "debian" and any(
        codename in entry["releases"] for entries in tracker.packages.values() for entry in entries
    ):
        return ""
    return f"the database of debian has no release {release!r}: it is for another distribution or period"


def tracked(component: Component) -> tuple[str, str]:
    """Source package and version in the tracker.

    A source that signs another's binaries has its own version, its binaries the other's.
    """
    if match := SIGNED.fullmatch(component.source):
        return match[1], component.version
    return component.source, component.source_version


def packages(components: Iterable[Component], tracker: Database, codename: str) -> Iterator[Finding]:
    """Findings on Debian packages, one for a source package and its binaries."""
    sources: dict[tuple[str, str], list[Component]] = {}
    for component in components:
        sources.setdefault(tracked(component), []).append(component)
    for (source, version), binaries in sources.items():
        units = {unit for each in binaries for unit in each.units or ()}
        for entry in tracker.advisories(source):
            finding = tracker_finding(source, version, entry, codename)
            if finding:
                yield replace(
                    finding,
                    packages=tuple(sorted(each.name for each in binaries)),
                    units=tuple(sorted(units)),
                )


def tracker_finding(source: str, version: str, entry: dict[str, Any], codename: str) -> Finding | None:
    """The tracker's verdict on one vulnerability in a source package of this version; None if it is fixed or never applied."""
    finding = Finding(entry["id"], DEBIAN, source, version, UNASSIGNED, OPEN)
    # Of a backport only unstable's fix tells something: trixie's own version lines are others.
    judged_by = "sid" if BACKPORT in version else codename
    state = entry["releases"].get(judged_by)
    if not isinstance(state, dict):
        return replace(finding, state=UNKNOWN, note=f"the database has no status for it in {judged_by}")
    urgency = str(state.get("urgency", "")).rstrip("*")
    notes = [str(state[key]) for key in ("nodsa_reason", "nodsa") if state.get(key)]
    notes += ["end of life in Debian"] if urgency == "end-of-life" else []
    finding = replace(finding, severity=URGENCIES.get(urgency, UNASSIGNED), note=": ".join(notes))
    status, fixed = state.get("status"), state.get("fixed_version")
    if status == "resolved" and isinstance(fixed, str):
        try:
            if fixed == "0" or debian(version) >= debian(fixed):
                return None
        except Unparsable as error:
            return replace(finding, state=UNKNOWN, note=str(error))
        finding = replace(finding, fixed=fixed)
    elif status == "undetermined":
        finding = replace(finding, state=UNDETERMINED)
    elif status != "open":
        return replace(finding, state=UNKNOWN, note=f"the database has the status {status!r:.80}")
    return replace(finding, state=UNIMPORTANT) if urgency == "unimportant" else finding


def osv(components: Iterable[Component], database: Database) -> Iterator[Finding]:
    """Findings on distributions and npm's packages; records that name one another are one finding."""
    for component in components:
        merged: list[Finding] = []
        for record in database.advisories(component.name):
            finding = osv_finding(component, record)
            if not finding:
                continue
            names = {finding.id, *finding.aliases}
            same = [each for each in merged if names & {each.id, *each.aliases}]
            merged = [each for each in merged if each not in same] + [_merged([*same, finding])]
        yield from merged


def _merged(findings: list[Finding]) -> Finding:
    """One finding of several records of one vulnerability, under its CVE where there is one."""
    first, names = findings[0], {name for each in findings for name in (each.id, *each.aliases)}
    name = min(names, key=lambda text: (not text.startswith("CVE-"), text))
    return replace(
        first,
        id=name,
        aliases=tuple(sorted(names - {name})),
        severity=min((each.severity for each in findings), key=SEVERITIES.index),
        fixed=next((each.fixed for each in findings if each.fixed), ""),
        state=OPEN if any(each.state == OPEN for each in findings) else first.state,
    )


def osv_finding(component: Component, record: dict[str, Any]) -> Finding | None:
    """The finding of an OSV record for a component; None if its version is not affected."""
    affected = record["affected"]
    level = str((record["database_specific"] or {}).get("severity", "")).lower()
    finding = Finding(
        record["id"],
        component.ecosystem,
        component.name,
        component.version,
        LEVELS.get(level, UNASSIGNED),
        OPEN,
        place=component.place,
        units=component.units,
        aliases=tuple(record["aliases"] or ()),
    )
    try:
        hit, fixed = _evaluated(component, affected)
    except (Unparsable, KeyError, TypeError, AttributeError) as error:
        return replace(finding, state=UNKNOWN, note=str(error))
    return replace(finding, fixed=fixed) if hit else None


def _evaluated(component: Component, affected: dict[str, Any]) -> tuple[bool, str]:
    """Whether a version is affected, and the first later one that is not, if there is one."""
    key = KEYS[component.ecosystem]
    version, fixes, hit = key(component.version), [], False
    ranges = [each for each in affected.get("ranges") or () if each["type"] != "GIT"]
    for each in ranges:
        inside = False
        for event in sorted(each["events"], key=lambda event: _moment(event, key)):
            ((kind, text),) = event.items()
            if kind == "introduced" and (text == "0" or version >= key(text)):
                inside = True
            elif (kind == "fixed" and version >= key(text)) or (
                kind == "last_affected" and version > key(text)
            ):
                inside = False
            if kind == "fixed" and key(text) > version:
                fixes.append((key(text), text))
        hit = hit or inside
    hit = hit or component.version in (affected.get("versions") or ())
    return hit, min(fixes)[1] if hit and fixes else ""


def _moment(event: dict[str, str], key: Any) -> Any:
    """Order of a range's events."""
    ((kind, text),) = event.items()
    return (0,) if text == "0" else (1, key(text), kind == "last_affected")
