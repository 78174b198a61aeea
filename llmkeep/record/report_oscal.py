"""A report as OSCAL assessment results (pages.nist.gov/OSCAL), for programs that read those."""

import uuid
from datetime import datetime
from typing import Any

from llmkeep.errors import printable
from llmproof.report import MET

VERSION = "1.1.2"
NAMESPACE = uuid.UUID(
    "b3f7f6ce-6f0a-4a39-9d43-6d1c0b6a2a55"
)  # of the identifiers here, which follow from names
SYSTEM = "https://llmkeep.invalid/ns/oscal"  # of our properties


def results(document: dict[str, Any], verdicts: list[dict[str, Any]], now: datetime) -> dict[str, Any]:
    """The assessment results: an observation for each check on each host, a finding for each control.

    A finding is satisfied only where its control is met.
    """
    stamp, time = now.isoformat(), document["ended"]
    standard, hosts = document["standard"], document["hosts"]

    def identifier(*names: object) -> str:
        return str(uuid.uuid5(NAMESPACE, "\0".join(map(str, (standard["id"], stamp, *names)))))

    observations = [
        {
            "uuid": identifier("check", host, number),
            "title": _token(check["title"]) or check["id"],
            "description": _token(f"{check['id']} on {host}: {check['state']}"),
            "methods": ["TEST"],
            "props": [
                {"name": "state", "ns": SYSTEM, "value": check["state"].replace(" ", "-")},
                {"name": "check", "ns": SYSTEM, "value": _token(check["id"]) or "unnamed"},
            ],
            "subjects": [{"subject-uuid": identifier("host", host), "type": "inventory-item"}],
            "relevant-evidence": [
                {"description": printable(f"expected: {check['expected']}\nobserved: {check['observed']}")}
            ],
            "collected": time,
        }
        for host, each in hosts.items()
        for number, check in enumerate(each["checks"])
    ]
    places = {
        (check["id"], host): identifier("check", host, number)
        for host, each in hosts.items()
        for number, check in enumerate(each["checks"])
    }
    findings = []
    for control, each in zip(standard["controls"], verdicts, strict=True):
        related = [places[row["check"], row["host"]] for row in each["checks"]
                   if (row["check"], row["host"]) in places]  # fmt: skip
        finding: dict[str, Any] = {
            "uuid": identifier("finding", control["id"]),
            "title": _token(f"{control['id']} {control.get('title', '')}"),
            "description": f"{control['id']}: {each['verdict']}",
            "target": {
                "type": "objective-id",
                "target-id": f"c-{control['id']}".replace("(", ".").replace(")", ""),
                "status": {
                    "state": "satisfied" if each["verdict"] == MET else "not-satisfied",
                    "reason": each["verdict"].replace(" ", "-"),
                },
            },
        }
        if related:
            finding["related-observations"] = [{"observation-uuid": one} for one in dict.fromkeys(related)]
        findings.append(finding)
    result: dict[str, Any] = {
        "uuid": identifier("result"),
        "title": f"{standard['title']} {standard['version']}",
        "description": f"Mapping of checks to controls reviewed by {standard['reviewed_by']}",
        "start": document["begun"],
        "end": time,
        "reviewed-controls": {"control-selections": [{"include-all": {}}]},
        "findings": findings,
    }
    if hosts:
        items = [{"uuid": identifier("host", host), "description": _token(host)} for host in hosts]
        result["local-definitions"] = {"inventory-items": items}
    if observations:
        result["observations"] = observations
    return {
        "assessment-results": {
            "uuid": identifier("results"),
            "metadata": {
                "title": f"Checks of {document['control_node']}'s estate",
                "last-modified": stamp,
                "version": str(document["bundle_serial"] or document["tree_revision"]),
                "oscal-version": VERSION,
            },
            "import-ap": {"href": "#"},
            "results": [result],
        }
    }


def _token(text: str) -> str:
    """TEXT in one line, without control characters."""
    return " ".join(printable(text).split())
