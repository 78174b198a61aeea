"""What a host saves before its packages are replaced."""

import os
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

module = load("modules.host_patch")
upgrades = load("module_utils.patch.upgrades")
rollout = load("module_utils.config.rollout")

GIVEN = {"new_packages": True, "serials": [7], "without_rollback": False, "one_way": {}}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """It has `tool` 1.0 in apt's archives, and `strange`, which no source has."""
    archives = tmp_path / "var/cache/apt/archives"
    archives.mkdir(parents=True)
    (archives / "tool_1.0_amd64.deb").write_text("package")
    sources = tmp_path / "etc/apt/sources.list.d/llmkeep.sources"
    sources.parent.mkdir(parents=True)
    sources.write_text("URIs: https://mirror:8443/apt\n")

    def call(argv: list[str]) -> str:
        if argv[0] == "dpkg-query":
            return "ii \ttool\t1.0\nii \tstrange\t1.0\n"
        if argv[0] == "sh":
            raise rollout.Failed("apt-get download: no source has it")
        return ""

    monkeypatch.setattr(upgrades, "run", call)
    return module.Host(tmp_path)


def plan(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = upgrades.Plan(dict.fromkeys(names, ("1.0", "2.0")), [], [], [])
    monkeypatch.setattr(upgrades, "plan", lambda *_: found)


def test_versions_of_before_are_saved_with_their_packages(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, "tool")
    progress = rollout.Progress()
    module.begin(GIVEN, progress, host)
    assert (progress.wanted, progress.previous["packages"]) == ("bundle 7", {"tool": "1.0"})
    assert [path.name for path in host.archive.glob("*.deb")] == ["tool_1.0_amd64.deb"]


def test_a_patch_that_replaces_nothing_leaves_the_rollback_of_the_last_one(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(monkeypatch)
    before = {"packages": {"tool": "0.9"}, "added": [], "kernel": "6.12"}
    progress = rollout.Progress(step="done", previous=before)
    module.begin(GIVEN, progress, host)
    assert progress.previous == before | {"kernel": os.uname().release}


def test_a_patch_that_was_interrupted_keeps_what_it_saved(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, "tool")
    before = {"packages": {"tool": "0.9"}, "added": [], "kernel": "6.12"}
    progress = rollout.Progress(step="installed", previous=before)
    module.begin(GIVEN, progress, host)
    assert progress.previous == before


def test_without_a_rollback_nothing_begins_unless_that_is_accepted(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(monkeypatch, "tool", "strange")
    with pytest.raises(
        rollout.Failed, match=r"no rollback for 1 of 2 packages, .*: strange 1\.0\. Nothing was changed"
    ):
        module.begin(GIVEN, rollout.Progress(), host)
    progress = rollout.Progress()
    module.begin(GIVEN | {"without_rollback": True}, progress, host)
    assert progress.previous["packages"] == {"tool": "1.0"}


def test_what_cannot_go_back_has_its_data_saved_before_and_is_left_as_it_is_by_a_rollback(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(monkeypatch, "tool", "strange")
    ran: list[list[str]] = []
    call = upgrades.run

    def noted(argv: list[str]) -> str:
        ran.append(argv)
        return str(call(argv))

    monkeypatch.setattr(upgrades, "run", noted)
    progress = rollout.Progress()
    module.begin(GIVEN | {"one_way": {"strange": "strange-keep.service"}}, progress, host)
    assert ["systemctl", "start", "strange-keep.service"] in ran
    assert progress.previous["packages"] == {"tool": "1.0"}


def test_data_that_could_not_be_saved_begin_no_patch(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, "tool")
    call = upgrades.run

    def fails(argv: list[str]) -> str:
        if argv[0] == "systemctl":
            raise rollout.Failed("systemctl start ended with 1")
        return str(call(argv))

    monkeypatch.setattr(upgrades, "run", fails)
    progress = rollout.Progress()
    with pytest.raises(rollout.Failed, match="systemctl start ended with 1"):
        module.begin(GIVEN | {"one_way": {"tool": "tool-keep.service"}}, progress, host)
    assert progress.previous == {}
