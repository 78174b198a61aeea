"""dkms_build with the real dkms and compiler; headers that only compile stand in for a kernel's (molecule/gpu has real ones)."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from standin_driver import HEADERS_MAKEFILE, dkms_conf

dkms = load("module_utils.gpu.dkms")
dkms_build = load("modules.dkms_build")
signing = load("module_utils.gpu.signing")

KERNEL, NEXT = "6.12.999-standin", "6.12.1000-standin"
DRIVER = dkms.Driver("standin", "1.0", KERNEL)
GOOD = "int standin(void) { return 0; }\n"
BAD = "int standin(void) {\n    return resize(0, 1);\n}\n"
# The head of the one in NVIDIA's packages.
NVIDIA_MAKEFILE = """ifndef SYSOUT
  SYSOUT := /lib/modules/$(KERNEL_UNAME)/build
endif
modules:
	$(MAKE) -C $(SYSOUT) M=$(CURDIR) modules
"""


@pytest.fixture
def host(tmp_path: Path) -> Any:
    """A host with a driver's sources and with a kernel's headers."""
    places = dkms.Places(*(tmp_path / name for name in ("modules", "src", "tree", "kept")))
    headers = places.modules / KERNEL / "build"
    headers.mkdir(parents=True)
    (headers / "Makefile").write_text(HEADERS_MAKEFILE)
    (headers / ".config").write_text("CONFIG_MODULES=y\n")
    (headers / "include").mkdir()
    source = places.sources / "standin-1.0"
    source.mkdir(parents=True)
    (source / "dkms.conf").write_text(dkms_conf("1.0"))
    (source / "standin.c").write_text(GOOD)
    places.tree.mkdir()
    return places


def given(state: str = "proven", **more: Any) -> dict[str, Any]:
    known = {"name": "standin", "version": "1.0", "kernel": KERNEL, "package": "", "certificate": None}
    return {**known, "state": state, **more}


def seen(places: Any) -> dict[str, str]:
    """All files of the host but those that llmkeep keeps."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (places.modules, places.sources, places.tree)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def break_driver(places: Any) -> None:
    (places.sources / "standin-1.0/standin.c").write_text(BAD)


def test_a_proof_changes_nothing_of_the_host(host: Any) -> None:
    before = seen(host)
    assert dkms_build.settle(given(), False, host) == {"changed": True, "installed": False}
    assert seen(host) == before
    assert host.proven(DRIVER).exists()
    assert [path.name for path in host.builds.iterdir()] == [host.proven(DRIVER).name]


def test_nvidia_s_makefile_that_looks_in_lib_modules_is_told_where_the_headers_are(host: Any) -> None:
    source = host.sources / "standin-1.0"
    (source / "dkms.conf").write_text(
        re.sub("MAKE.*", 'MAKE[0]="make modules KERNEL_UNAME=$kernelver"', dkms_conf("1.0"))
    )
    (source / "Makefile").write_text(NVIDIA_MAKEFILE)
    assert dkms_build.settle(given(), False, host)["changed"]


def test_what_was_proven_is_installed_without_being_built_again(host: Any) -> None:
    dkms_build.settle(given(), False, host)
    break_driver(host)
    assert dkms_build.settle(given("installed"), False, host)["changed"]
    assert (host.modules / KERNEL / "updates/dkms/standin.ko").exists()
    assert dkms_build.settle(given(), False, host) == {"changed": False, "installed": True}


def test_the_modules_of_the_kernel_before_stay(host: Any) -> None:
    shutil.copytree(host.modules / KERNEL, host.modules / NEXT)
    for kernel in (KERNEL, NEXT):
        dkms_build.settle(given(kernel=kernel), False, host)
        dkms_build.settle(given("installed", kernel=kernel), False, host)
    for kernel in (KERNEL, NEXT):
        assert dkms_build.settle(given(kernel=kernel), False, host) == {"changed": False, "installed": True}


def test_what_could_not_be_installed_is_built_again(host: Any) -> None:
    dkms_build.settle(given(), False, host)
    (host.sources / "standin-1.0/dkms.conf").rename(host.sources / "dkms.conf")
    with pytest.raises(dkms.Failed, match="dkms add ended with"):
        dkms_build.settle(given("installed"), False, host)
    assert not host.proven(DRIVER).exists()


def test_a_driver_that_does_not_build_names_file_line_and_kernel_and_leaves_the_host(host: Any) -> None:
    break_driver(host)
    before = seen(host)
    with pytest.raises(dkms.Failed) as refused:
        dkms_build.settle(given(), False, host)
    assert f"does not build for the kernel {KERNEL}: standin.c:2: implicit declaration" in str(refused.value)
    assert "Nothing was installed" in str(refused.value)
    assert seen(host) == before
    assert [path.name for path in host.builds.iterdir()] == ["make.log"]


def test_check_mode_builds_nothing(host: Any) -> None:
    assert dkms_build.settle(given(), True, host)["changed"]
    assert not host.builds.exists()


@pytest.fixture
def empty_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt without package lists."""
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::State::Lists "{tmp_path}/lists"; Dir::State::status "/dev/null"; Dir::Cache "{tmp_path}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))


@pytest.mark.usefixtures("empty_mirror")
def test_the_mirror_without_headers_of_the_kernel_is_refused(host: Any) -> None:
    (host.modules / KERNEL / "build/Makefile").unlink()
    before = seen(host)
    with pytest.raises(dkms.Failed, match=f"the mirror has no package linux-headers-{KERNEL}"):
        dkms_build.settle(given(), False, host)
    assert seen(host) == before


def test_sources_of_another_version_are_refused(host: Any) -> None:
    with pytest.raises(dkms.Failed, match=r"no sources of standin 1\.1"):
        dkms_build.settle(given(version="1.1"), False, host)


@pytest.mark.usefixtures("empty_mirror")
def test_a_flavour_without_a_kernel_is_refused() -> None:
    with pytest.raises(dkms.Failed, match="the mirror has no package linux-headers-none"):
        dkms.next_kernel("none")


def test_dkms_that_could_not_sign_is_not_believed(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    way = signing.Signing(Path("/nowhere/modules.der"), "/nowhere/openssl.cnf", "", "/nowhere/pin")
    monkeypatch.setattr(dkms, "shown_pin", lambda _signing: signing.shown_pin(None))
    before = seen(host)
    with pytest.raises(dkms.Failed, match=r"standin\.ko: it is not signed"):
        dkms.prove(DRIVER, way, host)
    assert seen(host) == before
    assert not host.proven(DRIVER).exists()


# Lines of the logs of real builds: NVIDIA's open 550.163.01 on 6.12.118, and the same kernel's linker.
@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "make: Entering '/x'\nnvidia/nv-pci.c:237:13: error: too few arguments to function 'pci_resize_resource'\n",
            "nv-pci.c:237: too few arguments to function 'pci_resize_resource'",
        ),
        ("a.c:1:10: fatal error: linux/none.h: No such file or directory\n", "a.c:1: linux/none.h: No such file or directory"),
        ('ERROR: modpost: "gone" [standin.ko] undefined!\nmake: *** Error 1\n', '"gone" [standin.ko] undefined!'),
        ("  BTF [M] standin.ko\n/bin/sh: 1: pahole: not found\nmake[2]: *** Error 127\n", "/bin/sh: 1: pahole: not found"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_first_error_of_a_log_is_told(log: str, told: str) -> None:
    assert dkms.first_error(log) == told
