"""What a host has installed is found wherever it lies, and read without following what a service may change."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import components
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused
from ansible_collections.llmkeep.estate.plugins.modules import release

from llmkeep.bundle.manifest import Entry
from llmkeep.sbom import catalogue

DPKG = "ii \tbase-files\t13.8\tamd64\tbase-files\t13.8\nrc \tgone\t1\tall\tgone\t1\n"
ELF = b"\x7fELF rest"


def placed(root: Path, name: str, content: bytes | str = "", mode: int = 0o644) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def read(root: Path) -> components.Installed:
    (root / "var/lib/dpkg/info").mkdir(parents=True, exist_ok=True)
    return components.read(root, lambda _: DPKG)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_packages_that_dpkg_calls_installed_are_listed(tmp_path: Path) -> None:
    assert read(tmp_path).packages == [["base-files", "13.8", "amd64", "base-files", "13.8"]]


def test_a_program_in_machine_code_is_found_where_an_operator_put_it(tmp_path: Path) -> None:
    placed(tmp_path, "home/ann/bin/miner", ELF, 0o755)
    placed(tmp_path, "usr/local/lib/libx.so.1", ELF, 0o755)
    placed(tmp_path, "usr/local/bin/script", "#!/bin/sh\n", 0o755)
    placed(tmp_path, "home/ann/data", ELF)
    assert read(tmp_path).programs == [["/home/ann/bin/miner", sha256(ELF)]]


def test_a_program_of_the_bundle_is_found_whatever_its_format(tmp_path: Path) -> None:
    placed(tmp_path, "opt/llmkeep/programs/search/0123/search", b"tar", 0o555)
    (path, digest) = read(tmp_path).programs[0]
    assert (path, digest) == ("/opt/llmkeep/programs/search/0123/search", sha256(b"tar"))


def test_what_an_archive_was_unpacked_to_is_the_archive_unless_it_was_changed(tmp_path: Path) -> None:
    home = "opt/llmkeep/programs/search/0123"
    placed(tmp_path, f"{home}/unpacked/lib/search.jar", "jar")
    placed(tmp_path, f"{home}/unpacked/bin/server", ELF, 0o755)
    placed(tmp_path, f"{home}/unpacked/config/search.yml", "port: 1")
    with tarfile.open(tmp_path / home / "search", "w") as archive:
        archive.add(tmp_path / home / "unpacked", "search")
    assert [path for path, _ in read(tmp_path).programs] == [f"/{home}/search"]
    placed(tmp_path, f"{home}/unpacked/lib/search.jar", "other")
    placed(tmp_path, f"{home}/unpacked/lib/more.jar", "more")
    assert [path for path, _ in read(tmp_path).programs] == [
        f"/{home}/search",
        f"/{home}/unpacked/lib/more.jar",
        f"/{home}/unpacked/lib/search.jar",
    ]


def test_a_program_of_a_package_is_the_packages(tmp_path: Path) -> None:
    placed(tmp_path, "opt/vendor/tool", ELF, 0o755)
    placed(tmp_path, "var/lib/dpkg/info/vendor.list", "/.\n/opt/vendor/tool\n")
    assert read(tmp_path).programs == []


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    secret = placed(tmp_path, "etc/secret", ELF, 0o755)
    (tmp_path / "opt/evil").mkdir(parents=True)
    (tmp_path / "opt/evil/program").symlink_to(secret)
    os.mkfifo(tmp_path / "opt/evil/pipe", 0o755)
    placed(tmp_path, "etc/metadata/METADATA", "Name: hidden\nVersion: 1\n")
    (tmp_path / "opt/evil/site-packages").mkdir()
    (tmp_path / "opt/evil/site-packages/x-1.dist-info").symlink_to(tmp_path / "etc/metadata")
    found = read(tmp_path)
    assert (found.programs, found.python) == ([], [])


def test_a_bundle_that_is_only_carried_is_not_installed(tmp_path: Path) -> None:
    for name in ("MANIFEST.json", "MANIFEST.json.sig", "bin/opa"):
        placed(tmp_path, f"srv/llmkeep/bundle/7/{name}", ELF, 0o755)
    assert read(tmp_path).programs == []


def wheel(folder: Path) -> Path:
    """A wheel with a module, a script and a file of data."""
    files = {
        "small/__init__.py": "x = 1\n",
        "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: Small\nVersion: 1.0\n",
        "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "small-1.0.dist-info/entry_points.txt": "[console_scripts]\nsmall = small:x\n",
        "small-1.0.data/purelib/more.py": "y = 2\n",
        "small-1.0.data/data/share/text": "text\n",
    }
    record = "".join(f"{name},sha256={sha256(text.encode())},{len(text)}\n" for name, text in files.items())
    path = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("small-1.0.dist-info/RECORD", f"{record}small-1.0.dist-info/RECORD,,\n")
    return path


def test_an_installed_wheel_has_the_record_of_the_wheel(tmp_path: Path) -> None:
    """With a script, a file of data and byte code, which differ from one installation to the next."""
    path = wheel(tmp_path)
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run(
        [*command, "--prefix", str(tmp_path / "usr/local"), "--no-warn-script-location", str(path)],
        check=True,
    )
    (name, version, place, record, package) = read(tmp_path).python[0]
    assert package == ""
    assert (name, version, place.rpartition("/")[2]) == ("Small", "1.0", "site-packages")
    with zipfile.ZipFile(path) as archive:
        carried = archive.read("small-1.0.dist-info/RECORD").decode()
    assert record == components.record_digest(carried)
    assert record != components.record_digest(carried.replace(sha256(b"x = 1\n"), sha256(b"x = 2\n")))


def test_a_wheel_that_a_package_brought_names_the_package(tmp_path: Path) -> None:
    (tmp_path / "usr/share/python-wheels").mkdir(parents=True)
    path = wheel(tmp_path / "usr/share/python-wheels")
    shutil.unpack_archive(path, tmp_path / "opt/venv/site-packages", "zip")
    assert read(tmp_path).python[0][4] == ""
    placed(tmp_path, "var/lib/dpkg/info/small-whl.list", f"/usr/share/python-wheels/{path.name}\n")
    assert read(tmp_path).python[0][4] == "small-whl"


def test_the_record_of_a_wheel_is_not_one_that_lies_below(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    with zipfile.ZipFile(path) as archive:
        before = components.wheel_digest(archive)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("small/_vendor/other-1.dist-info/RECORD", "other.py,sha256=1,1\n")
    with zipfile.ZipFile(path) as archive:
        assert components.wheel_digest(archive) == before


def test_names_in_metadata_are_read_as_they_are(tmp_path: Path) -> None:
    placed(
        tmp_path, "root/.local/lib/site-packages/x-1.dist-info/METADATA", "Name: </td>\x1b[2J\nVersion: 1\n"
    )
    assert read(tmp_path).python[0][:2] == ["</td>\x1b[2J", "1"]


def test_metadata_without_a_name_are_listed_all_the_same(tmp_path: Path) -> None:
    placed(tmp_path, "opt/x/site-packages/x-1.dist-info/METADATA", "")
    assert read(tmp_path).python == [["None", "None", "/opt/x/site-packages", "", ""]]


def test_a_model_has_the_sha256_of_its_sums(tmp_path: Path) -> None:
    sums = f"{'1' * 64}  model.safetensors\n"
    placed(tmp_path, "srv/llmkeep/models/small/SHA256SUMS", sums)
    placed(tmp_path, "srv/llmkeep/models/small/parts/one.safetensors")
    placed(tmp_path, "home/ann/model.gguf")
    assert read(tmp_path).models == [["/home/ann", ""], ["/srv/llmkeep/models/small", sha256(sums.encode())]]


def test_scripts_of_the_pages_are_listed_and_no_others(tmp_path: Path) -> None:
    site = "opt/llmkeep/releases/0/lib/python3.13/site-packages"
    placed(tmp_path, f"{site}/llmweb/static/vendor/marked.js", "marked")
    placed(tmp_path, f"{site}/llmweb/static/chat.js", "chat")
    assert read(tmp_path).scripts == [[f"/{site}/llmweb/static/vendor/marked.js", sha256(b"marked")]]


def test_a_kernel_module_names_the_package_that_it_was_built_from(tmp_path: Path) -> None:
    placed(tmp_path, "usr/lib/modules/6.12/updates/dkms/nvidia.ko.xz", "built")
    placed(tmp_path, "usr/lib/modules/6.12/extra/rootkit.ko", "evil")
    placed(tmp_path, "usr/lib/modules/6.12/updates/packaged.ko", "packaged")
    placed(tmp_path, "var/lib/dkms/nvidia/550/6.12/x86_64/module/nvidia.ko.xz", "built")
    placed(tmp_path, "var/lib/dpkg/info/nvidia-dkms.list", "/usr/src/nvidia-550/dkms.conf\n")
    placed(tmp_path, "var/lib/dpkg/info/packaged.list", "/lib/modules/6.12/updates/packaged.ko\n")
    for name, taint in {"nvidia": "POE\n", "packaged": "O\n", "insmodded": "OE\n", "ext4": "\n"}.items():
        placed(tmp_path, f"sys/module/{name}/taint", taint)
    found = read(tmp_path)
    assert found.modules == [
        ["/usr/lib/modules/6.12/extra/rootkit.ko", sha256(b"evil"), ""],
        ["/usr/lib/modules/6.12/updates/dkms/nvidia.ko.xz", sha256(b"built"), "nvidia-dkms"],
    ]
    assert found.loaded == ["insmodded"]


def test_a_container_does_not_list_modules_of_the_kernel_that_is_not_its_own(tmp_path: Path) -> None:
    placed(tmp_path, "run/systemd/container", "systemd-nspawn")
    placed(tmp_path, "sys/module/insmodded/taint", "O\n")
    assert read(tmp_path).loaded is None


def test_another_hosts_file_system_is_named_and_not_searched(tmp_path: Path) -> None:
    placed(tmp_path, "proc/self/mounts", "nas:/x /home/shared nfs4 rw 0 0\n/dev/sda /srv ext4 rw 0 0\n")
    placed(tmp_path, "home/shared/tool", ELF, 0o755)
    placed(tmp_path, "home/ann/tool", ELF, 0o755)
    found = read(tmp_path)
    assert found.skipped == ["/home/shared nfs4"]
    assert [path for path, _ in found.programs] == ["/home/ann/tool"]


def test_more_files_than_a_host_may_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "MOST", 2)
    for number in range(3):
        placed(tmp_path, f"srv/{number}")
    with pytest.raises(
        Refused, match="/srv: there are more than 2 files below home, opt, root, srv, usr/local"
    ):
        read(tmp_path)


def test_the_names_of_environments_are_those_of_the_module_that_makes_them() -> None:
    entries = [
        Entry(f"wheels/x/{name}", 1, digit * 64, "", "", "", "")
        for name, digit in (("b.whl", "1"), ("a.whl", "2"))
    ]
    made = release.release_id(sorted(entries, key=lambda each: each.path))
    assert catalogue.places("wheels/x", entries) == [f"/opt/llmkeep/releases/{made}/"]
