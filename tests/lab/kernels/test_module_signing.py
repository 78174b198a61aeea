"""A kernel that loads signed modules only. Role gpu's code builds and signs one for the lab's kernel, with its headers, on this
machine; the kernel of a host decides.

Where Secure Boot is on, Debian's kernel locks itself down, and shim hands it the certificates that were enrolled. A user-mode
kernel has no firmware: root locks it down here, and `lab enrol` puts the certificate into its image while the host is off.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import standin_driver
from driver_builds import KEY, dkms, prove, signer, signing
from estate import Lab
from plugin_modules import load
from softhsm import double

from lab import image, kernel

module_signature = load("module_utils.gpu.module_signature")
SOURCE = {
    "standin.c": standin_driver.source("Stands in"),
    "Makefile": "obj-m := standin.o\n",
    "dkms.conf": standin_driver.dkms_conf("1.0"),
}
FORMS = "/root/modules"
STRANGER = "openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj /CN=stranger -keyout key -out pem"
SIGN = "{build}/scripts/sign-file sha256 key pem foreign.ko"
# What Debian's kernel does itself under Secure Boot.
LOCKED = "echo integrity > /sys/kernel/security/lockdown"
ENFORCED = "echo 1 > /sys/module/module/parameters/sig_enforce"
INSERT = f"""for form in signed unsigned foreign flipped; do
  said=$(insmod {FORMS}/$form.ko 2>&1 && rmmod standin && echo loaded)
  echo "$form $said"
done"""
LOADED, LOCKED_OUT, REJECTED = "loaded", "Operation not permitted", "Key was rejected by service"


@dataclass(frozen=True)
class Host:
    """llm1 with a module that is signed, and the same in other forms; the signer's certificate lies on this machine."""

    lab: Lab
    certificate: Path

    def verdicts(self) -> dict[str, str]:
        """What insmod says of each form; LOADED where the kernel took it, which is undone."""
        said = self.lab.on("llm1", INSERT).splitlines()
        return {form: words.rpartition(": ")[2] for form, _, words in (line.partition(" ") for line in said)}


@pytest.fixture(scope="module")
def host(floor: Lab, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The module as dkms builds it and the HSM signs it, installed on a host that has nothing else."""
    folder, of_lab = tmp_path_factory.mktemp("signing"), kernel.folder(image.cache_folder())
    [release] = [each.name for each in (of_lab / "modules").iterdir()]
    places = dkms.Places(*(folder / name for name in ("modules", "src", "driver-tree", "kept")))
    build = places.modules / release / "build"
    build.mkdir(parents=True)
    subprocess.run(["tar", "-xzf", of_lab / "headers.tar.gz", "-C", build], check=True)
    (places.sources / "standin-1.0").mkdir(parents=True)
    for name, text in SOURCE.items():
        (places.sources / "standin-1.0" / name).write_text(text)
    with pytest.MonkeyPatch.context() as monkeypatch:
        way, _ = signer(double(folder, monkeypatch))
        signing.certify(way, KEY, "llm1.estate.internal kernel modules")
        [module] = dkms.built(prove(dkms.Driver("standin", "1.0", release), way, places))
    signed = module.read_bytes()
    body, _ = module_signature.parts(signed)
    forms = {
        "signed": signed,
        "unsigned": body,
        "foreign": body,
        # A letter of its version: as code it is what it was.
        "flipped": signed.replace(b"Stands in", b"Stands iN", 1),
    }
    for form, content in forms.items():
        (folder / f"{form}.ko").write_bytes(content)
    subprocess.run(["sh", "-ec", f"{STRANGER}; {SIGN.format(build=build)}"], cwd=folder, check=True)
    floor.run("restore", "llm1", "bare")
    floor.send("llm1", FORMS, {f"{form}.ko": folder / f"{form}.ko" for form in forms})
    updates = "/lib/modules/$(uname -r)/updates"
    floor.on("llm1", f"mkdir {updates} && cp {FORMS}/signed.ko {updates}/standin.ko && depmod")
    return Host(floor, way.certificate)


def test_a_module_is_built_and_signed_for_a_kernel_that_runs(host: Host) -> None:
    shown = host.lab.on("llm1", "uname -r; modinfo --field vermagic standin; modinfo --field signer standin")
    release, magic, signer_name = shown.splitlines()
    assert magic.split()[0] == release
    assert signer_name == "llm1.estate.internal kernel modules"


def test_a_kernel_that_demands_nothing_takes_every_form_so_none_is_refused_for_what_it_is(
    host: Host,
) -> None:
    assert set(host.verdicts().values()) == {LOADED}


def test_a_kernel_that_is_locked_down_takes_none_before_the_certificate_is_enrolled(host: Host) -> None:
    host.lab.on("llm1", LOCKED)
    assert set(host.verdicts().values()) == {LOCKED_OUT}


@pytest.fixture(scope="module")
def enrolled(host: Host) -> Host:
    """The host booted after the signer's certificate was enrolled: that one, as it is."""
    host.lab.on("llm1", "sync")  # what comes is a power cut
    host.lab.run("power-off", "llm1")
    host.lab.run("enrol", "llm1", str(host.certificate))
    host.lab.run("power-on", "llm1")
    return host


def test_an_enrolled_certificate_lets_the_hsms_signature_in_and_no_other(enrolled: Host) -> None:
    built_in = enrolled.lab.on("llm1", "dmesg | grep 'Loaded X.509 cert'")
    assert "llm1.estate.internal kernel modules" in built_in
    enrolled.lab.on("llm1", LOCKED)
    refused = {"unsigned": LOCKED_OUT, "foreign": LOCKED_OUT, "flipped": REJECTED}
    assert enrolled.verdicts() == {"signed": LOADED, **refused}
    enrolled.lab.on("llm1", "modprobe standin && rmmod standin")
    # Without lockdown, by the kernel's own switch.
    enrolled.lab.on("llm1", f"dmesg --clear && {ENFORCED}")
    assert enrolled.verdicts() == {"signed": LOADED, **dict.fromkeys(refused, REJECTED)}
    said = enrolled.lab.on("llm1", "dmesg")
    assert "Loading of unsigned module is rejected" in said
    assert "Loading of module with unavailable key is rejected" in said
