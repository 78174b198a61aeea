"""artifacts.d: what an estate adds to artifacts.yml, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import package_sources
import pytest
import yaml
from package_sources import deb, publish, vendor

from llmkeep.bundle import additions, aptsources, build, cache, lock
from llmkeep.bundle.additions import AdditionsRefused
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

ADDED = """
apt:
  sources:
    hsm-client:
      directory: artifacts.d/hsm-client
      files: {hsm-client_1_amd64.deb: "00"}
      licence: LicenseRef-HSM
    nvidia:
      fingerprint: 0123456789ABCDEF0123456789ABCDEF01234567
  roles:
    hsm_client: [hsm-client]
    base: [tcpdump]
profiles:
  ours:
    include: elastic
    sources: [hsm-client]
    roles: [hsm_client]
models:
  ours-1: {wheel: ours, folder: ours, licence: MIT}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with llmkeep's artifacts.yml and lock, and an empty artifacts.d."""
    for name in ("artifacts.yml", "artifacts.lock.yml"):
        shutil.copy(TREE / name, tmp_path)
    (tmp_path / "artifacts.d").mkdir()
    return tmp_path


def add(tree: Path, text: str, name: str = "estate.yml") -> None:
    (tree / "artifacts.d" / name).write_text(text)


def test_sources_roles_profiles_and_models_are_added(tree: Path) -> None:
    before = lock.catalogue(tree)
    add(tree, ADDED)
    after = lock.catalogue(tree)
    sources = {"debian", "debian-non-free", "elastic", "hsm-client"}
    assert lock.packages(after, "ours")["sources"].keys() == sources
    roles = lock.packages(after, "ours")["roles"]
    assert (roles["hsm_client"], roles["base"][-1]) == (["hsm-client"], "tcpdump")
    assert set(lock.packages(before, "elastic")["roles"]) < set(roles)
    assert after["apt"]["sources"]["nvidia"]["fingerprint"].startswith("0123")
    assert after["apt"]["sources"]["nvidia"]["uri"] == before["apt"]["sources"]["nvidia"]["uri"]
    assert after["models"]["ours-1"]["licence"] == "MIT"
    assert after["profiles"]["lab"] == before["profiles"]["lab"]


def test_a_profile_has_the_environments_of_those_it_includes(tree: Path) -> None:
    add(tree, "profiles: {ours: {include: gpu}}")
    wanted = lock.catalogue(tree)
    assert lock.environments(wanted, "ours") == lock.environments(wanted, "gpu")
    assert set(lock.environments(wanted, "lab")) < set(lock.environments(wanted, "ours"))


def test_an_estate_chooses_other_wheels_of_cuda_and_their_lock_lies_in_artifacts_d(tree: Path) -> None:
    add(tree, "profiles: {ours: {include: gpu, environments: {vllm: [vllm==0.16.0]}}}")
    wanted, pinned = lock.catalogue(tree), lock.load(tree)
    assert lock.requires(wanted, "ours", "vllm") == ["vllm==0.16.0"]
    assert lock.requires(wanted, "gpu", "vllm") != ["vllm==0.16.0"]
    before = (tree / "artifacts.lock.yml").read_bytes()
    pinned.environments["vllm"] = list(pinned.environments["control"])
    lock.save(pinned, tree, {"vllm": "ours"}, "ours")
    assert (tree / "artifacts.lock.yml").read_bytes() == before
    assert not (tree / "artifacts.lock.d").exists()
    assert lock.load(tree).environments["vllm"] == sorted(pinned.environments["control"], key=str.lower)


def test_an_estate_that_includes_gpu_debian_keeps_upstreams_environments(tree: Path) -> None:
    shutil.copytree(TREE / "artifacts.lock.d", tree / "artifacts.lock.d")
    add(tree, "profiles: {ours: {include: gpu-debian}}")
    apart = lock.apart(lock.catalogue(tree), "ours")
    assert set(apart.values()) == {"gpu-debian"}
    lock.save(lock.load(tree, apart.values()), tree, apart, "gpu-debian")
    locked = yaml.safe_load((tree / "artifacts.d/lock.yml").read_text())
    assert "environments" not in locked
    assert any(name.startswith("nvidia-kernel-dkms=") for name in locked["debs"])


