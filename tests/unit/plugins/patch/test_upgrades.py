"""Newer packages and the rollback, by the real apt and dpkg on a host's files in a folder."""

import os
import shutil
import subprocess
from pathlib import Path

import package_sources
import pytest
from package_sources import deb, publish
from plugin_modules import load

upgrades = load("module_utils.patch.upgrades")
debs = load("module_utils.config.debs")
rollout = load("module_utils.config.rollout")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="dpkg installs as root")


class Host:
    """A folder with apt's and dpkg's state, whose sources are repositories of this machine."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder / "host", folder
        self.keys = package_sources.key_pair(folder / "keys")
        for place in ("dpkg/info", "dpkg/updates", "lists/partial", "archives/partial", "kept"):
            (self.root / place).mkdir(parents=True)
        for name in ("dpkg/status", "dpkg/available"):
            (self.root / name).touch()
        self.config = self.root / "apt.conf"
        self.config.write_text(
            f'Dir::State "{self.root}"; Dir::State::Lists "{self.root}/lists"; Dir::Cache "{self.root}";\n'
            f'Dir::State::status "{self.root}/dpkg/status"; Dir::Etc "{self.root}"; Dir::Etc::sourceparts "/dev/null";\n'
            f'Dir::Cache::archives "{self.root}/archives"; APT::Sandbox::User "root"; Dir::Bin::dpkg "{self.root}/dpkg.sh";\n'
        )
        program = self.root / "dpkg.sh"
        program.write_text(
            f'#!/bin/sh\nexec dpkg --root="{self.root}/files" --admindir="{self.root}/dpkg" --force-all "$@"\n'
        )
        program.chmod(0o755)
        (self.root / "files").mkdir()

    def call(self, argv: list[str]) -> str:
        """A program of the host."""
        if argv[0] == "dpkg-query":
            argv = [argv[0], f"--admindir={self.root}/dpkg", *argv[1:]]
        elif argv[0] == "dpkg":
            argv = [str(self.root / "dpkg.sh"), *argv[1:]]
        done = subprocess.run(
            argv,
            env=os.environ | {"APT_CONFIG": str(self.config), "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise rollout.Failed(f"{argv}: {done.stdout}")
        return done.stdout

    def bundle(self, serial: int, *packages: Path) -> Path:
        """The repository of a bundle."""
        return publish(self.folder / f"bundles/{serial}/apt", self.keys, packages, "trixie", "llmkeep")

    def use(self, repository: Path) -> None:
        """Have it as the source, with its lists."""
        line = f"deb [signed-by={self.keys}/keyring.pgp] file:{repository} trixie main\n"
        (self.root / "sources.list").write_text(line)
        self.call(["apt-get", "-qq", "update"])

    def install(self, *packages: Path) -> None:
        self.call(["dpkg", "--install", *map(str, packages)])


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """It has `tool` and `other` at 1.0 from bundle 1, and `strange` from nowhere; bundle 2 has `tool` 2.0, which needs `part`."""
    host = Host(tmp_path)
    old = [deb(tmp_path, "tool"), deb(tmp_path, "other")]
    host.bundle(1, *old)
    host.install(*old, deb(tmp_path, "strange"))
    host.use(host.bundle(2, deb(tmp_path, "tool", "2.0", Depends="part"), deb(tmp_path, "part"), old[1]))
    return host


def test_the_plan_has_what_is_newer_what_comes_besides_and_what_no_source_has(host: Host) -> None:
    plan = upgrades.plan(True, host.call)
    assert plan.upgrades == {"tool": ("1.0", "2.0")}
    assert (plan.new, plan.kept_back, plan.sourceless) == (["part"], [], ["strange"])


def test_without_new_packages_what_needs_one_is_kept_back(host: Host) -> None:
    plan = upgrades.plan(False, host.call)
    assert (plan.upgrades, plan.new, plan.kept_back) == ({}, [], ["tool"])


def test_an_upgraded_host_has_its_packages_of_before_again_from_an_earlier_bundle(
    host: Host, tmp_path: Path
) -> None:
    plan = upgrades.plan(True, host.call)
    previous = upgrades.Previous({name: old for name, (old, _) in plan.upgrades.items()}, plan.new, "6.12")
    before = debs.versions(host.call)
    shutil.rmtree(host.root / "archives")
    (host.root / "archives/partial").mkdir(parents=True)
    urls = [f"file:{tmp_path}/bundles/1/apt"]
    kept, key = host.root / "kept", host.keys / "keyring.pgp"
    assert upgrades.keep(previous, kept, host.root / "archives", urls, host.call, key) == []
    host.call(upgrades.upgrade(True))
    assert debs.versions(host.call) == {"tool": "2.0", "part": "1.0", "other": "1.0", "strange": "1.0"}
    assert debs.restore(previous.packages, previous.added, kept, host.call)
    assert debs.versions(host.call) == before
    assert not debs.restore(previous.packages, previous.added, kept, host.call), (
        "a second time changes nothing"
    )


def test_packages_of_before_come_from_apts_archives_where_it_has_them(host: Host, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "tool_1.0_amd64.deb", host.root / "archives")
    previous = upgrades.Previous({"tool": "1.0"}, [], "6.12")
    assert upgrades.keep(previous, host.root / "kept", host.root / "archives", [], host.call) == []
    assert [path.name for path in (host.root / "kept").glob("*.deb")] == ["tool_1.0_amd64.deb"]


def test_a_package_that_no_bundle_has_any_more_is_named(host: Host, tmp_path: Path) -> None:
    previous = upgrades.Previous({"tool": "0.9"}, [], "6.12")
    urls = [f"file:{tmp_path}/bundles/1/apt"]
    kept, key = host.root / "kept", host.keys / "keyring.pgp"
    assert upgrades.keep(previous, kept, host.root / "archives", urls, host.call, key) == ["tool 0.9"]


def test_an_earlier_bundle_that_another_key_signed_is_not_used(host: Host, tmp_path: Path) -> None:
    key = package_sources.key_pair(tmp_path / "other-keys") / "keyring.pgp"
    previous = upgrades.Previous({"tool": "1.0"}, [], "6.12")
    urls = [f"file:{tmp_path}/bundles/1/apt"]
    with pytest.raises(rollout.Failed, match=r"is not signed|could not be verified"):
        upgrades.keep(previous, host.root / "kept", host.root / "archives", urls, host.call, key)


@pytest.mark.parametrize(
    ("uri", "repository"),
    [
        ("https://mirror.estate.internal:8443/apt", "https://mirror.estate.internal:8443/serials/7/apt"),
        ("file:/srv/llmkeep/bundle/current/apt", "file:/srv/llmkeep/bundle/7/apt"),
    ],
)
def test_an_earlier_bundles_repository_is_where_the_hosts_own_source_is(
    tmp_path: Path, uri: str, repository: str
) -> None:
    sources = tmp_path / "llmkeep.sources"
    sources.write_text(f"Types: deb\nURIs: {uri}\nSuites: trixie\n")
    assert upgrades.repositories(sources, [7]) == [repository]


def test_a_source_that_role_base_did_not_write_is_refused(tmp_path: Path) -> None:
    sources = tmp_path / "llmkeep.sources"
    sources.write_text("URIs: http://deb.debian.org/debian\n")
    with pytest.raises(rollout.Failed, match="is not as role base writes it: run `llmkeep site --tags base`"):
        upgrades.repositories(sources, [7])
