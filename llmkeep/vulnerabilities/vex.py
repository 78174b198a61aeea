"""A scan as CycloneDX VEX: each finding's analysis, with who accepted it until when."""

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from llmkeep.vulnerabilities.estate import is_open
from llmkeep.vulnerabilities.model import DEBIAN, UNASSIGNED, UNIMPORTANT
from llmkeep.vulnerabilities.waivers import ACCEPTED

SOURCES = {
    "debian": ("Debian Security Tracker", "https://security-tracker.debian.org/tracker/"),
    "pypi": ("OSV", "https://osv.dev/vulnerability/"),
    "npm": ("OSV", "https://osv.dev/vulnerability/"),
}


def purl(finding: Mapping[str, Any]) -> Any:
    """Package URL of the component that a finding is about."""
    from packageurl import PackageURL

    namespace, _, name = finding["package"].rpartition("/")
    if finding["ecosystem"] == DEBIAN:
        return PackageURL("deb", "debian", name, finding["version"], {"arch": "source"})
    return PackageURL(finding["ecosystem"], namespace or None, name, finding["version"])


def document(scan: Mapping[str, Any]) -> bytes:
    """The VEX of a scan (its document): the same scan gives the same bytes."""
    from cyclonedx.model.bom import Bom, BomMetaData  # 0.05 s: not for the rest of the program
    from cyclonedx.output.json import JsonV1Dot6

    components: dict[str, Any] = {}
    vulnerabilities: dict[str, tuple[Mapping[str, Any], dict[str, Any], list[str]]] = {}
    for host, each in scan["hosts"].items():
        for finding in each["findings"]:
            reference = f"{host}/{purl(finding).to_string()}"
            components[reference] = _component(host, reference, finding)
            analysis = _analysis(finding)
            key = json.dumps([finding["id"], finding["ecosystem"], finding["severity"], analysis])
            vulnerabilities.setdefault(key, (finding, analysis, []))[2].append(reference)
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(scan, sort_keys=True)),
        metadata=BomMetaData(timestamp=datetime.fromisoformat(scan["time"])),
        components=components.values(),
        vulnerabilities=[
            _vulnerability(f"finding-{number}", *each)
            for number, each in enumerate(vulnerabilities.values(), 1)
        ],
    )
    made = json.loads(JsonV1Dot6(bom).output_as_string())
    made.pop("dependencies", None)
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def _component(host: str, reference: str, finding: Mapping[str, Any]) -> Any:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.LIBRARY,
        name=finding["package"],
        version=finding["version"],
        bom_ref=reference,
        purl=purl(finding),
        properties=[Property(name="llmkeep:host", value=host)],
    )


def _analysis(finding: Mapping[str, Any]) -> dict[str, Any]:
    """State, justification, responses and detail, as CycloneDX names them."""
    waiver = finding["waiver"]
    if waiver and not waiver["expired"]:
        detail = f"{waiver['reason']} Accepted by {waiver['owner']} until {waiver['until']}."
        responses = ["will_not_fix"] if waiver["state"] == ACCEPTED else []
        return {
            "state": waiver["state"],
            "justification": waiver["justification"],
            "response": responses,
            "detail": detail,
        }
    notes = [finding["note"]] if finding["note"] else []
    if waiver:
        notes.append(f"The waiver of {waiver['owner']} expired on {waiver['until']}.")
    state = "not_affected" if finding["state"] == UNIMPORTANT else "in_triage"
    if finding["state"] == UNIMPORTANT:
        notes.append("Debian judges that it has no security impact.")
    return {
        "state": state,
        "justification": "",
        "response": ["update"] if is_open(finding) and finding["fixed"] else [],
        "detail": " ".join(notes),
    }


def _vulnerability(
    reference: str, finding: Mapping[str, Any], analysis: dict[str, Any], references: list[str]
) -> Any:
    from cyclonedx.model import XsUri
    from cyclonedx.model.impact_analysis import (
        ImpactAnalysisJustification,
        ImpactAnalysisResponse,
        ImpactAnalysisState,
    )
    from cyclonedx.model.vulnerability import (
        BomTarget,
        Vulnerability,
        VulnerabilityAnalysis,
        VulnerabilityRating,
        VulnerabilitySeverity,
        VulnerabilitySource,
    )

    name, url = SOURCES[finding["ecosystem"]]
    source = VulnerabilitySource(name=name, url=XsUri(url + quote(finding["id"], safe="")))
    severity = VulnerabilitySeverity("unknown" if finding["severity"] == UNASSIGNED else finding["severity"])
    justification = analysis["justification"]
    return Vulnerability(
        bom_ref=reference,
        id=finding["id"],
        source=source,
        ratings=[VulnerabilityRating(source=source, severity=severity)],
        recommendation=f"Update to {finding['fixed']}" if finding["fixed"] else None,
        analysis=VulnerabilityAnalysis(
            state=ImpactAnalysisState(analysis["state"]),
            justification=ImpactAnalysisJustification(justification) if justification else None,
            responses=[ImpactAnalysisResponse(each) for each in analysis["response"]],
            detail=analysis["detail"] or None,
        ),
        affects=[BomTarget(ref=reference) for reference in references],
    )
