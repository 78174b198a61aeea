"""Where Debian's packages come from: this machine's own archives, suites of trixie only."""

from pathlib import Path

import pytest

from lab.archives import machine_sources
from lab.errors import LabError

SOURCES = """
# a comment
Types: deb
URIs: http://archive.invalid/debian
Suites: trixie trixie-updates bookworm
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.pgp

Types: deb
URIs: file:/usr/share/local
Suites: ./
Trusted: yes

Types: deb
URIs: http://archive.invalid/sid
Suites: sid

Enabled: no
Types: deb
URIs: http://archive.invalid/off
Suites: trixie
"""


def test_takes_trixie_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(SOURCES, encoding="utf-8")
    assert machine_sources(tmp_path) == (
        "Types: deb\nURIs: http://archive.invalid/debian\nSuites: trixie trixie-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.pgp\n"
    )


def test_reads_an_old_list_too(tmp_path: Path) -> None:
    lines = "deb [arch=amd64] http://archive.invalid/debian trixie main\ndeb file:/srv trixie main\n"
    (tmp_path / "sources.list").write_text(lines, encoding="utf-8")
    assert "URIs: http://archive.invalid/debian\nSuites: trixie\n" in machine_sources(tmp_path)
    assert "file:" not in machine_sources(tmp_path)


def test_refuses_a_machine_without_trixie(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="trixie"):
        machine_sources(tmp_path)
