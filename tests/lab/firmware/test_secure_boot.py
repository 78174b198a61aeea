"""Secure Boot, MokManager, GRUB and Debian's kernels as they are, with the certificate and the choice of a kernel that role gpu
makes. A quarter of an hour on an idle machine, since QEMU has no KVM here: `make storm` has it.

The tests are steps, in this order, of what happens to one machine.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import standin_driver
from driver_builds import KEY, dkms, prove, signer, signing
from machine import DOWN, ENTER, OVMF, PROGRAMS, Machine, make_disk, powered_on
from plugin_modules import ROOT, load
from softhsm import double

module_signature = load("module_utils.gpu.module_signature")
driver_set = load("module_utils.gpu.driver_set")

missing = [name for name in PROGRAMS if not shutil.which(name)]
if not (OVMF / "OVMF_VARS_4M.ms.fd").exists():
    missing.append("OVMF")
pytestmark = [
    pytest.mark.skipif("STORM" not in os.environ, reason="six boots in software: `make storm` has them"),
    pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)}: `make peers PEER=firmware` installs it"
    ),
]

SOURCE = {
    "standin.c": standin_driver.source("1.0"),
    "Makefile": "obj-m := standin.o\n",
    "dkms.conf": standin_driver.dkms_conf("1.0"),
}
HERE = "/root/gpu"  # on the machine
CERTIFICATE = f"{HERE}/modules.der"
PASSWORD = "for-one-boot"
REFUSED = "Key was rejected by service"
# What the module kernel_pair does.
CHOOSE = """import os, pathlib, kernels, secure_boot
kernel, running = {new!r}, os.uname().release
accepted = kernel == running and kernels.is_accepted("1.0", pathlib.Path("/sys/module/standin/version"))
refusal = secure_boot.state_of(pathlib.Path({certificate!r}))
try:
    print(kernels.choose(kernel, running, keep={keep}, accepted=accepted, refusal=refusal))
except kernels.Failed as problem:
    print(problem)
"""


class Host(NamedTuple):
    """The machine, its kernels (the one that runs first, and a newer one), and the certificate's SHA-1 as MokManager shows it."""

    machine: Machine
    old: str
    new: str
    fingerprint: str

    def choose(self, keep: bool = False) -> str:
        program = CHOOSE.format(new=self.new, certificate=CERTIFICATE, keep=keep)
        return self.machine.on(f"cd {HERE} && python3 -", given=program.encode()).strip()

    def load(self, module: str) -> str:
        return self.machine.on(f"insmod {HERE}/{module}-$(uname -r).ko", check=False)


def two_kernels() -> tuple[str, str]:
    """The two newest kernels of Debian 13 for virtual machines."""
    names = subprocess.run(
        ["apt-cache", "pkgnames", "linux-image-6."], capture_output=True, text=True, check=True
    )
    found = re.findall(r"^linux-image-(\S+\+deb13-cloud-amd64)$", names.stdout, re.MULTILINE)
    old, new = sorted(found, key=driver_set.numbers)[-2:]
    return old, new


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """It runs the old kernel. A driver of ten lines is there for both kernels: as role gpu signs it, and unsigned."""
    folder = tmp_path_factory.mktemp("machine")
    old, new = two_kernels()
    make_disk(folder, (old, new))
    files = {
        name: (ROOT / f"plugins/module_utils/gpu/{name}").read_bytes()
        for name in ("kernels.py", "secure_boot.py")
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        way, _ = signer(double(folder, monkeypatch))
        signing.certify(way, KEY, "estate.internal kernel modules")
        files["modules.der"] = way.certificate.read_bytes()
        places = dkms.Places(*(folder / name for name in ("modules", "src", "driver-tree", "kept")))
        (places.sources / "standin-1.0").mkdir(parents=True)
        for name, text in SOURCE.items():
            (places.sources / "standin-1.0" / name).write_text(text)
        for kernel in (old, new):
            [module] = dkms.built(prove(dkms.Driver("standin", "1.0", kernel), way, places))
            files[f"signed-{kernel}.ko"] = module.read_bytes()
            files[f"unsigned-{kernel}.ko"], _ = module_signature.parts(module.read_bytes())
    with powered_on(folder) as machine:
        assert machine.boots() == old
        machine.on(f"mkdir {HERE}")
        for name, content in files.items():
            machine.on(f"cat > {HERE}/{name}", given=content)
        machine.on("echo GRUB_DEFAULT=saved > /etc/default/grub.d/llmkeep-gpu.cfg && update-grub")
        digest = hashlib.sha1(files["modules.der"], usedforsecurity=False).digest()
        yield Host(machine, old, new, digest.hex(" ").upper())


def test_the_machine_started_by_secure_boot_and_told_its_tpm(host: Host) -> None:
    assert "SecureBoot enabled" in host.machine.on("mokutil --sb-state")
    assert "[integrity]" in host.machine.on("cat /sys/kernel/security/lockdown")
    assert set(host.machine.on("cat /sys/class/tpm/tpm0/pcr-sha256/7").strip()) != {"0"}


def test_its_kernel_loads_no_module_whose_key_is_not_enrolled(host: Host) -> None:
    assert REFUSED in host.load("unsigned")
    assert REFUSED in host.load("signed")
    log = host.machine.on("dmesg")
    assert "Loading of unsigned module is rejected" in log
    assert "Loading of module with unavailable key is rejected" in log


def test_the_new_kernel_is_not_chosen_until_its_certificate_is_enrolled(host: Host) -> None:
    assert host.choose(keep=True) == "True"
    assert (
        f"is not enrolled: after a reboot the kernel would load no driver. Run `mokutil --import {CERTIFICATE}`"
        in host.choose()
    )
    host.machine.on(f"mokutil --import {CERTIFICATE}", given=f"{PASSWORD}\n{PASSWORD}\n".encode())
    assert "waits for its enrolment" in host.choose()
    assert "next_entry" not in host.machine.on("grub-editenv list")


def test_a_person_at_the_console_enrols_it_and_its_module_loads(host: Host) -> None:
    machine = host.machine
    machine.reset()
    machine.sees("Press any key to perform MOK management")
    machine.types(ENTER)
    machine.sees("Continue boot", "Enroll MOK")
    machine.types(DOWN, ENTER)
    machine.sees("View key 0", "Continue")
    machine.types(ENTER)
    machine.sees(
        "1.3.6.1.4.1.2312.16.1.2", "[Fingerprint]", host.fingerprint[:29], host.fingerprint[30:]
    )  # in two lines
    machine.types(ENTER, DOWN, ENTER)
    machine.sees("Enroll the key(s)?", "Yes")
    machine.types(DOWN, ENTER)
    machine.sees("Password:")
    machine.types(PASSWORD, ENTER)
    machine.sees("Reboot")
    machine.types(ENTER)
    assert machine.boots() == host.old
    assert host.load("signed") == ""
    machine.on("rmmod standin")
    assert REFUSED in host.load("unsigned")


def test_the_new_kernel_boots_once_and_a_reset_brings_the_old_one_back(host: Host) -> None:
    machine = host.machine
    assert host.choose() == "True"
    assert host.choose() == "False"
    machine.reset()
    assert machine.boots() == host.new
    assert host.choose() == "False"  # its driver is not loaded
    machine.reset()
    assert machine.boots() == host.old


def test_the_new_kernel_stays_once_its_driver_was_accepted(host: Host) -> None:
    machine = host.machine
    assert host.choose() == "True"
    machine.reset()
    assert machine.boots() == host.new
    assert host.load("signed") == ""
    assert host.choose() == "True"
    machine.reset()
    assert machine.boots() == host.new