def test_an_environment_that_no_profile_may_choose_is_refused(tree: Path) -> None:
    add(tree, "profiles: {ours: {include: gpu, environments: {serving: [torch]}}}")
    with pytest.raises(
        LlmkeepError, match=r"ours has environments: {serving: .*for one of serving-cuda, trai"
    ):
        lock.catalogue(tree)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("ap: {}", r"artifacts\.d/estate\.yml has the unknown key ap; did you mean apt\?"),
        ("apt: {suites: []}", "estate.yml, apt has the unknown key suites"),
        (
            "apt: {sources: {a: {fingerprnt: x}}}",
            r"source a has the unknown key fingerprnt.* did you mean fingerprint\?",
        ),
        ("python: {}", "has the unknown key python; take one of apt, models, profiles"),
        ("profiles: {a: {role: [base]}}", r"profile a has the unknown key role; did you mean roles\?"),
        ("profiles: {lab: {roles: [a]}}", "adds the profile lab, which already exists"),
        ("apt: {sources: {debian: {suites: [sid]}}}", "adds the source debian, which already exists"),
        ("apt: {sources: {elastic: {fingerprint: '0'}}}", "adds the source elastic, which already exists"),
        (
            "models: {smollm2-135m-instruct: {licence: x}}",
            "adds the model smollm2-135m-instruct, which already",
        ),
        ("apt: {roles: {base: tcpdump}}", "gives the role base 'tcpdump': write a list"),
        ("apt: {sources: {a: }}", "source a is None: write a mapping of"),
        ("a: [", r"artifacts\.d/estate\.yml is not YAML"),
        ("- a", r"is \['a'\]: write a mapping of apt, models, profiles"),
        ("profiles: {a: {include: b}, b: {include: a}}", "the profile b includes a, which includes it"),
        ("profiles: {a: {include: lba}}", "the profile a includes lba, which does not exist"),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(tree: Path, text: str, match: str) -> None:
    add(tree, text)
    with pytest.raises(LlmkeepError, match=match):
        lock.catalogue(tree)


def test_two_files_that_add_one_name_are_refused(tree: Path) -> None:
    add(tree, "apt: {sources: {a: {suites: [trixie]}}}", "a.yml")
    add(tree, "apt: {sources: {a: {suites: [trixie]}}}", "b.yml")
    with pytest.raises(AdditionsRefused, match=r"artifacts\.d/b\.yml adds the source a"):
        lock.catalogue(tree)


def test_a_profile_with_a_role_or_source_that_is_not_there_is_refused(tree: Path) -> None:
    add(tree, "profiles: {a: {include: lab, sources: [debain]}, b: {include: lab, roles: [bas]}}")
    wanted = lock.catalogue(tree)
    with pytest.raises(
        LlmkeepError, match=r"the profile a names debain under sources, but apt\.sources has only debian"
    ):
        lock.packages(wanted, "a")
    with pytest.raises(LlmkeepError, match="the profile b names bas under roles"):
        lock.packages(wanted, "b")


