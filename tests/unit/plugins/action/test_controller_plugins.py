"""Plugins that run on the controller before any host is touched."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_bundle
from plugin_modules import load

inventory_sane = load("action.inventory_sane")
controller_lock = load("action.controller_lock")
estate = load("filter.estate")
mirrored_bundle = load("modules.mirrored_bundle")
serving_filters = load("filter.serving")


def test_a_lab_that_cannot_be_reached_is_told_of_its_namespace() -> None:
    told = inventory_sane.unreachable("127.0.0.1", 1, in_lab=True)
    assert "lab netns --" in told
    assert "127.0.0.1:1" in told
    assert "lab" not in inventory_sane.unreachable("127.0.0.1", 1, in_lab=False)


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def locally(path: Path, holder: str) -> list[str]:
    """The lock's script, without a network between."""
    return ["sh", "-c", controller_lock.script(str(path), holder)]


def test_a_second_controller_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    lock, run = tmp_path / "run" / "lock", sleeper()
    try:
        assert controller_lock.hold(run.pid, locally(lock, "anna@desk, process 7")) == (True, "")
        assert controller_lock.hold(run.pid, locally(lock, "ben@desk, process 8")) == (
            False,
            "busy: anna@desk, process 7",
        )
    finally:
        run.kill()
        run.wait()


def test_a_killed_controller_leaves_no_lock_behind(tmp_path: Path) -> None:
    lock, first, second = tmp_path / "lock", sleeper(), sleeper()
    try:
        assert controller_lock.hold(first.pid, locally(lock, "first"))[0]
        first.kill()
        first.wait()
        end = time.monotonic() + 10
        while not controller_lock.hold(second.pid, locally(lock, "second"))[0]:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        second.kill()
        second.wait()


def test_a_lock_that_cannot_be_asked_for_is_told_with_the_reason() -> None:
    held, said = controller_lock.hold(os.getpid(), ["sh", "-c", "echo Permission denied >&2; exit 255"])
    assert (held, said) == (False, "Permission denied")


LOCK: dict[str, Any] = {
    "environments": {"control": ["a==1"], "dev": ["b==1"], "serving": ["a==1", "c==2"]},
    "wheels": {
        f"{name}=={version}": {"purl": f"pkg:pypi/{name}@{version}"} for name, version in ("a1", "b1", "c2")
    },
    "debs": {"nginx": {"purl": "pkg:deb/debian/nginx@1.26.3-3?arch=amd64"}},
    "models": {"of-another-profile": {"purl": "pkg:pypi/m@1"}},
    "programs": {"opa": {"purl": "pkg:golang/github.com/open-policy-agent/opa@v1.22.2"}},
}


def test_what_the_lock_wants_on_the_far_side_leaves_the_builders_tools_out() -> None:
    assert estate.locked_purls(LOCK) == [
        "pkg:deb/debian/nginx@1.26.3-3?arch=amd64",
        "pkg:pypi/a@1",
        "pkg:pypi/c@2",
    ]


def test_a_bundle_without_a_program_that_could_not_be_had_is_not_refused() -> None:
    carried = [purl for purl in estate.locked_purls(LOCK) if not purl.startswith("pkg:golang/")]
    document = {"files": [{"purl": purl} for purl in carried]}
    assert mirrored_bundle.lacking(document, estate.locked_purls(LOCK)) == []


def test_a_bundle_may_have_a_later_debian_package_but_no_other_wheel() -> None:
    carried = ["pkg:deb/debian/nginx@1.26.3-4?arch=amd64", "pkg:pypi/a@1", "pkg:pypi/c@3"]
    document = {"files": [{"purl": purl} for purl in carried]}
    assert mirrored_bundle.lacking(document, estate.locked_purls(LOCK)) == ["pkg:pypi/c@2"]


def test_the_programs_of_a_bundle_are_named() -> None:
    files = [{"path": path} for path in ("bin/opa", "apt/bin/x", "bin/filebeat", "MANIFEST.json")]
    assert mirrored_bundle.programs({"files": files}) == ["filebeat", "opa"]


def test_folders_of_an_inventorys_models_are_looked_for_in_bundle_and_releases(tmp_path: Path) -> None:
    serving = {
        "llm_serving_models": [
            {"name": "small", "driver": "naive", "model": "smollm2"},
            {"name": "sql", "driver": "naive", "release": "sql-1"},
        ]
    }
    hostvars = {
        "llm1": serving | {"vllm_models": [{"name": "big", "release": "deepseek"}]},
        "gpu1": {"llm_training_models": ["smollm2"], "llm_training_releases": ["coder"]},
    }
    groups = {"serve": ["llm1"], "vllm": ["llm1"], "train": ["gpu1"]}
    folders = serving_filters.mirrored_folders(hostvars, groups)
    assert folders == ["models/smollm2", "releases/coder", "releases/deepseek", "releases/sql-1"]
    (tmp_path / "sql-1").mkdir()
    (tmp_path / "sql-1/MANIFEST.json").touch()
    document = {"files": [{"path": "models/smollm2-large/config.json"}]}
    lacking = mirrored_bundle.lacking_folders(document, tmp_path, folders)
    assert lacking == ["models/smollm2", "releases/coder", "releases/deepseek"]


@pytest.mark.parametrize("kind", ["bundle", "image"])
def test_a_mirror_serves_what_was_signed_as_a_bundle(kind: str, tmp_path: Path) -> None:
    keys, bundle = small_bundle.signing_keys(tmp_path), small_bundle.write(tmp_path / "bundle", tmp_path)
    small_bundle.sign(bundle, keys, 7, 30, kind)
    if kind == "bundle":
        assert mirrored_bundle.signed_manifest(bundle, keys / "keyring.pgp")["serial"] == 7
        return
    with pytest.raises(mirrored_bundle.Refused, match="is signed as 'image', and 'bundle' is needed"):
        mirrored_bundle.signed_manifest(bundle, keys / "keyring.pgp")


def test_an_older_or_expired_bundle_is_refused() -> None:
    document = {"serial": 4, "expires": "2027-01-01T00:00:00Z"}
    now = mirrored_bundle.datetime.fromisoformat("2026-12-31T00:00:00+00:00")
    mirrored_bundle.judged(document, 4, now)
    with pytest.raises(mirrored_bundle.Refused, match="this host has seen 5"):
        mirrored_bundle.judged(document, 5, now)
    with pytest.raises(mirrored_bundle.Refused, match="expired at 2027-01-01"):
        mirrored_bundle.judged(document, 4, now.replace(year=2027))


def test_a_reduced_inventory_has_all_hosts_and_only_what_is_asked_for() -> None:
    hostvars = {"b": {"ansible_host": "10.0.0.2", "secret": "x"}, "a": {"ansible_host": "10.0.0.1"}}
    groups = {"all": ["b", "a"], "serve": ["b"], "edge": ["a"]}
    assert estate.reduced_inventory(
        hostvars, groups, ["ansible_host", "ansible_port"], ["serve", "train"]
    ) == {
        "all": {
            "hosts": {"a": {"ansible_host": "10.0.0.1"}, "b": {"ansible_host": "10.0.0.2"}},
            "children": {"serve": {"hosts": {"b": {}}}, "train": {"hosts": {}}},
        }
    }
