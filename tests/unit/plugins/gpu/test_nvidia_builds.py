"""NVIDIA's real drivers, from Debian, built for Debian's real kernel as role gpu builds them. A quarter of an hour each: `make
storm` has them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from driver_builds import KEY, dkms, prove, signer, signing
from plugin_modules import ROOT, load
from softhsm import double

from lab import archives

module_signature = load("module_utils.gpu.module_signature")

pytestmark = [
    pytest.mark.skipif(
        "STORM" not in os.environ, reason="a quarter of an hour a driver: `make storm` has them"
    ),
    pytest.mark.skipif(
        not shutil.which("pahole"), reason="no pahole: `make peers PEER=firmware` installs it"
    ),
]

SETS = {
    one["name"]: one for one in yaml.safe_load((ROOT / "roles/gpu/defaults/main.yml").read_text())["gpu_sets"]
}
# As a bundle's repository does: what backports provide is taken before the older version.
PREFER = "Package: nvidia-*\nPin: release n=trixie-backports\nPin-Priority: 990\n"


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt with Debian's non-free drivers, whatever the machine's own has."""
    for folder in ("lists/partial", "cache/archives/partial", "sources"):
        (tmp_path / "apt" / folder).mkdir(parents=True)
    own = archives.machine_sources().replace("Components: main", "Components: main contrib non-free")
    backports = own.split("\n\n")[0].splitlines()
    backports = [
        f"Suites: {archives.BACKPORTS}" if line.startswith("Suites:") else line for line in backports
    ]
    (tmp_path / "apt/sources/debian.sources").write_text(f"{own}\n\n{'\n'.join(backports)}\n")
    (tmp_path / "apt/preferences").write_text(PREFER)
    options = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": tmp_path / "apt/sources",
        "Dir::Etc::Preferences": tmp_path / "apt/preferences",
        "Dir::State::Lists": tmp_path / "apt/lists",
        "Dir::Cache": tmp_path / "apt/cache",
        "APT::Sandbox::User": "root",
    }
    (tmp_path / "apt/conf").write_text("".join(f'{name} "{value}";\n' for name, value in options.items()))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt/conf"))
    dkms.run(["apt-get", "-qq", "update"])


@pytest.fixture
def places(tmp_path: Path) -> Any:
    return dkms.Places(*(tmp_path / name for name in ("modules", "src", "tree", "kept")))


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debian: None) -> Any:  # noqa: ARG001 - PATH and apt
    found, _ = signer(double(tmp_path, monkeypatch))
    signing.certify(found, KEY, "estate.internal kernel modules")
    return found


def driver(name: str, package: str, version: str) -> Any:
    return dkms.Driver(name, version, dkms.next_kernel("amd64"), f"{package}={version}-*")


@pytest.mark.parametrize("name", ["debian-tesla-535", "debian-550"])
def test_a_proprietary_driver_builds_and_each_module_is_signed_by_the_hsm(
    name: str, way: Any, places: Any
) -> None:
    one = SETS[name]
    wanted = driver(**one["dkms"], version=one["driver"])
    modules = dkms.built(prove(wanted, way, places))
    assert len(modules) == 5
    assert module_signature.faults(modules, way.certificate) == []


def test_the_open_driver_is_refused_with_file_line_and_kernel(way: Any, places: Any) -> None:
    wanted = driver("nvidia-current-open", "nvidia-open-kernel-dkms", SETS["debian-550"]["driver"])
    with pytest.raises(dkms.Failed) as refused:
        prove(wanted, way, places)
    assert (
        f"does not build for the kernel {wanted.kernel}: nv-pci.c:237: too few arguments to function"
        in str(refused.value)
    )
    assert [path.name for path in places.builds.iterdir()] == ["make.log"]
    assert not places.modules.exists()
