"""Vulnerabilities in a report: the scan as JSON and as VEX, and its part of the pages."""

import json
from collections.abc import Callable
from typing import Any

from llmkeep.record.report_html import spoken, table, text
from llmkeep.vulnerabilities import estate, vex
from llmkeep.vulnerabilities.model import OPEN, SEVERITIES, UNIMPORTANT, UNKNOWN
from llmproof.vulnerabilities import SCAN

VEX = "vulnerabilities.vex.json"


def files(scan: dict[str, Any]) -> dict[str, bytes]:
    """Files of the archive."""
    content = json.dumps(scan, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    return {SCAN: content, VEX: vex.document(scan)}


def section(scan: dict[str, Any], language: str) -> str:
    """The part of a page: databases, numbers of each host, what is unknown, and each finding but the unimportant ones."""
    say = spoken(language)
    parts = [f"<h2>{say('Vulnerabilities')}</h2>"]
    if not estate.complete(scan):
        parts.append(f"<p>{say('Something is unknown, so no host counts as free of vulnerabilities.')}</p>")
    parts.append(
        table(
            [say(name) for name in ("Database", "As of", "SHA-256", "Problem")],
            [
                [text(name), text(each["date"]), text(each["sha256"]), text(each["problem"])]
                for name, each in scan["databases"].items()
            ],
        )
    )
    parts.append(
        table(
            [say(name) for name in ("Host", *SEVERITIES, "Unknown")],
            [
                [text(name), *map(str, estate.counts(host).values()), "<br>".join(map(text, unknown(host)))]
                for name, host in scan["hosts"].items()
            ],
        )
    )
    rows = [
        [text(host), *_finding(finding, say)]
        for host, each in scan["hosts"].items()
        for finding in each["findings"]
        if finding["state"] != UNIMPORTANT
    ]
    heads = ("Host", "Vulnerability", "State", "Package", "Fixed version", "Running in", "Waiver")
    if rows:
        parts.append(table([say(name) for name in heads], rows))
    return "\n".join(parts)


def unknown(host: dict[str, Any]) -> list[str]:
    """Sentences on what is not known of a host."""
    undetermined = [
        f"{each['id']}: {each['package']}" for each in host["findings"] if estate.is_unknown(each)
    ]
    return [*host["unknown"], *undetermined]


def _finding(finding: dict[str, Any], say: Callable[[str], str]) -> list[str]:
    waiver, units = finding["waiver"], finding["units"]
    accepted = ""
    if waiver:
        end = say("expired" if waiver["expired"] else "until")
        accepted = f"{end} {text(waiver['until'])}, {text(waiver['owner'])}: {text(waiver['reason'])}"
    return [
        text(finding["id"]),
        say(_shown(finding)),
        text(f"{finding['package']} {finding['version']}"),
        text(finding["fixed"]),
        say("cannot be seen") if units is None else text(", ".join(units)),
        accepted,
    ]


def _shown(finding: dict[str, Any]) -> str:
    """The severity of an open finding, the state of another one, in words of the page."""
    if finding["state"] == OPEN:
        return str(finding["severity"])
    return "Unknown" if finding["state"] == UNKNOWN else str(finding["state"])
