"""Entries of `apt.sources`, and the rules they make, without apt."""

from pathlib import Path
from typing import Any

import pytest

from llmkeep.bundle import aptsources, lock
from llmkeep.bundle.aptsources import PackagesRefused
from llmkeep.errors import LlmkeepError


def test_what_apt_chose_is_looked_up_whatever_the_pins_say() -> None:
    debian = aptsources.parse("debian", {"suites": ["trixie"]})
    other = aptsources.parse(
        "other", {"uri": "https://a.example", "suites": ["/"], "packages": ["tool"], "licence": "x"}
    )
    offers = {
        debian: list(aptsources.offers("Package: libc6\nVersion: 1\nSHA256: 11\n")),
        other: list(
            aptsources.offers(
                "Package: libc6\nVersion: 2\nSHA256: 22\n\nPackage: tool\nVersion: 1\nSHA256: 33\n"
            )
        ),
    }
    rules = aptsources.Rules(offers)
    assert [rules.source(*each).name for each in (("libc6=1", "11"), ("tool=1", "33"))] == ["debian", "other"]
    for digest, name in (("22", "other"), ("44", "no source")):
        with pytest.raises(
            PackagesRefused, match=f"libc6=2 would come from {name}, which may not provide it"
        ):
            rules.source("libc6=2", digest)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"uri": "https://a.example", "suites": ["/"], "licence": "x"}, "lists no packages"),
        ({"uri": "https://a.example", "directory": "a", "licence": "x"}, "both a uri and a directory"),
        ({"uri": "https://a.example", "suites": ["/"], "packages": ["a"]}, "states no licence"),
        ({"directory": "a", "licence": "x"}, "names no files"),
        ({"suites": "trixie"}, "whose suites is 'trixie': write a list"),
        ({"components": ["main"]}, "names no suites"),
        (
            {"uri": "https://a.example", "suites": ["/"], "packages": "a"},
            "whose packages is 'a': write a list",
        ),
        ({"directory": "../a", "files": {"a.deb": "0"}, "licence": "x"}, r"names \.\./a: give a path below"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(entry: dict[str, Any], match: str) -> None:
    with pytest.raises(LlmkeepError, match=f"apt.sources has odd, .*{match}"):
        aptsources.parse("odd", entry)


def test_a_listed_package_s_bytes_do_not_pass_under_debian_s_name() -> None:
    debian = aptsources.parse("debian", {"suites": ["trixie"]})
    entry = {"uri": "https://a.example", "suites": ["/"], "packages": ["tool"], "licence": "x"}
    both = "Package: tool\nVersion: 1\nSHA256: 33\n\npackage: libc6\nversion: 99\nsha256: 33\n"
    offered = {
        debian: list(aptsources.offers("Package: libc6\nVersion: 1\nSHA256: 11\n")),
        aptsources.parse("other", entry): list(aptsources.offers(both)),
    }
    rules = aptsources.Rules(offered)
    assert "Package: libc6\nPin: version 99\nPin-Priority: -1\n" in rules.pins()
    with pytest.raises(PackagesRefused, match="libc6=99 would come from other, which may not provide it"):
        rules.source("libc6=99", "33")


def test_the_names_of_fields_have_no_case() -> None:
    (offer,) = aptsources.offers("package: tool\nVERSION: 1\nprovides: libc6 (= 9),\n other\nSha256: 33\n")
    assert (offer.identity, offer.claims) == (("tool=1", "33"), frozenset({"libc6", "other"}))


def test_a_source_s_name_is_no_path() -> None:
    with pytest.raises(LlmkeepError, match=r"apt.sources has \.\./a, which is not a valid source name"):
        aptsources.parse("../a", {"suites": ["trixie"]})


def test_every_source_of_artifacts_yml_reads_and_one_without_a_known_fingerprint_is_refused(
    tmp_path: Path,
) -> None:
    entries = lock.catalogue()["apt"]["sources"]
    sources = {name: aptsources.parse(name, entry) for name, entry in entries.items()}
    with pytest.raises(
        PackagesRefused, match=r"nvidia .* has the fingerprint '', which is not a key fingerprint"
    ):
        aptsources.keyring(sources["nvidia"], tmp_path)
    with pytest.raises(PackagesRefused, match=r"the key of the source elastic .* is missing: put"):
        aptsources.keyring(sources["elastic"], tmp_path)
