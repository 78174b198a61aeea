"""Findings on components, by made-up advisories in the real schemas."""

import copy
import json
from datetime import UTC, datetime
from typing import Any

import advisories
import pytest

from llmkeep.vulnerabilities import database, matching
from llmkeep.vulnerabilities.model import Component, Finding, Host

NOW = datetime(2099, 2, 1, tzinfo=UTC)
TRIXIE = "debian trixie"


def tracker(document: dict[str, Any] = advisories.TRACKER) -> dict[str, database.Database]:
    return {"debian": database.parse("debian", advisories.tracker(document), NOW, "")}


def pypi(*records: dict[str, Any]) -> dict[str, database.Database]:
    return {"pypi": database.parse("pypi", advisories.archive(*records), NOW, "")}


def deb(name: str, source: str, version: str, own: str = "") -> Component:
    return Component("debian", name, own or version, source, version, units=("nginx.service",))


def scan(*components: Component, release: str = TRIXIE, vendors: frozenset[str] = frozenset()) -> Host:
    return matching.host(components, tracker(), {}, release, vendors)


def states(findings: list[Finding]) -> dict[str, str]:
    return {each.id: each.state for each in findings}


def test_an_older_version_has_what_the_release_fixed_later() -> None:
    found = scan(deb("libssl3t64", "openssl", "3.5.1-1"), deb("openssl", "openssl", "3.5.1-1"))
    assert states(found.findings) == {
        "CVE-2099-0001": "open",
        "CVE-2099-0002": "open",
        "CVE-2099-0003": "unimportant",
        "TEMP-0000000-9A1B2C": "undetermined",
    }
    first = found.findings[0]
    assert (first.id, first.severity, first.fixed) == ("CVE-2099-0001", "high", "3.5.1-1+deb13u1")
    assert (first.packages, first.units) == (("libssl3t64", "openssl"), ("nginx.service",))
    assert not found.unknown


def test_a_fixed_version_has_it_no_more() -> None:
    assert "CVE-2099-0001" not in states(scan(deb("openssl", "openssl", "3.5.1-1+deb13u1")).findings)


def test_why_debian_made_no_advisory_is_told() -> None:
    notes = {each.id: each.note for each in scan(deb("openssl", "openssl", "3.5.1-1")).findings}
    assert notes["CVE-2099-0002"] == "postponed: Minor issue"


def test_a_version_that_is_none_is_unknown_and_not_clean() -> None:
    found = scan(deb("openssl", "openssl", "3.5.1_1"))
    assert states(found.findings)["CVE-2099-0001"] == "unknown"
    assert found.unknown == ["openssl 3.5.1_1, CVE-2099-0001: '3.5.1_1' is not a Debian version"]


def test_a_package_that_the_release_does_not_have_is_unknown() -> None:
    found = scan(deb("oldpackage", "oldpackage", "1.0-1"))
    assert found.unknown == ["oldpackage 1.0-1, CVE-2099-0006: the database has no status for it in trixie"]


@pytest.mark.parametrize("release", ["debian forky", "ubuntu trixie", "debian", ""])
def test_the_database_of_another_distribution_says_nothing(release: str) -> None:
    found = scan(deb("openssl", "openssl", "3.5.1-1"), release=release)
    assert not found.findings
    assert found.unknown == [
        f"the database of debian has no release {release!r}: it is for another distribution or period"
    ]


@pytest.mark.parametrize(("own", "fixed"), [("6.12.73-1", False), ("6.12.74-1", True), ("6.12.100-1", True)])
def test_a_signed_kernel_is_judged_by_the_version_of_its_binary(own: str, fixed: bool) -> None:
    signed = deb("linux-image-6.12-amd64", "linux-signed-amd64", own.replace("-", "+"), own)
    assert (scan(signed).findings == []) == fixed


@pytest.mark.parametrize(("version", "fixed"), [("7.2.10-1~bpo13+1", False), ("7.3.4-1~bpo13+1", True)])
def test_a_backport_is_judged_by_unstables_fix(version: str, fixed: bool) -> None:
    assert (scan(deb("linux-image-amd64", "linux", version)).findings == []) == fixed


def test_a_vendors_package_and_a_signed_image_are_named_as_not_covered() -> None:
    found = scan(
        deb("cuda-driver", "openssl", "1.0-1"),
        deb("grub-efi-amd64-signed", "grub-efi-amd64-signed", "1+2.12+9"),
        vendors=frozenset({"cuda-driver"}),
    )
    assert found.uncovered == ["cuda-driver 1.0-1", "grub-efi-amd64-signed 1+2.12+9"]
    assert not found.findings


