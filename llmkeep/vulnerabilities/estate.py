"""The scan of an estate: the hosts' answers compared with the bundle's databases and the waivers, as one document."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from llmkeep.bundle import manifest
from llmkeep.bundle.manifest import Manifest
from llmkeep.errors import LlmkeepError
from llmkeep.vulnerabilities import database, matching
from llmkeep.vulnerabilities.model import (
    DEBIAN,
    ECOSYSTEMS,
    NPM,
    OPEN,
    PYPI,
    SEVERITIES,
    UNDETERMINED,
    Component,
)
from llmkeep.vulnerabilities.waivers import Waiver, waiver_of

FORMAT = 1
# Of a host's answer, which the host writes. A name or a version with anything else is no answer.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,127}")
TEXT = re.compile(r"[\x21-\x7e]{1,256}")
RELEASE = re.compile(r"[a-z0-9._-]{1,40} [a-z0-9._-]{1,40}")
UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,256}")
MOST = 100_000  # components of a host
POOL = re.compile(r"pkg:deb/debian/([^@]+)@")
DEBIANS = "deb:debian"  # begins the manifest's `source` of packages that Debian's tracker knows


@dataclass(frozen=True)
class Answer:
    """A host's software. `replaced`: units that run other files than the installed ones."""

    release: str
    components: list[Component]
    replaced: list[str]
    uncovered: list[str]


def answer(text: str, scripts: Mapping[str, str]) -> Answer:
    """Parse the output of module host_software; SCRIPTS: `name@version` of vendored ones, by SHA-256.

    ValueError if invalid.
    """
    try:
        read = json.loads(text)
        components = [
            Component(DEBIAN, _is(NAME, name), _is(TEXT, version), _is(NAME, source), _is(TEXT, own), units=_units(units))
            for name, version, source, own, units in read["packages"]
        ] + [
            Component(PYPI, _is(NAME, name), _is(TEXT, version), place=_is(TEXT, place), units=_units(units))
            for name, version, place, units in read["python"]
        ]  # fmt: skip
        release = _is(RELEASE, read["release"])
        uncovered = []
        for name, digest, place in read["scripts"]:
            package, _, version = scripts.get(digest, "").rpartition("@")
            if package:
                components.append(Component(NPM, package, version, place=_is(TEXT, place), units=None))
            else:
                uncovered.append(f"{_is(NAME, name)} with SHA-256 {_is(manifest.SHA256, digest)}")
        replaced = list(_units(read["replaced"]) or ())
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not any(each.ecosystem == DEBIAN for each in components) or len(components) > MOST:
        raise ValueError(f"{len(components)} components, too many or without any package")
    return Answer(release, components, replaced, uncovered)


def _is(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r:.120} instead of a text like {pattern.pattern}")
    return value


def _units(value: Any) -> tuple[str, ...] | None:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{value!r:.120} instead of a list of units")
    return None if value is None else tuple(_is(UNIT, unit) for unit in value)


def scan(
    answers: Mapping[str, str | None],
    bundle: Path | None,
    now: datetime,
    days: int,
    waivers: Iterable[Waiver],
) -> dict[str, Any]:
    """The scan's document. ANSWERS: output of hosts, None if a host did not answer. BUNDLE: has the databases."""
    listed, databases, problems = opened(bundle, now, days)
    scripts, vendors = vendored(listed), foreign_packages(listed)
    waivers = list(waivers)
    return {
        "format": FORMAT,
        "time": now.strftime(manifest.TIME),
        "bundle_serial": listed.serial if listed else None,
        "days": days,
        "databases": {
            name: {
                "date": databases[name].date.strftime(manifest.TIME) if name in databases else "",
                "sha256": databases[name].sha256 if name in databases else "",
                "problem": problems.get(name, ""),
            }
            for name in ECOSYSTEMS
        },
        "uncovered": [
            f"program {path.removeprefix('bin/')}" for path in _paths(listed) if path.startswith("bin/")
        ],
        "hosts": {
            name: _host(name, text, databases, problems, scripts, vendors, waivers, now)
            for name, text in sorted(answers.items())
        },
        "waivers": [_waiver(each, now) for each in waivers],
    }


