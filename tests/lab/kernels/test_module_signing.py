"""A kernel that loads signed modules only: role gpu builds and signs one for the kernel of its host, which then decides.

Where Secure Boot is on, Debian's kernel locks itself down, and shim hands it the certificates that were enrolled. A user-mode
kernel has no firmware: root locks it down here, and `lab enrol` puts the certificate into its image while the host is off.
"""

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from estate import ROOT, Lab
from plugin_modules import load

from lab import image, kernel

module_signature = load("module_utils.gpu.module_signature")
SCENARIO = ("--scenario-name", "gpu")
CERTIFICATE = "/etc/llmkeep/modules/modules.der"
FORMS = "/root/modules"
STRANGER = "openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj /CN=stranger -keyout key -out pem"
FOREIGN = "cd {forms} && cp unsigned.ko foreign.ko && {stranger} && {build}/scripts/sign-file sha256 key pem foreign.ko"
# What Debian's kernel does itself under Secure Boot.
LOCKED = "echo integrity > /sys/kernel/security/lockdown"
ENFORCED = "echo 1 > /sys/module/module/parameters/sig_enforce"
INSERT = f"""for form in signed unsigned foreign flipped; do
  said=$(insmod {FORMS}/$form.ko 2>&1 && rmmod standin && echo loaded)
  echo "$form $said"
done"""
LOADED, LOCKED_OUT, REJECTED = "loaded", "Operation not permitted", "Key was rejected by service"


@dataclass(frozen=True)
class Built:
    """llm1 with the module that role gpu built and signed for its kernel, which is there in other forms, too."""

    lab: Lab
    module: str

    def verdicts(self) -> dict[str, str]:
        """What insmod says of each form; LOADED where the kernel took it, which is undone."""
        said = self.lab.on("llm1", INSERT).splitlines()
        return {form: words.rpartition(": ")[2] for form, _, words in (line.partition(" ") for line in said)}


def packages(folder: Path, release: str) -> None:
    """What apt and dpkg see of a kernel and its headers. A lab host's kernel and headers are real, and of no package."""
    headers = f"linux-headers-{release}"
    for name, depends in (f"linux-image-{release}", ""), (headers, ""), ("linux-headers-lab", headers):
        fields = {
            "Package": name,
            "Version": "1",
            "Architecture": "all",
            "Maintainer": "lab",
            "Depends": depends,
        }
        control = [f"{field}: {value}" for field, value in fields.items() if value]
        (folder / name / "DEBIAN").mkdir(parents=True)
        (folder / name / "DEBIAN/control").write_text(
            "\n".join([*control, "Description: stands in", ""]), encoding="ascii"
        )
        subprocess.run(["dpkg-deb", "--build", folder / name], check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(floor: Lab, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The scenario of role gpu up to the role's own checks, with the kernel that runs in the place of the one that boots next."""
    folder = tmp_path_factory.mktemp("signing")
    of_lab = kernel.folder(image.cache_folder())
    release = floor.on("llm1", "uname -r").strip()
    floor.outside("molecule", "reset", *SCENARIO)
    floor.outside("molecule", "prepare", *SCENARIO, timeout=600)
    packages(folder, release)
    debs = {deb.name: deb for deb in folder.glob("*.deb")}
    floor.send("llm1", FORMS, {"headers.tar.gz": of_lab / "headers.tar.gz", **debs})
    build = f"/lib/modules/{release}/build"
    unpack = f"mkdir {build} && tar -xzf {FORMS}/headers.tar.gz -C {build}"
    floor.on("llm1", f"{unpack} && dpkg --install {FORMS}/*.deb")
    [stand_in] = yaml.safe_load((ROOT / "molecule/gpu/scenario.yml").read_text())["gpu_sets"]
    given = {
        "gpu_kernel_flavour": "lab",
        "gpu_sets": [{**stand_in, "kernel": {"from": release, "below": "99"}}],
    }
    floor.outside("molecule", "converge", *SCENARIO, "--", "-e", json.dumps(given), timeout=600)
    module = f"/lib/modules/{release}/updates/dkms/standin.ko"
    signed = base64.b64decode(floor.on("llm1", f"base64 {module}"))
    body, _ = module_signature.parts(signed)
    forms = {
        "signed": signed,
        "unsigned": body,
        # A letter of its description: as code it is what it was.
        "flipped": signed.replace(b"Stands in", b"Stands iN", 1),
    }
    for form, content in forms.items():
        (folder / f"{form}.ko").write_bytes(content)
    floor.send("llm1", FORMS, {f"{form}.ko": folder / f"{form}.ko" for form in forms})
    floor.on("llm1", FOREIGN.format(forms=FORMS, stranger=STRANGER, build=build))
    return Built(floor, module)


def test_the_role_builds_and_signs_a_module_for_a_kernel_that_runs(built: Built) -> None:
    shown = built.lab.on(
        "llm1", f"modinfo --field vermagic {built.module}; modinfo --field signer {built.module}"
    )
    release = built.lab.on("llm1", "uname -r").strip()
    assert shown.splitlines()[0].split()[0] == release
    assert shown.splitlines()[1].endswith("kernel modules")


def test_a_kernel_that_demands_nothing_takes_every_form_so_none_is_refused_for_what_it_is(
    built: Built,
) -> None:
    assert set(built.verdicts().values()) == {LOADED}


def test_a_kernel_that_is_locked_down_takes_none_before_the_certificate_is_enrolled(built: Built) -> None:
    built.lab.on("llm1", LOCKED)
    assert set(built.verdicts().values()) == {LOCKED_OUT}


@pytest.fixture(scope="module")
def enrolled(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The host booted after the certificate that role gpu made was enrolled: that one, as it is."""
    certificate = tmp_path_factory.mktemp("enrolled") / "modules.der"
    certificate.write_bytes(base64.b64decode(built.lab.on("llm1", f"base64 {CERTIFICATE}")))
    built.lab.on("llm1", "sync")  # what comes is a power cut
    built.lab.run("power-off", "llm1")
    built.lab.run("enrol", "llm1", str(certificate))
    built.lab.run("power-on", "llm1")
    return built


def test_an_enrolled_certificate_lets_the_hsms_signature_in_and_no_other(enrolled: Built) -> None:
    built_in = enrolled.lab.on("llm1", "dmesg | grep 'Loaded X.509 cert'")
    assert "llm1.estate.internal kernel modules" in built_in
    enrolled.lab.on("llm1", LOCKED)
    refused = {"unsigned": LOCKED_OUT, "foreign": LOCKED_OUT, "flipped": REJECTED}
    assert enrolled.verdicts() == {"signed": LOADED, **refused}
    enrolled.lab.on("llm1", "modprobe standin && rmmod standin")  # where the role installed it
    # Without lockdown, by the kernel's own switch.
    enrolled.lab.on("llm1", f"dmesg --clear && {ENFORCED}")
    assert enrolled.verdicts() == {"signed": LOADED, **dict.fromkeys(refused, REJECTED)}
    said = enrolled.lab.on("llm1", "dmesg")
    assert "Loading of unsigned module is rejected" in said
    assert "Loading of module with unavailable key is rejected" in said
