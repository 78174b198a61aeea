"""Real apt over repositories on this machine: a vendor provides what it is listed for, and replaces nothing of Debian's."""

import shutil
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import package_sources
import pytest
from package_sources import deb, publish, vendor

from llmkeep.bundle import aptrepo, cache, lock
from llmkeep.bundle.aptsources import FORBIDDEN, UNREACHABLE, UNTRUSTED, PackagesRefused
from llmkeep.bundle.lock import Deb
from llmkeep.errors import LlmkeepError


@dataclass
class Keys:
    debian: Path
    vendor: Path
    foreign: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    return Keys(*(package_sources.key_pair(folder / name) for name in ("debian", "vendor", "foreign")))


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A stand-in of Debian with libc6 and newer versions in its backports; the path of its apt configuration."""
    folder = tmp_path_factory.mktemp("debian")
    stable = [deb(folder, "libc6", "2.41"), deb(folder, "kernel", "6.12", Depends="libc6")]
    newer = [deb(folder, "libc6", "2.50~bpo13"), deb(folder, "kernel", "7.0~bpo13", Depends="libc6")]
    root = publish(folder / "root", keys.debian, stable, "trixie", "Debian")
    publish(root, keys.debian, newer, "trixie-backports", "Debian")
    return package_sources.use_as_debian(folder, root, keys.debian, ["trixie"])


@dataclass
class Estate:
    """A tree whose artifacts.yml has Debian and what a test adds."""

    tree: Path
    sources: dict[str, dict[str, Any]]

    def resolve(self, *packages: str) -> dict[str, Deb]:
        return aptrepo.resolve(self.wanted(*packages), {}, self.tree)[1]

    def wanted(self, *packages: str) -> dict[str, Any]:
        return {"architecture": "amd64", "sources": self.sources, "roles": {"role": list(packages)}}


@pytest.fixture
def estate(tmp_path: Path, debian: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Estate:
    monkeypatch.setenv("APT_CONFIG", str(debian))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(keys.vendor / "keyring.pgp", tree / "vendor.asc")
    return Estate(tree, {"debian": {"suites": ["trixie"], "components": ["main"]}})


def test_a_vendor_s_package_comes_with_its_dependencies_of_debian_and_states_source_and_licence(
    estate: Estate, tmp_path: Path, keys: Keys
) -> None:
    root = publish(
        tmp_path / "vendor", keys.vendor, [deb(tmp_path, "tool", Depends="libc6", copyright_file="")]
    )
    estate.sources["vendor"] = vendor(root, keys.vendor, ["tool"])
    found = estate.resolve("tool")
    assert {key: each.apt_source for key, each in found.items()} == {
        "tool=1.0": "vendor",
        "libc6=2.41": "debian",
    }
    assert (found["tool=1.0"].purl, found["tool=1.0"].licence) == (
        "pkg:deb/vendor/tool@1.0?arch=amd64",
        "LicenseRef-Vendor",
    )
    assert found["libc6=2.41"].purl.startswith("pkg:deb/debian/")
    assert cache.has(found["tool=1.0"].sha256, found["tool=1.0"].size)


def test_a_newer_libc6_of_a_vendor_that_calls_itself_debian_is_not_taken(
    estate: Estate, tmp_path: Path, keys: Keys
) -> None:
    debs = [deb(tmp_path, "libc6", "9.9"), deb(tmp_path, "tool", Depends="libc6")]
    root = publish(tmp_path / "vendor", keys.vendor, debs, suite="trixie", origin="Debian")
    estate.sources["vendor"] = vendor(root, keys.vendor, ["*"], suites=["trixie"])
    assert set(estate.resolve("tool")) == {"tool=1.0", "libc6=2.41"}


def test_what_a_vendor_is_not_listed_for_is_not_taken_as_a_dependency_either(
    estate: Estate, tmp_path: Path, keys: Keys
) -> None:
    debs = [deb(tmp_path, "tool", Depends="hidden"), deb(tmp_path, "hidden")]
    estate.sources["vendor"] = vendor(publish(tmp_path / "vendor", keys.vendor, debs), keys.vendor, ["tool"])
    with pytest.raises(
        PackagesRefused, match="The source vendor has hidden, which it is not listed for"
    ) as told:
        estate.resolve("tool")
    assert told.value.code == FORBIDDEN
    estate.sources["vendor"]["packages"] = ["tool", "hid*"]
    assert set(estate.resolve("tool")) == {"tool=1.0", "hidden=1.0"}


def test_a_vendor_s_libc6_is_refused_where_it_is_named_and_taken_where_it_may_replace_debian_s(
    estate: Estate, tmp_path: Path, keys: Keys
) -> None:
    root = publish(tmp_path / "vendor", keys.vendor, [deb(tmp_path, "libc6", "1.9")])
    estate.sources["vendor"] = vendor(root, keys.vendor, ["libc6"])
    with pytest.raises(
        PackagesRefused, match=r"vendor .* would replace Debian's libc6 with its own 1\.9"
    ) as told:
        estate.resolve("kernel")
    assert told.value.code == FORBIDDEN
    estate.sources["vendor"]["replaces_debian"] = ["libc6"]
    assert estate.resolve("kernel")["libc6=1.9"].apt_source == "vendor"


@pytest.mark.parametrize("field", ["Provides", "Replaces"])
def test_a_vendor_s_package_that_stands_in_for_libc6_is_refused(
    estate: Estate, tmp_path: Path, keys: Keys, field: str
) -> None:
    tool = deb(tmp_path, "tool", **{field: "other, libc6 (= 9)"})
    estate.sources["vendor"] = vendor(publish(tmp_path / "v", keys.vendor, [tool]), keys.vendor, ["tool"])
    with pytest.raises(PackagesRefused, match=r"tool=1\.0 of the source vendor provides or replaces libc6"):
        estate.resolve("tool")


@pytest.mark.parametrize(
    "lie", [("Package: libc6", "Package: tool"), ("Version: 9.9", "Version: 1.0"), ("Replaces: libc6\n", "")]
)
def test_a_package_that_is_not_what_its_signed_index_says_is_refused(
    estate: Estate, tmp_path: Path, keys: Keys, lie: tuple[str, str]
) -> None:
    name, more = ("tool", {"Replaces": "libc6"}) if "Replaces" in lie[0] else ("libc6", {})
    if "Version" in lie[0]:
        name = "tool"
    root = publish(tmp_path / "vendor", keys.vendor, [deb(tmp_path, name, "9.9", **more)], lie=lie)
    estate.sources["vendor"] = vendor(root, keys.vendor, ["tool"])
    with pytest.raises(
        PackagesRefused, match=f"does not match the index of vendor: the file is {name} 9"
    ) as told:
        estate.resolve("tool")
    assert told.value.code == FORBIDDEN


def test_other_bytes_under_debian_s_name_and_version_are_refused(
    estate: Estate, tmp_path: Path, keys: Keys
) -> None:
    debs = [deb(tmp_path, "libc6", "2.41", Homepage="https://vendor.example"), deb(tmp_path, "tool")]
    estate.sources["vendor"] = vendor(publish(tmp_path / "v", keys.vendor, debs), keys.vendor, ["tool"])
    with pytest.raises(PackagesRefused, match=r"vendor has libc6 2\.41.*with different content"):
        estate.resolve("tool")


def test_one_package_of_two_vendors_is_refused(estate: Estate, tmp_path: Path, keys: Keys) -> None:
    for name in ("one", "two"):
        root = publish(tmp_path / name, keys.vendor, [deb(tmp_path / name, "tool", Homepage=name)])
        estate.sources[name] = vendor(root, keys.vendor, ["to*"])
    with pytest.raises(PackagesRefused, match="tool is provided by both one and two: narrow"):
        estate.resolve("tool")


def test_backports_provide_what_is_listed_and_no_other_newer_version(estate: Estate) -> None:
    backports = {"suites": ["trixie-backports"], "components": ["main"], "packages": ["kern*"]}
    assert set(estate.resolve("kernel")) == {"kernel=6.12", "libc6=2.41"}
    estate.sources["debian-backports"] = backports
    found = estate.resolve("kernel")
    assert set(found) == {"kernel=7.0~bpo13", "libc6=2.41"}
    assert found["kernel=7.0~bpo13"].apt_source == "debian-backports"


def _another_key(estate: Estate, root: Path, keys: Keys) -> str:
    shutil.copy(keys.foreign / "keyring.pgp", estate.tree / "vendor.asc")
    estate.sources["vendor"] = vendor(root, keys.foreign, ["tool"])
    return "Missing key [0-9A-F]{40}"


def _another_fingerprint(estate: Estate, root: Path, keys: Keys) -> str:
    estate.sources["vendor"] = vendor(root, keys.foreign, ["tool"])
    return "holds the key [0-9A-F]{40}, but the source vendor states [0-9A-F]{40}"


def _two_keys(estate: Estate, _: Path, keys: Keys) -> str:
    with (estate.tree / "vendor.asc").open("ab") as file:
        file.write((keys.foreign / "keyring.pgp").read_bytes())
    return "holds the key [0-9A-F]{40}, [0-9A-F]{40}, but"


def _no_key(estate: Estate, _: Path, __: Keys) -> str:
    (estate.tree / "vendor.asc").unlink()
    return r"the key of the source vendor .* is missing: put the vendor's key [0-9A-F]{40} into .*vendor\.asc"


def _no_fingerprint(estate: Estate, _: Path, __: Keys) -> str:
    estate.sources["vendor"]["fingerprint"] = ""
    return "the source vendor .* has the fingerprint '', .* get its 40 hex digits"


def _changed_index(_: Estate, root: Path, __: Keys) -> str:
    index = root / "dists/stable/main/binary-amd64/Packages"
    index.write_text(index.read_text().replace("1.0", "1.1"))
    return r"vendor, refused: Failed to fetch copy:.*Packages"


def _expired(_: Estate, root: Path, keys: Keys) -> str:
    shutil.rmtree(root)
    publish(root, keys.vendor, [], days=-1)
    return r"vendor, refused: Release file for .*InRelease is expired"


def _unsigned(_: Estate, root: Path, __: Keys) -> str:
    release = root / "dists/stable/InRelease"
    text = release.read_text().split("\n\n", 1)[1].split("-----BEGIN PGP SIGNATURE")[0]
    (root / "dists/stable/Release").write_text(text)
    release.unlink()
    return r"vendor, refused: The repository '.*' is not signed"


@pytest.mark.parametrize(
    "spoil",
    [
        _another_key,
        _another_fingerprint,
        _two_keys,
        _no_key,
        _no_fingerprint,
        _changed_index,
        _expired,
        _unsigned,
    ],
)
def test_a_source_that_is_not_as_its_key_s_owner_signed_it_is_refused(
    estate: Estate, tmp_path: Path, keys: Keys, spoil: Any
) -> None:
    root = publish(tmp_path / "vendor", keys.vendor, [deb(tmp_path, "tool")])
    estate.sources["vendor"] = vendor(root, keys.vendor, ["tool"])
    with pytest.raises(PackagesRefused, match=spoil(estate, root, keys)) as told:
        estate.resolve("tool")
    assert told.value.code == UNTRUSTED
    assert "1 of 2 package sources cannot be used, and nothing was changed" in str(told.value)


def test_all_sources_that_are_out_of_reach_are_named_with_their_addresses(estate: Estate, keys: Keys) -> None:
    with socket.socket() as held:  # a port on which nothing answers
        held.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{held.getsockname()[1]}/apt"
        estate.sources["closed"] = vendor(Path(), keys.vendor, ["tool"], uri=closed)
        estate.sources["absent"] = vendor(Path("/nonexistent"), keys.vendor, ["tool"])
        with pytest.raises(PackagesRefused) as told:
            estate.resolve("tool")
        estate.sources["unstated"] = vendor(Path(), keys.vendor, ["tool"], fingerprint="")
        with pytest.raises(PackagesRefused, match="3 of 4 package sources cannot be used") as refused:
            estate.resolve("tool")
    assert (told.value.code, refused.value.code) == (UNREACHABLE, UNTRUSTED)
    assert f"closed, not reached: Failed to fetch {closed}/dists/stable/InRelease  Could not connect" in str(
        told.value
    )
    assert "absent, not reached: The repository 'copy:/nonexistent stable Release' does not have" in str(
        told.value
    )


class Refusing(BaseHTTPRequestHandler):
    """A server that refuses everything."""

    def do_GET(self) -> None:
        self.send_response_only(403, "Ask the proxy")
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_a_server_that_refuses_is_one_that_was_not_reached(estate: Estate, keys: Keys) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        estate.sources["vendor"] = vendor(Path(), keys.vendor, ["tool"], uri=uri)
        with pytest.raises(PackagesRefused, match=r"vendor, not reached: .* 403 +Ask the proxy") as told:
            estate.resolve("tool")
        server.shutdown()
    assert told.value.code == UNREACHABLE


@pytest.fixture
def directory(estate: Estate, tmp_path: Path) -> Path:
    """A vendor's folder with a file that its source lists."""
    folder = estate.tree / "artifacts.d/client"
    folder.mkdir(parents=True)
    made = deb(tmp_path, "hsm-client", Depends="libc6")
    shutil.copy(made, folder)
    estate.sources["client"] = {
        "directory": "artifacts.d/client",
        "files": {made.name: cache.sha256(made)},
        "licence": "LicenseRef-HSM",
    }
    return folder


