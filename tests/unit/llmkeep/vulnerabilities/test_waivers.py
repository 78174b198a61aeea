"""Waivers: files that an estate writes by hand."""

import datetime
from pathlib import Path

import pytest

from llmkeep.vulnerabilities import waivers
from llmkeep.vulnerabilities.model import Finding

GOOD = """
- id: CVE-2099-0001
  package: openssl
  reason: The edge refuses such clients.
  owner: ops@example.org
  until: 2099-03-31
"""
DAY = datetime.date(2099, 3, 31)
FINDING = Finding("CVE-2099-0001", "debian", "openssl", "3.5.1-1", "high", "open")


def read(folder: Path, text: str) -> list[waivers.Waiver]:
    (folder / "a.yml").write_text(text)
    return waivers.read(folder)


def test_a_waiver_holds_to_the_end_of_its_last_day(tmp_path: Path) -> None:
    (waiver,) = read(tmp_path, GOOD)
    assert waiver.covers("llm1", FINDING)
    assert not waiver.expired(DAY)
    assert waiver.expired(DAY + datetime.timedelta(days=1))


def test_a_waiver_covers_its_hosts_and_its_package_alone(tmp_path: Path) -> None:
    (waiver,) = read(tmp_path, GOOD + "  hosts: [llm1]\n")
    assert waiver.covers("llm1", FINDING)
    assert not waiver.covers("llm2", FINDING)
    assert not waiver.covers("llm1", Finding("CVE-2099-0001", "debian", "gnutls28", "1", "high", "open"))


def test_what_could_not_be_compared_cannot_be_waived(tmp_path: Path) -> None:
    (waiver,) = read(tmp_path, GOOD)
    assert not waiver.covers("llm1", Finding("CVE-2099-0001", "debian", "openssl", "?", "high", "unknown"))


def test_an_alias_is_the_same_vulnerability(tmp_path: Path) -> None:
    (waiver,) = read(tmp_path, GOOD.replace("CVE-2099-0001", "GHSA-1"))
    named = Finding("CVE-2099-0001", "debian", "openssl", "3", "high", "open", aliases=("GHSA-1",))
    assert waiver.covers("llm1", named)


def test_of_two_waivers_the_one_that_holds_counts(tmp_path: Path) -> None:
    both = read(tmp_path, GOOD.replace("2099-03-31", "2099-01-01") + GOOD)
    covering = waivers.waiver_of(both, "llm1", FINDING, DAY)
    assert covering is not None
    assert covering.until == DAY


def test_without_a_folder_there_is_no_waiver(tmp_path: Path) -> None:
    assert waivers.read(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "write a list"),
        ("- x", "is not a mapping"),
        ("- [", "is not YAML"),
        (GOOD.replace("2099-03-31", "soon"), "has until 'soon': write a day"),
        (GOOD.replace("2099-03-31", "2099-03-31 12:00:00"), "write a day"),
        (GOOD.replace("owner: ops@example.org", "owner: ' '"), "has no owner"),
        (GOOD.replace("  reason: The edge refuses such clients.\n", ""), "has no reason"),
        (GOOD + "  untill: 2099-01-01\n", "has untill, which is unknown"),
        (GOOD + "  hosts: llm1\n", "has hosts 'llm1': write a list"),
        (GOOD + "  hosts: []\n", r"has hosts \[\]: write a list"),
        (GOOD + "  state: fine\n", "has the state 'fine': take one of"),
        (GOOD + "  state: not_affected\n", "has the justification ''"),
        (GOOD + "  justification: code_not_present\n", "has the justification 'code_not_present'"),
    ],
)
def test_a_waiver_that_lacks_something_is_refused_by_its_file(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(waivers.WaiverRefused, match=message) as refusal:
        read(tmp_path, text)
    assert "a.yml" in str(refusal.value)