@pytest.mark.parametrize("state", [{"status": "fixed?"}, {"status": "resolved"}, {}, []])
def test_a_state_that_the_tracker_does_not_have_is_unknown(state: object) -> None:
    document = copy.deepcopy(advisories.TRACKER)
    document["openssl"] = {"CVE-2099-0001": {"releases": {"trixie": state}}}
    found = matching.host([deb("openssl", "openssl", "3.5.1-1")], tracker(document), {}, TRIXIE)
    assert len(found.unknown) == 1


def test_records_on_one_vulnerability_are_one_finding_under_its_cve() -> None:
    component = Component("pypi", "jinja2", "3.1.4", place="/opt/llmkeep/current")
    found = matching.host([component], pypi(advisories.JINJA_AGAIN, advisories.JINJA), {}, TRIXIE)
    (finding,) = found.findings
    assert (finding.id, finding.severity, finding.fixed) == ("CVE-2099-0010", "critical", "3.1.5")
    assert finding.aliases == ("GHSA-9999-9999-9999", "PYSEC-2099-1")


@pytest.mark.parametrize(
    ("version", "hit"),
    [
        ("2.11.2", True),
        ("2.11.3", False),
        ("2.12", False),
        ("3.0rc1", True),
        ("3.1.4", True),
        ("3.1.5", False),
    ],
)
def test_a_range_is_evaluated_as_osv_describes_it(version: str, hit: bool) -> None:
    found = matching.host([Component("pypi", "Jinja2", version)], pypi(advisories.JINJA), {}, TRIXIE)
    assert bool(found.findings) == hit


@pytest.mark.parametrize(("version", "hit"), [("17.9.9", False), ("18.2.1", True), ("18.2.2", False)])
def test_the_last_affected_version_is_affected(version: str, hit: bool) -> None:
    databases = {"npm": database.parse("npm", advisories.archive(advisories.MARKED), NOW, "")}
    found = matching.host([Component("npm", "marked", version)], databases, {}, TRIXIE)
    assert [each.severity for each in found.findings] == ["medium"] * hit


def test_a_distribution_whose_version_is_none_is_unknown() -> None:
    found = matching.host([Component("pypi", "jinja2", "main")], pypi(advisories.JINJA), {}, TRIXIE)
    assert found.unknown == ["jinja2 main, CVE-2099-0010: 'main' is not a Python version"]


def test_a_withdrawn_record_counts_no_more() -> None:
    withdrawn = advisories.JINJA | {"withdrawn": "2099-01-02T00:00:00Z"}
    databases = pypi(withdrawn, advisories.JINJA_AGAIN)
    found = matching.host([Component("pypi", "jinja2", "2.0")], databases, {}, TRIXIE)
    assert not found.findings


def test_without_a_database_what_it_is_for_is_unknown() -> None:
    found = matching.host([Component("pypi", "jinja2", "3.1.4")], {}, {"pypi": "there is none"}, TRIXIE)
    assert found.unknown == ["there is none"]


@pytest.mark.parametrize(
    ("ecosystem", "content", "message"),
    [
        ("debian", b"", "cannot be read"),
        ("debian", advisories.tracker()[:-20], "cannot be read"),
        ("debian", b"{}", "is empty"),
        ("debian", b'{"openssl": {}}', "is empty"),
        ("debian", b"[1]", "cannot be read"),
        ("debian", json.dumps({"openssl": {"CVE-2099-1": {}}}).encode(), "cannot be read"),
        ("debian", json.dumps({"openssl": {"CVE-2099-1": {"releases": 3}}}).encode(), "cannot be read"),
        ("pypi", b"", "cannot be read"),
        ("pypi", advisories.archive(advisories.JINJA)[:-9], "cannot be read"),
        ("pypi", advisories.archive(), "is empty"),
        ("pypi", advisories.archive(advisories.MARKED), "is empty"),
        ("npm", advisories.archive({"id": "x"}), "cannot be read"),
    ],
)
def test_a_database_that_is_none_is_refused(ecosystem: str, content: bytes, message: str) -> None:
    with pytest.raises(database.Unusable, match=f"the database of {ecosystem} {message}"):
        database.parse(ecosystem, content, NOW, "")


@pytest.mark.parametrize(
    ("day", "message"), [(1, "31 days old, and 30 is the limit"), (None, "set the clock")]
)
def test_an_old_database_and_one_of_the_future_are_not_relied_on(day: int | None, message: str) -> None:
    date = datetime(2099, 1, day, tzinfo=UTC) if day else datetime(2099, 2, 2, tzinfo=UTC)
    with pytest.raises(database.Unusable, match=message):
        database.Database("debian", date, "", {}).require_recent(NOW, 30)