@pytest.mark.usefixtures("directory")
def test_a_vendor_s_files_are_taken_by_their_sha256(estate: Estate) -> None:
    found = estate.resolve("hsm-client")
    assert {key: (each.apt_source, each.licence) for key, each in found.items()} == {
        "hsm-client=1.0": ("client", "LicenseRef-HSM"),
        "libc6=2.41": ("debian", "NOASSERTION"),
    }
    for each in found.values():
        cache.blob(each.sha256).unlink()
    aptrepo.fetch(estate.wanted(), found, estate.tree)
    assert all(cache.has(each.sha256, each.size) for each in found.values())


def _changed(folder: Path) -> str:
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes() + b"\n")
    return "hsm-client_1.0_amd64.deb has sha256 [0-9a-f]{64}, the source client states [0-9a-f]{64}"


def _unlisted(folder: Path) -> str:
    (folder / "other_1_all.deb").touch()
    return r"other_1_all\.deb is not listed under files of the source client"


def _gone(folder: Path) -> str:
    (folder / "hsm-client_1.0_amd64.deb").unlink()
    return r"hsm-client_1\.0_amd64\.deb is missing, but the source client lists it"


def _link(folder: Path) -> str:
    path = folder / "hsm-client_1.0_amd64.deb"
    path.rename(folder / "aside")
    path.symlink_to("aside")
    return r"hsm-client_1\.0_amd64\.deb is a symbolic link"