@pytest.fixture
def estate(tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose artifacts.d adds a vendor's repository to a stand-in of Debian, with a profile for both."""
    folder = tmp_path_factory.mktemp("sources")
    keys = [package_sources.key_pair(folder / name) for name in ("debian", "vendor")]
    root = publish(folder / "debian-root", keys[0], [deb(folder, "libc6", "2.41")], "trixie", "Debian")
    suites = ["trixie", "trixie-updates", "trixie-security"]
    for suite in suites[1:]:
        publish(root, keys[0], [deb(folder, f"of-{suite}")], suite, "Debian")
    monkeypatch.setenv("APT_CONFIG", str(package_sources.use_as_debian(folder, root, keys[0], suites)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    publish(folder / "vendor-root", keys[1], [deb(folder, "tool", Depends="libc6")])
    shutil.copy(keys[1] / "keyring.pgp", tree / "vendor.asc")
    source = vendor(folder / "vendor-root", keys[1], ["tool"])
    profile = {"sources": ["debian", "vendor"], "roles": ["tool"]}
    added = {
        "apt": {"sources": {"vendor": source}, "roles": {"tool": ["tool"]}},
        "profiles": {"small": profile},
    }
    add(tree, yaml.safe_dump(added))
    wheel = lock.Artifact("a.whl", "1", "0" * 64, 3, "MIT", "pkg:pypi/a@1")
    upstream = lock.Lock({"control": ["a==1"]}, {"a==1": wheel}, {"base": ["libc6=2"]})
    lock.write(upstream, tree)
    shutil.copytree(TREE / "llmkeep", tree / "llmkeep")
    return tree


def lock_updated(tree: Path) -> "subprocess.CompletedProcess[str]":
    """`llmkeep lock update` in this tree."""
    command = [sys.executable, "-m", "llmkeep", "lock", "update", "--profile", "small"]
    env = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True, check=False)


def lock_update(tree: Path) -> tuple[int, str]:
    """Its exit code and error output."""
    run = lock_updated(tree)
    return run.returncode, run.stderr


def test_an_estate_s_lock_lies_in_artifacts_d_beside_an_upstream_s_that_stays_as_it_is(estate: Path) -> None:
    with pytest.raises(LlmkeepError, match=r"artifacts\.d/lock\.yml is missing: run `llmkeep lock update"):
        lock.require_fresh(estate)
    upstream, before = (estate / "artifacts.lock.yml").read_bytes(), lock.load(estate)
    assert lock_update(estate) == (0, "")
    assert (estate / "artifacts.lock.yml").read_bytes() == upstream
    after = lock.load(estate)
    assert {key: each.apt_source for key, each in after.debs.items()} == {
        "libc6=2.41": "debian",
        "tool=1.0": "vendor",
    }
    assert (after.environments, after.wheels, after.programs) == (
        before.environments,
        before.wheels,
        before.programs,
    )
    lock.require_fresh(estate)
    path = estate / "artifacts.lock.yml"
    path.write_text(path.read_text().replace("base:", "floor:"))
    with pytest.raises(LlmkeepError, match=r"was resolved with another artifacts\.lock\.yml"):
        lock.require_fresh(estate)


def test_what_hosts_have_installed_is_taken_at_its_newest_version_and_what_no_source_has_is_named(
    estate: Path,
) -> None:
    add(estate, "apt: {installed: [of-trixie-security, gone, libc6]}", "installed.yml")
    run = lock_updated(estate)
    assert run.returncode == 0, run.stderr
    assert "1 of 3 packages installed on hosts are in no source and cannot be updated: gone" in run.stdout
    locked = lock.load(estate)
    assert set(locked.debs) == {"libc6=2.41", "of-trixie-security=1.0", "tool=1.0"}
    build._require_roles(lock.packages(lock.catalogue(estate), "small"), locked, "small")


def test_a_lock_that_is_older_than_the_list_of_what_hosts_have_is_refused(estate: Path) -> None:
    assert lock_update(estate) == (0, "")
    add(estate, "apt: {installed: [libc6]}", "installed.yml")
    with pytest.raises(LlmkeepError, match=r"lacks packages of profile small \(installed: libc6\)"):
        build._require_roles(lock.packages(lock.catalogue(estate), "small"), lock.load(estate), "small")


def test_a_vendor_out_of_reach_changes_no_lock_and_is_told_by_the_exit_code(estate: Path) -> None:
    assert lock_update(estate) == (0, "")
    locks = [estate / "artifacts.lock.yml", estate / "artifacts.d/lock.yml"]
    before = [path.read_bytes() for path in locks]
    path = estate / "artifacts.d/estate.yml"
    good = path.read_text()
    path.write_text(good.replace("uri: file:", "uri: file:/nonexistent"))
    code, told = lock_update(estate)
    assert code == aptsources.UNREACHABLE
    assert "1 of 2 package sources cannot be used, and nothing was changed:\n  vendor, not reached: " in told
    path.write_text(good.replace("fingerprint: ", "fingerprint: 00"))
    assert lock_update(estate)[0] == aptsources.UNTRUSTED
    path.write_text(good.replace("sources:", "source:", 1))
    code, told = lock_update(estate)
    assert code == 1
    assert "has the unknown key source; did you mean sources?" in told
    assert [path.read_bytes() for path in locks] == before


def test_additions_are_inputs_of_a_bundle_and_lie_in_its_tree_without_keys_and_packages(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("out")
    keys = build.Keys(package_sources.key_pair(folder / "keys"))
    subprocess.run(["git", "-C", str(tree), "init", "-q"], check=True)
    monkeypatch.setattr(build, "TREE", tree)
    inputs = [build._inputs("lab", keys, [])]
    add(tree, ADDED)
    inputs.append(build._inputs("lab", keys, []))
    (tree / "artifacts.d/hsm-client").mkdir()
    (tree / "artifacts.d/hsm-client/hsm-client_1_amd64.deb").write_text("bytes")
    inputs.append(build._inputs("lab", keys, []))
    assert len(set(inputs)) == 3
    build._tree(folder / "tree", lock.catalogue(tree))
    assert [path.name for path in (folder / "tree/artifacts.d").rglob("*")] == ["estate.yml"]
    assert [path.name for path in additions.every_file(tree)] == ["estate.yml", "hsm-client_1_amd64.deb"]


def test_a_lock_without_what_a_role_of_the_profile_wants_is_refused(tree: Path) -> None:
    add(tree, ADDED)
    with pytest.raises(
        LlmkeepError, match=r"lacks packages of profile lab \(base: tcpdump\): run `llmkeep lock update"
    ):
        build._require_roles(lock.packages(lock.catalogue(tree), "lab"), lock.load(tree), "lab")


def test_a_vendor_s_package_shows_its_source_and_licence_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = deb(tmp_path, "tool")
    size, digest = made.stat().st_size, cache.put(made)
    entry = lock.Deb("t.deb", "1.0", digest, size, "Elastic-2.0", "pkg:deb/elastic/tool@1.0", "elastic")
    cache.place(cache.blob(digest), tmp_path / "bundle/apt/pool/t.deb")
    (found,) = build._entries(tmp_path / "bundle", {"apt/pool/t.deb": entry})
    assert (found.source, found.licence, found.purl) == ("deb:elastic", "Elastic-2.0", entry.purl)
