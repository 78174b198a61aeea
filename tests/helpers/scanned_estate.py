"""A scan of hosts that print what a test says, by a bundle's databases of made-up vulnerabilities."""

import datetime
import json
from pathlib import Path
from typing import Any

import bundle_with_advisories

from llmkeep.vulnerabilities import estate
from llmkeep.vulnerabilities.waivers import Waiver

NOW = datetime.datetime(2099, 2, 1, tzinfo=datetime.UTC)
SHA = "5" * 64
HOST: dict[str, Any] = {
    "release": "debian trixie",
    "kernel": "6.12.73",
    "packages": [["libssl3t64", "3.5.1-1", "openssl", "3.5.1-1", ["nginx.service"]]],
    "python": [["Jinja2", "3.1.4", "/opt/llmkeep/releases/abc", None]],
    "scripts": [["marked.esm.js", SHA, "/opt/llmkeep/releases/abc"]],
    "replaced": [],
}
MARKED = bundle_with_advisories.entry("tree/marked.esm.js", SHA, "pkg:npm/marked@18.2.1")


def scan(bundle: Path | None, *waivers: Waiver, days: int = 30, **hosts: str | None) -> dict[str, Any]:
    """The document, by what hosts print."""
    return estate.scan(hosts, bundle, NOW, days, waivers)


def text(**changed: object) -> str:
    """What a host prints."""
    return json.dumps(HOST | changed)


def waiver(until: str, name: str = "CVE-2099-0001", package: str = "openssl") -> Waiver:
    """A waiver of an accepted risk until a day."""
    return Waiver(
        name, package, "No such client is let in.", "ops@example.org", datetime.date.fromisoformat(until)
    )
