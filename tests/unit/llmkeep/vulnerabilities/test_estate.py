"""The scan of an estate, by what hosts print and by a bundle's databases of made-up vulnerabilities."""

import datetime
from pathlib import Path

import advisories
import bundle_with_advisories
import pytest
from scanned_estate import MARKED, NOW, scan, text, waiver

from llmkeep.vulnerabilities import estate


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_with_advisories.write(tmp_path / "bundle", NOW, more=(MARKED,))


def test_a_host_has_what_all_three_databases_know(bundle: Path) -> None:
    (host,) = scan(bundle, llm1=text())["hosts"].values()
    assert {each["id"]: each["state"] for each in host["findings"]} == {
        "CVE-2099-0010": "open",
        "CVE-2099-0001": "open",
        "GHSA-8888-8888-8888": "open",
        "CVE-2099-0002": "open",
        "CVE-2099-0003": "unimportant",
        "TEMP-0000000-9A1B2C": "undetermined",
    }
    assert estate.counts(host) == {"critical": 1, "high": 1, "medium": 1, "low": 1, "unassigned": 0}


def test_a_waiver_takes_a_finding_from_the_open_ones_and_stays_with_it(bundle: Path) -> None:
    (host,) = scan(bundle, waiver("2099-02-01"), llm1=text())["hosts"].values()
    assert estate.counts(host)["high"] == 0
    (waived,) = [each["waiver"] for each in host["findings"] if each["waiver"]]
    assert (waived["owner"], waived["until"], waived["expired"]) == ("ops@example.org", "2099-02-01", False)


def test_an_expired_waiver_waives_nothing(bundle: Path) -> None:
    (host,) = scan(bundle, waiver("2099-01-31"), llm1=text())["hosts"].values()
    assert estate.counts(host)["high"] == 1
    assert [each["waiver"]["expired"] for each in host["findings"] if each["waiver"]] == [True]


def test_what_is_undetermined_is_unknown_until_an_owner_accepts_it(bundle: Path) -> None:
    assert not estate.complete(scan(bundle, llm1=text()))
    assert estate.complete(scan(bundle, waiver("2099-03-01", "TEMP-0000000-9A1B2C"), llm1=text()))


def test_a_host_that_does_not_answer_is_unknown(bundle: Path) -> None:
    document = scan(bundle, waiver("2099-03-01", "TEMP-0000000-9A1B2C"), llm1=text(), llm2=None)
    assert document["hosts"]["llm2"]["unknown"] == ["it did not answer"]
    assert not estate.complete(document)


def test_without_hosts_a_scan_is_not_complete(bundle: Path) -> None:
    assert not estate.complete(scan(bundle))


@pytest.mark.parametrize("place", ["nothing", None])
def test_without_a_bundle_everything_is_unknown(tmp_path: Path, place: str | None) -> None:
    document = scan(tmp_path / place if place else None, llm1=text())
    (host,) = document["hosts"].values()
    assert not host["findings"]
    assert len(host["unknown"]) == 2
    assert "so there is no database: name one with --database" in host["unknown"][0]


def test_without_one_database_what_it_is_for_is_unknown(tmp_path: Path) -> None:
    files = {
        path: content for path, content in bundle_with_advisories.DATABASES.items() if "pypi" not in path
    }
    document = scan(bundle_with_advisories.write(tmp_path, NOW, files, (MARKED,)), llm1=text())
    (host,) = document["hosts"].values()
    (sentence,) = host["unknown"]
    assert "has no database of pypi: its builder did not reach the source" in sentence
    assert len(host["findings"]) == 5


def test_an_old_database_still_shows_what_it_has_and_is_unknown(bundle: Path) -> None:
    bundle_with_advisories.write(bundle, NOW - datetime.timedelta(days=31))
    (host,) = scan(bundle, llm1=text(scripts=[]))["hosts"].values()
    assert estate.counts(host)["high"] == 1
    assert [sentence.partition(",")[0] for sentence in host["unknown"]] == [
        f"the database of {name} is of 2099-01-01" for name in ("debian", "pypi")
    ]


def test_a_database_that_was_changed_in_place_is_not_read(bundle: Path) -> None:
    (bundle / "vulnerabilities/debian.json").write_bytes(advisories.tracker({"a": {}}))
    (host,) = scan(bundle, llm1=text())["hosts"].values()
    assert "debian.json has sha256" in host["unknown"][0]


def test_a_database_without_a_date_is_not_relied_on(bundle: Path) -> None:
    path = bundle / "MANIFEST.json"
    path.write_text(path.read_text().replace("pkg:generic/x@2099-02-01T00:00:00Z", "pkg:generic/x"))
    (host,) = scan(bundle, llm1=text())["hosts"].values()
    assert "has no date in its package URL" in host["unknown"][0]


def test_units_that_run_replaced_files_leave_unknown_what_they_run(bundle: Path) -> None:
    (host,) = scan(bundle, llm1=text(replaced=["nginx.service"]))["hosts"].values()
    assert host["unknown"] == ["nginx.service runs files that were replaced since: restart it"]


def test_a_script_that_the_bundle_does_not_have_is_not_covered(bundle: Path) -> None:
    (host,) = scan(bundle, llm1=text(scripts=[["marked.esm.js", "6" * 64, "/opt/x"]]))["hosts"].values()
    assert host["uncovered"] == [f"marked.esm.js with SHA-256 {'6' * 64}"]


@pytest.mark.parametrize(
    "changed",
    [
        {"packages": [["<script>alert(1)</script>", "1", "a", "1", []]]},
        {"packages": [["a", "1\x1b[2J", "a", "1", []]]},
        {"packages": [["a", "1", "a", "1", ["x y"]]]},
        {"packages": [["a", "1", "a", "1"]]},
        {"packages": [["a", 1, "a", "1", []]]},
        {"packages": []},
        {"packages": {}},
        {"python": [["../../etc", "1", "/opt", None]]},
        {"python": [["a", "1", "/opt/a\nb", None]]},
        {"scripts": [["a", "5", "/opt"]]},
        {"release": "debian\ntrixie"},
        {"release": ["debian"]},
        {"replaced": "nginx"},
        {"replaced": 3},
    ],
)
def test_an_answer_that_is_no_list_of_software_is_unknown(bundle: Path, changed: dict[str, object]) -> None:
    (host,) = scan(bundle, llm1=text(**changed))["hosts"].values()
    (sentence,) = host["unknown"]
    assert sentence.startswith("its answer is not a list of software (")
    assert sentence.endswith("): examine that host")
    assert not host["findings"]


@pytest.mark.parametrize("printed", ["", "{", "[]", "null", "[" * 100_000])
def test_an_answer_that_is_no_document_is_unknown(bundle: Path, printed: str) -> None:
    (host,) = scan(bundle, llm1=printed)["hosts"].values()
    assert len(host["unknown"]) == 1