def opened(
    bundle: Path | None, now: datetime, days: int
) -> tuple[Manifest | None, dict[str, database.Database], dict[str, str]]:
    """A bundle's manifest, its databases, and reasons why some must not be relied on."""
    try:
        if bundle is None or not (bundle / manifest.NAME).exists():
            raise LlmkeepError(
                f"there is no bundle{f' at {bundle}' if bundle else ''}, so there is no database: name one with --database"
            )
        listed = manifest.read(bundle)
    except LlmkeepError as error:
        return None, {}, dict.fromkeys(ECOSYSTEMS, str(error))
    return listed, *database.usable(bundle, now, days)


def _paths(listed: Manifest | None) -> list[str]:
    return [entry.path for entry in listed.files] if listed else []


def vendored(listed: Manifest | None) -> dict[str, str]:
    """`name@version` of scripts of npm's packages, by their SHA-256."""
    prefix = "pkg:npm/"
    return {
        entry.sha256: unquote(entry.purl.removeprefix(prefix))
        for entry in (listed.files if listed else ())
        if entry.purl.startswith(prefix) and entry.path.endswith(".js")
    }


def foreign_packages(listed: Manifest | None) -> frozenset[str]:
    """Binary packages of the bundle that come from vendors rather than Debian."""
    return frozenset(
        unquote(match[1])
        for entry in (listed.files if listed else ())
        if (match := POOL.match(entry.purl)) and not entry.source.startswith(DEBIANS)
    )


def _host(
    name: str,
    text: str | None,
    databases: dict[str, database.Database],
    problems: dict[str, str],
    scripts: Mapping[str, str],
    vendors: frozenset[str],
    waivers: list[Waiver],
    now: datetime,
) -> dict[str, Any]:
    empty = {"answers": False, "release": "", "components": 0, "uncovered": [], "findings": []}
    if text is None:
        return {**empty, "unknown": ["it did not answer"]}
    try:
        software = answer(text, scripts)
    except ValueError as error:
        return {**empty, "unknown": [f"its answer is not a list of software ({error}): examine that host"]}
    scanned = matching.host(software.components, databases, problems, software.release, vendors)
    restarts = [f"{unit} runs files that were replaced since: restart it" for unit in software.replaced]
    findings = []
    for finding in scanned.findings:
        waiver = waiver_of(waivers, name, finding, now.date())
        findings.append({**asdict(finding), "waiver": _waiver(waiver, now) if waiver else None})
    return {
        "answers": True,
        "release": software.release,
        "components": len(software.components),
        "unknown": scanned.unknown + restarts,
        "uncovered": scanned.uncovered + software.uncovered,
        "findings": findings,
    }


def _waiver(waiver: Waiver, now: datetime) -> dict[str, Any]:
    return {
        **asdict(waiver),
        "until": waiver.until.isoformat(),
        "expired": waiver.expired(now.date()),
    }


def is_open(finding: Mapping[str, Any]) -> bool:
    """Whether a finding counts as open: no waiver covers it."""
    return finding["state"] == OPEN and not (finding["waiver"] and not finding["waiver"]["expired"])


def is_unknown(finding: Mapping[str, Any]) -> bool:
    """Whether the database leaves a finding undecided, and no waiver covers it."""
    return finding["state"] == UNDETERMINED and not (finding["waiver"] and not finding["waiver"]["expired"])


def counts(host: Mapping[str, Any]) -> dict[str, int]:
    """Open findings of a host by severity."""
    severities = [finding["severity"] for finding in host["findings"] if is_open(finding)]
    return {severity: severities.count(severity) for severity in SEVERITIES}


def complete(document: Mapping[str, Any]) -> bool:
    """Whether nothing in the scan is unknown."""
    return bool(document["hosts"]) and not any(
        host["unknown"] or any(is_unknown(finding) for finding in host["findings"])
        for host in document["hosts"].values()
    )


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a scan: each host's open findings by severity, and the number of unknowns."""
    return {
        "hosts": {
            name: {
                "open": counts(host),
                "unknown": len(host["unknown"]) + sum(map(is_unknown, host["findings"])),
            }
            for name, host in document["hosts"].items()
        }
    }
