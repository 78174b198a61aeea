"""compliance-trestle, which programs of auditors are built on, reads the OSCAL of reports, and refuses what is none."""

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmkeep.record import report_oscal, standards
from llmproof.report import judged

ROOT = Path(__file__).resolve().parents[4]
PYTHON = ROOT / "bench/.venv-trestle/bin/python"
READ = """
import json, pathlib, sys
from trestle.oscal.assessment_results import AssessmentResults

def fault(path):
    try:
        AssessmentResults.oscal_read(pathlib.Path(path))
    except Exception as error:
        return str(error)

print(json.dumps({pathlib.Path(path).name: fault(path) for path in sys.argv[1:]}))
"""
SPOIL: dict[str, Callable[[dict[str, Any]], object]] = {
    "without a title": lambda result: result.pop("title"),
    "with one field more": lambda result: result.update(more=1),
    "with an identifier that is none": lambda result: result["findings"][0].update(uuid="x"),
    "with a target that is none": lambda result: result["findings"][0]["target"].update({"target-id": "1 2"}),
    "with a time that is none": lambda result: result["observations"][0].update(collected="yesterday"),
}

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no compliance-trestle: `make peers PEER=trestle` installs it"
)


def assessment(standard: str) -> dict[str, Any]:
    """The assessment results of a standard, on a host whose every state differs and whose texts are odd, and on a silent one."""
    states = ["ok", "failed", "error", "accepted", "not enforceable"]
    odd = " <b>\n\t 中文 \x1b\u202e "
    checks = [
        {"id": f"base.{number}", "title": odd, "expected": odd, "observed": "", "state": state}
        for number, state in enumerate(states)
    ]
    host = {"answers": True, "roles": ["base"], "verified": ["base"], "checks": checks}
    document: dict[str, Any] = {
        "standard": standards.read(ROOT, standard),
        "conditional": [],
        "control_node": "ops1",
        "begun": "2027-01-31T08:00:00Z",
        "ended": "2027-01-31T08:01:00Z",
        "bundle_serial": None,
        "tree_revision": "unknown",
        "hosts": {"llm1": host, "llm2": {"answers": False, "roles": [], "verified": [], "checks": []}},
    }
    document["standard"]["controls"][0] |= {"title": odd, "checks": ["base.0", "base.1"]}
    return report_oscal.results(document, judged(document), datetime(2027, 1, 31, 9, tzinfo=UTC))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What trestle says is wrong with a report on each standard, and with a spoilt one of each kind: None where nothing is."""
    folder = tmp_path_factory.mktemp("oscal")
    for standard in standards.names(ROOT):
        (folder / standard).with_suffix(".json").write_text(json.dumps(assessment(standard)))
    for name, spoil in SPOIL.items():
        document = assessment("gb-t-22239")
        spoil(document["assessment-results"]["results"][0])
        (folder / f"{name}.json").write_text(json.dumps(document))
    argv = [str(PYTHON), "-c", READ, *map(str, folder.iterdir())]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("standard", standards.names(ROOT))
def test_trestle_reads_a_report_on_each_standard(standard: str, faults: dict[str, str | None]) -> None:
    assert faults[f"{standard}.json"] is None


@pytest.mark.parametrize("name", SPOIL)
def test_trestle_refuses_what_is_no_assessment(name: str, faults: dict[str, str | None]) -> None:
    assert faults[f"{name}.json"]
