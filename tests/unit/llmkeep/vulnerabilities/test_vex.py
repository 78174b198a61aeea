"""A scan as VEX, which CycloneDX's own schema judges."""

import json
from pathlib import Path
from typing import Any

import bundle_with_advisories
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from scanned_estate import MARKED, NOW, scan, text, waiver

from llmkeep.vulnerabilities import vex
from llmkeep.vulnerabilities.waivers import Waiver


def exported(folder: Path, *waivers: Waiver) -> dict[str, Any]:
    bundle = bundle_with_advisories.write(folder, NOW, more=(MARKED,))
    made = vex.document(scan(bundle, *waivers, llm1=text(), llm2=text(python=[])))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made.decode()) is None
    document: dict[str, Any] = json.loads(made)
    return document


def analysis(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each["analysis"] for each in document["vulnerabilities"] if each["id"] == name]
    assert isinstance(found, dict)
    return found


def test_an_open_finding_is_in_triage_and_its_fix_is_named(tmp_path: Path) -> None:
    document = exported(tmp_path)
    assert analysis(document, "CVE-2099-0001") == {"state": "in_triage", "response": ["update"]}
    (found,) = [each for each in document["vulnerabilities"] if each["id"] == "CVE-2099-0001"]
    assert found["recommendation"] == "Update to 3.5.1-1+deb13u1"
    references = {each["bom-ref"] for each in document["components"]}
    assert len(found["affects"]) == 2
    assert {each["ref"] for each in found["affects"]} <= references


def test_an_accepted_risk_names_owner_reason_and_end(tmp_path: Path) -> None:
    found = analysis(exported(tmp_path, waiver("2099-03-31")), "CVE-2099-0001")
    assert found == {
        "state": "exploitable",
        "response": ["will_not_fix"],
        "detail": "No such client is let in. Accepted by ops@example.org until 2099-03-31.",
    }


def test_a_host_that_is_not_affected_says_why(tmp_path: Path) -> None:
    entry = {"state": "not_affected", "justification": "code_not_reachable", "hosts": ("llm1", "llm2")}
    found = analysis(exported(tmp_path, Waiver(**{**vars(waiver("2099-03-31")), **entry})), "CVE-2099-0001")
    assert (found["state"], found["justification"]) == ("not_affected", "code_not_reachable")


def test_an_expired_waiver_leaves_it_in_triage_and_is_named(tmp_path: Path) -> None:
    found = analysis(exported(tmp_path, waiver("2099-01-31")), "CVE-2099-0001")
    assert found["state"] == "in_triage"
    assert found["detail"] == "The waiver of ops@example.org expired on 2099-01-31."


def test_the_same_scan_gives_the_same_bytes(tmp_path: Path) -> None:
    assert exported(tmp_path) == exported(tmp_path)


def test_the_schema_refuses_a_state_that_it_does_not_have(tmp_path: Path) -> None:
    broken = json.dumps(exported(tmp_path)).replace('"in_triage"', '"fine"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None
