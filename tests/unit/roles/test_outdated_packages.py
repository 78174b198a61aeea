"""The check of role base that compares installed packages with the package list of the bundle: real apt and dpkg, on folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from plugin_modules import ROOT

PROGRAM = ROOT / "roles/base/files/outdated_packages.py"
DATE = "Mon, 30 Nov 2026 04:21:45 +0000"
LIST = "mirror.estate.internal_apt_dists_trixie"


def stanza(name: str, version: str, status: str = "") -> str:
    state = f"Status: {status}\n" if status else f"Filename: pool/{name}.deb\nSize: 1\n"
    return (
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: a\nDescription: a\n{state}\n"
    )


class Host:
    """Folders in which apt and dpkg find a host's packages, and what the mirror offers; `offered` None: no list."""

    def __init__(self, folder: Path, installed: dict[str, str], offered: dict[str, str] | None) -> None:
        self.folder = folder
        for name in ("dpkg/updates", "lists/partial", "cache"):
            (folder / name).mkdir(parents=True)
        words = {
            name: ("hold" if version.startswith("held ") else "install")
            for name, version in installed.items()
        }
        self.status = folder / "dpkg/status"
        self.status.write_text(
            "".join(
                stanza(name, version.removeprefix("held "), f"{words[name]} ok installed")
                for name, version in installed.items()
            )
            + stanza("removed", "0.1", "deinstall ok config-files")
        )
        (folder / "sources.list").write_text("deb https://mirror.estate.internal/apt trixie main\n")
        if offered is not None:
            packages = "".join(stanza(name, version) for name, version in offered.items())
            (folder / f"lists/{LIST}_main_binary-amd64_Packages").write_text(packages)
            (folder / f"lists/{LIST}_InRelease").write_text(f"Suite: trixie\nDate: {DATE}\n")
        settings = {
            "APT::Architecture": "amd64",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": self.status,
            "Dir::Cache": folder / "cache",
        }
        (folder / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}

    def finding(self) -> tuple[bool, str]:
        """Whether the check holds, and what it observes."""
        text = PROGRAM.read_text().replace("/var/lib/apt/lists", str(self.folder / "lists"))
        done = subprocess.run(
            [sys.executable, "-c", text],
            env={
                **os.environ,
                "LC_ALL": "C.UTF-8",
                "APT_CONFIG": str(self.folder / "apt.conf"),
                "DPKG_ADMINDIR": str(self.folder / "dpkg"),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        current = json.loads(done.stdout)["checks"]["current"]
        return current["ok"], current["observed"]


def test_packages_in_the_bundle_s_version_or_a_newer_one_are_current_and_others_are_counted(
    tmp_path: Path,
) -> None:
    host = Host(
        tmp_path,
        {"openssl": "3.5.4-1", "nginx": "1.28", "vim": "9.1"},
        {"openssl": "3.5.4-1", "nginx": "1.26", "removed": "0.2", "redis": "8"},
    )
    before = host.files()
    assert host.finding() == (
        True,
        f"0 of 2 packages are older than in the bundle of {DATE}; not in the bundle, so without updates: 1",
    )
    assert host.files() == before


def test_packages_older_than_the_bundle_s_are_named_with_both_versions(tmp_path: Path) -> None:
    host = Host(
        tmp_path,
        {"openssl": "3.5.4-1~deb13u1", "libc6": "2.41-12", "nginx": "1.26"},
        {"openssl": "3.5.4-1~deb13u2", "libc6": "2.41-12", "nginx": "1.26.10"},
    )
    ok, observed = host.finding()
    assert not ok
    assert observed == (
        f"2 of 3 packages are older than in the bundle of {DATE}: nginx 1.26 < 1.26.10, "
        "openssl 3.5.4-1~deb13u1 < 3.5.4-1~deb13u2. Upgrade this host: docs/operate/patch.md"
    )


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    names = [f"package-{number:03}" for number in range(200)]
    ok, observed = Host(tmp_path, dict.fromkeys(names, "1"), dict.fromkeys(names, "2")).finding()
    assert not ok
    assert "package-009 1 < 2 and 190 more." in observed
    assert "package-010" not in observed


def test_held_packages_are_named_and_are_no_failure(tmp_path: Path) -> None:
    """By role gpu, or by an operator."""
    host = Host(
        tmp_path, {"linux-image": "held 6.12.1", "openssl": "3"}, {"linux-image": "6.12.9", "openssl": "3"}
    )
    assert host.finding() == (
        True,
        f"0 of 2 packages are older than in the bundle of {DATE}; held: linux-image 6.12.1 < 6.12.9",
    )


@pytest.mark.parametrize("offered", [None, {"redis": "8"}], ids=["no list", "a list of other packages"])
def test_a_host_without_the_bundle_s_list_is_not_taken_for_current(
    tmp_path: Path, offered: dict[str, str] | None
) -> None:
    ok, observed = Host(tmp_path, {"openssl": "3.5.4-1"}, offered).finding()
    assert (ok, observed) == (
        False,
        "apt has no package list with any of the 1 installed packages. Run apt-get update on this host",
    )


def test_site_upgrades_nothing_and_accepts_what_verify_fails_by() -> None:
    """Else a host from an older installer would stop the run that makes it one of the estate."""
    plays = {
        name: [
            role["vars"]["base_accept_outdated_packages"]
            for play in yaml.safe_load((ROOT / f"playbooks/{name}.yml").read_text())
            for role in play.get("roles", [])
            if role["role"] == "base"
        ]
        for name in ("control", "hosts")
    }
    # A mirror on a host of its own has a play beside the control node's.
    assert [len(reasons) for reasons in plays.values()] == [2, 1]
    assert all(
        "llmkeep site upgrades no package" in reason for reasons in plays.values() for reason in reasons
    )
    [check] = [
        check
        for task in yaml.safe_load((ROOT / "roles/base/tasks/verify.yml").read_text())
        for check in task["vars"]["_common_checks"]
        if check["id"] == "base.packages_are_current"
    ]
    assert check["accepted"] == "{{ base_accept_outdated_packages }}"
    assert (
        yaml.safe_load((ROOT / "roles/base/defaults/main.yml").read_text())["base_accept_outdated_packages"]
        == ""
    )
