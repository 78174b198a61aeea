"""Which findings a bundle's versions close."""

import hashlib
from pathlib import Path
from typing import Any

import bundle_with_advisories
import pytest
from scanned_estate import NOW, scan, text

from llmkeep.errors import LlmkeepError
from llmkeep.vulnerabilities import fixes

PACKAGES = """Package: libssl3t64
Architecture: amd64
Source: openssl{own}
Version: {version}
Description: a library
 Source: nothing

Package: nginx
Version: 1.28.0-1
"""
INDEX = "apt/dists/trixie/main/binary-amd64/Packages"


def newer(folder: Path, index: str, *wheels: str) -> Path:
    """A bundle with this index of packages and these wheels."""
    entries = [
        bundle_with_advisories.entry(f"wheels/serving/{number}.whl", "0" * 64, f"pkg:pypi/{wheel}")
        for number, wheel in enumerate(wheels)
    ]
    return bundle_with_advisories.write(folder, NOW, {INDEX: index.encode()}, tuple(entries), serial=8)


def closed(folder: Path, bundle: Path, **changed: object) -> set[str]:
    databases = bundle_with_advisories.write(folder / "now", NOW)
    document: dict[str, Any] = scan(databases, llm1=text(scripts=[], **changed))
    fixes.close(document, bundle, databases, NOW)
    assert document["fixed_by_serial"] == 8
    return {each["id"] for each in document["hosts"]["llm1"]["findings"] if each["closed"]}


def test_a_fixed_version_closes_what_it_fixes_and_nothing_else(tmp_path: Path) -> None:
    index = PACKAGES.format(version="3.5.1-1+deb13u1", own="")
    assert closed(tmp_path, newer(tmp_path / "new", index)) == {"CVE-2099-0001"}


def test_the_version_of_the_source_counts(tmp_path: Path) -> None:
    index = PACKAGES.format(version="9.9-1", own=" (3.5.1-1)")
    assert closed(tmp_path, newer(tmp_path / "new", index)) == set()


def test_a_wheel_closes_it_where_each_of_its_versions_is_fixed(tmp_path: Path) -> None:
    assert closed(tmp_path, newer(tmp_path / "new", "\n", "jinja2@3.1.5")) == {"CVE-2099-0010"}
    assert closed(tmp_path, newer(tmp_path / "new", "\n", "jinja2@3.1.5", "jinja2@3.1.4")) == set()


def test_a_binary_package_that_the_bundle_lacks_stays_open(tmp_path: Path) -> None:
    index = PACKAGES.format(version="3.5.1-1+deb13u1", own="")
    both = [
        ["libssl3t64", "3.5.1-1", "openssl", "3.5.1-1", []],
        ["openssl", "3.5.1-1", "openssl", "3.5.1-1", []],
    ]
    assert closed(tmp_path, newer(tmp_path / "new", index), packages=both) == set()


def test_an_index_that_is_not_as_signed_is_refused(tmp_path: Path) -> None:
    bundle = newer(tmp_path / "new", "\n")
    (bundle / INDEX).write_text(PACKAGES)
    assert hashlib.sha256(PACKAGES.encode()).hexdigest() not in (bundle / "MANIFEST.json").read_text()
    with pytest.raises(LlmkeepError, match="differs from what was signed"):
        fixes.offered(bundle)