@pytest.mark.parametrize("spoil", [_changed, _unlisted, _gone, _link])
def test_a_vendor_s_folder_is_what_its_source_lists_at_each_build_too(
    estate: Estate, directory: Path, spoil: Any
) -> None:
    found = estate.resolve("hsm-client")
    match = spoil(directory)
    for attempt in (
        lambda: estate.resolve("hsm-client"),
        lambda: aptrepo.fetch(estate.wanted(), found, estate.tree),
    ):
        with pytest.raises(PackagesRefused, match=match) as told:
            attempt()
        assert told.value.code == FORBIDDEN


def test_a_file_that_was_listed_anew_and_that_the_lock_does_not_know_is_refused(
    estate: Estate, directory: Path, tmp_path: Path
) -> None:
    found = estate.resolve("hsm-client")
    made = deb(tmp_path / "again", "hsm-client", Depends="libc6", Homepage="https://changed.example")
    shutil.copy(made, directory)
    estate.sources["client"]["files"] = {made.name: cache.sha256(made)}
    with pytest.raises(PackagesRefused, match="the lock says") as told:
        aptrepo.fetch(estate.wanted(), found, estate.tree)
    assert told.value.code == FORBIDDEN


def test_a_vendor_s_file_that_would_replace_libc6_is_refused(
    estate: Estate, directory: Path, tmp_path: Path
) -> None:
    made = deb(tmp_path, "libc6", "9.9")
    shutil.copy(made, directory)
    estate.sources["client"]["files"][made.name] = cache.sha256(made)
    with pytest.raises(PackagesRefused, match="would replace Debian's libc6"):
        estate.resolve("hsm-client")


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("elastic", ["elasticsearch", "filebeat", "kibana", "logstash"]),
        ("nvidia", ["cuda-toolkit-13-1", "nvidia-container-toolkit"]),
    ],
)
def test_a_stand_in_of_a_vendor_of_artifacts_yml_provides_what_its_source_lists(
    estate: Estate, tmp_path: Path, keys: Keys, name: str, packages: list[str]
) -> None:
    entry = lock.catalogue()["apt"]["sources"][name]
    debs = [deb(tmp_path, package, Depends="libc6") for package in [*packages, "cloud-agent"]]
    root = publish(tmp_path / "vendor", keys.vendor, debs, suite=entry["suites"][0])
    estate.sources[name] = entry | {
        key: value
        for key, value in vendor(root, keys.vendor, []).items()
        if key in ("uri", "key", "fingerprint")
    }
    assert {key.split("=")[0] for key in estate.resolve(*packages)} == {*packages, "libc6"}
    with pytest.raises(LlmkeepError, match="cloud-agent"):
        estate.resolve("cloud-agent")
