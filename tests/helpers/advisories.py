"""Databases of made-up vulnerabilities in the real schemas: Debian's tracker (JSON) and OSV (a zip of JSON).

No advisory here exists: their numbers are of the year 2099.
"""

import io
import json
import zipfile
from typing import Any

TRACKER: dict[str, Any] = {
    "openssl": {
        "CVE-2099-0001": {
            "description": "A remote client crashes the server.",
            "debianbug": 9900001,
            "scope": "remote",
            "releases": {
                "bookworm": {
                    "status": "open",
                    "repositories": {"bookworm": "3.0.17-1"},
                    "urgency": "not yet assigned",
                },
                "sid": {
                    "status": "resolved",
                    "repositories": {"sid": "3.5.4-2"},
                    "fixed_version": "3.5.4-2",
                    "urgency": "not yet assigned",
                },
                "trixie": {
                    "status": "resolved",
                    "repositories": {"trixie": "3.5.1-1", "trixie-security": "3.5.1-1+deb13u1"},
                    "fixed_version": "3.5.1-1+deb13u1",
                    "urgency": "high**",
                },
            },
        },
        "CVE-2099-0002": {
            "scope": "local",
            "releases": {
                "trixie": {
                    "status": "open",
                    "repositories": {"trixie": "3.5.1-1"},
                    "urgency": "low",
                    "nodsa": "Minor issue",
                    "nodsa_reason": "postponed",
                }
            },
        },
        "CVE-2099-0003": {
            "releases": {
                "trixie": {
                    "status": "open",
                    "repositories": {"trixie": "3.5.1-1"},
                    "urgency": "unimportant",
                }
            },
        },
        "TEMP-0000000-9A1B2C": {
            "releases": {
                "trixie": {
                    "status": "undetermined",
                    "repositories": {"trixie": "3.5.1-1"},
                    "urgency": "not yet assigned",
                }
            },
        },
        "CVE-2099-0004": {
            "releases": {
                "trixie": {
                    "status": "resolved",
                    "repositories": {"trixie": "3.5.1-1"},
                    "fixed_version": "0",
                    "urgency": "medium",
                }
            },
        },
    },
    "linux": {
        "CVE-2099-0005": {
            "releases": {
                "sid": {"status": "resolved", "fixed_version": "7.2.12-1", "urgency": "not yet assigned"},
                "trixie": {
                    "status": "resolved",
                    "repositories": {"trixie": "6.12.73-1"},
                    "fixed_version": "6.12.74-1",
                    "urgency": "medium",
                },
            }
        }
    },
    "oldpackage": {
        "CVE-2099-0006": {
            "releases": {"bookworm": {"status": "open", "urgency": "not yet assigned"}},
        }
    },
}
JINJA: dict[str, Any] = {
    "schema_version": "1.7.3",
    "id": "GHSA-9999-9999-9999",
    "aliases": ["CVE-2099-0010"],
    "modified": "2099-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "Jinja2", "purl": "pkg:pypi/jinja2"},
            "ranges": [
                {
                    "type": "ECOSYSTEM",
                    "events": [{"introduced": "0"}, {"fixed": "2.11.3"}, {"introduced": "3.0rc1"}, {"fixed": "3.1.5"}],
                }
            ],
        }
    ],
    "database_specific": {"severity": "CRITICAL"},
}  # fmt: skip
JINJA_AGAIN: dict[str, Any] = {
    "id": "PYSEC-2099-1",
    "aliases": ["CVE-2099-0010", "GHSA-9999-9999-9999"],
    "modified": "2099-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "jinja2", "purl": "pkg:pypi/jinja2"},
            "ranges": [{"type": "GIT", "repo": "https://example.org/", "events": [{"introduced": "0"}]}],
            "versions": ["3.1.4"],
        }
    ],
}
MARKED: dict[str, Any] = {
    "id": "GHSA-8888-8888-8888",
    "modified": "2099-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"ecosystem": "npm", "name": "marked", "purl": "pkg:npm/marked"},
            "ranges": [{"type": "SEMVER", "events": [{"introduced": "18.0.0"}, {"last_affected": "18.2.1"}]}],
        }
    ],
    "database_specific": {"severity": "MODERATE"},
}


def tracker(document: dict[str, Any] = TRACKER) -> bytes:
    """Debian's tracker as it is served."""
    return json.dumps(document, separators=(",", ":")).encode()


def archive(*records: dict[str, Any]) -> bytes:
    """An archive as OSV has one for each ecosystem."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for record in records:
            file.writestr(f"{record['id']}.json", json.dumps(record))
    return packed.getvalue()
