"""Another driver for hosts with GPUs, with Debian's real kernel, headers and dkms, the real gateway, engine and audit writer.

A module of ten lines stands in for NVIDIA's driver, and tests/doubles/nvml for its libraries: a hook of dkms tells them which
driver is installed.
"""

import json
import subprocess
from pathlib import Path

import pytest
import standin_driver
import yaml
from estate import ROOT, Lab

NVML = ROOT / "tests/doubles/nvml"
MODEL = "smollm2-135m-instruct"
OLD, GOOD, BAD = "1.0", "1.1", "1.2"
# What NVML says with each driver. With the bad one a GPU has fallen off the bus.
LOADED = {version: f"driver_version = {version}" for version in (OLD, GOOD)}
LOADED[BAD] = f"driver_version = {BAD}\\n5.lost = 1"
INVENTORY = "/root/gpus"
CARD = "mkdir -p $card && echo 0x10de > $card/vendor && echo 0x20b2 > $card/device && echo 0x030200 > $card/class"


def sources(folder: Path) -> dict[str, Path]:
    """/usr/src of a host, by version of the driver."""
    for version, said in LOADED.items():
        of = folder / f"standin-{version}"
        of.mkdir(parents=True)
        (of / "standin.c").write_text(standin_driver.source(version))
        (of / "Makefile").write_text("obj-m := standin.o\n")
        (of / "dkms.conf").write_text(standin_driver.dkms_conf(version) + 'POST_INSTALL="loaded.sh"\n')
        (of / "loaded.sh").write_text(f"#!/bin/sh\nprintf '{said}\\n' > /etc/mock-nvml.conf\n")
        (of / "loaded.sh").chmod(0o755)
    return {path.name: path for path in folder.iterdir()}


def inventory(gpu_set: str) -> str:
    """Both hosts in [gpu]: llm1, which serves, and ops1, which has no GPU's engine. Sets of the stand-in."""
    sets = [
        {
            "name": f"set-{version}",
            "source": "none",
            "driver": version,
            "flavour": "open",
            "generations": ["ampere"],
            "kernel": {"from": "6.12", "below": "6.13"},
            "cuda": {"from": "11.0", "below": "12.0"},
            "dkms": {"name": "standin", "package": ""},
            "packages": [],
            "fabric_manager": "",
            "dcgm": "",
            "container_toolkit": "",
        }
        for version in LOADED
    ]
    given = {
        "gpu_set": gpu_set,
        "gpu_sets": sets,
        "gpu_signing": "none",
        "gpu_kernel_flavour": "cloud-amd64",
        "gpu_pci_devices": "/var/lib/stand-in/pci",
        "gpu_health_expect": {"count": 8, "name": "NVIDIA A100-SXM4-80GB"},
        "gpu_health_engines": [{"name": MODEL, "socket": f"/run/llm-engine/{MODEL}.sock", "gpus": [0]}],
        "gpu_health_seconds": 1,
        "gpu_health_stale_seconds": 4,
        "gpu_health_return_seconds": 1,
    }
    return yaml.safe_dump(
        {"all": {"children": {"gpu": {"hosts": {"llm1": None, "ops1": None}, "vars": given}}}}
    )


def choose(lab: Lab, gpu_set: str) -> None:
    lab.on("ops1", f"mkdir -p {INVENTORY} && cat > {INVENTORY}/hosts.yml", given=inventory(gpu_set))


def run(lab: Lab, playbook: str, *words: str) -> str:
    """A playbook, as an operator runs it; its output as one line, which ends with how it ended."""
    command = " ".join(["llmkeep run", f"playbooks/{playbook}", "-i inventory/lab -i", INVENTORY, *words])
    return " ".join(lab.on("ops1", f"{command}; echo ended with $?", timeout=900).split())


@pytest.fixture(scope="module")
def gpus(estate: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The estate, whose llm1 has 8 GPUs and the old driver. ops1 is in [gpu] too, and has nothing yet."""
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run([NVML / "build.sh", folder], check=True)
    estate.send("llm1", "/usr/local/lib", {path.name: path for path in folder.iterdir()})
    estate.send("llm1", "/usr/src", sources(tmp_path_factory.mktemp("src")))
    # A container boots no initramfs, and one takes longer than all else.
    estate.on(
        "llm1",
        "ldconfig && mkdir -p /etc/kernel/postinst.d && ln -s /bin/true /etc/kernel/postinst.d/initramfs-tools;"
        f" for number in 1 2 3 4 5 6 7 8; do card=/var/lib/stand-in/pci/0000:0$number:00.0; {CARD}; done",
    )
    choose(estate, f"set-{OLD}")
    for playbook in ("gpu.yml", "serve.yml --tags llm_serving", "gpu_health.yml"):
        said = run(estate, playbook, "--limit llm1")
        assert said.endswith("ended with 0"), said[-3000:]
    estate.on(
        "llm1",
        "llm-serve keys add --json --subject canary --tenant operations --role developer > /root/canary.json",
    )
    estate.on(
        "ops1", "umask 077 && cat > /root/canary.json", given=estate.on("llm1", "cat /root/canary.json")
    )
    return estate


# Both models of llm1 have no other host.
GIVEN = (
    "-e upgrade_canary_key_file=/root/canary.json -e upgrade_accept_seconds=5 -e upgrade_last_instance=true"
)


def installed(lab: Lab) -> str:
    return lab.on("llm1", "dkms status | grep installed").split(",")[0].removeprefix("standin/")


def actions(lab: Lab) -> list[str]:
    """The last upgrade's events on llm1's audit record."""
    lines = lab.on("llm1", "llm-audit show --json").splitlines()
    found = [str(json.loads(line).get("event.action")) for line in lines]
    return [each for each in found if each.startswith(("gpu.driver_", "gpu.engine_"))]


def test_a_driver_that_loses_a_gpu_is_taken_back_and_the_second_host_is_not_touched(gpus: Lab) -> None:
    choose(gpus, f"set-{BAD}")
    said = run(gpus, "upgrade-drivers.yml", GIVEN)
    assert said.endswith("ended with 1"), said[-3000:]
    assert (
        "The upgrade of llm1 failed at Accept the GPUs: the GPUs are not accepted: GPU 5: it does not answer"
        in said
    ), said[-3000:]
    assert f"It is back on set-{OLD} (standin {OLD} on 6.12" in said
    assert installed(gpus) == OLD
    assert gpus.on("llm1", "llm-gpu status").strip() == f"{MODEL}: in service"
    assert gpus.on("ops1", "test -e /etc/dkms/no-autoinstall || echo untouched").strip() == "untouched"
    assert actions(gpus)[-7:] == [
        "gpu.driver_upgrade_begun",
        "gpu.engine_quarantined",
        "gpu.driver_upgrade_drained",
        "gpu.driver_upgrade_installed",
        "gpu.driver_upgrade_failed",
        "gpu.engine_returned",
        "gpu.driver_upgrade_returned",
    ]


def test_a_driver_that_works_stays_after_a_reboot_and_an_answer(gpus: Lab) -> None:
    choose(gpus, f"set-{GOOD}")
    boot = "cat /proc/sys/kernel/random/boot_id; stat --format=%Z /run/systemd"
    before = gpus.on("llm1", boot)
    said = run(gpus, "upgrade-drivers.yml", GIVEN, "-e upgrade_reboot=true --limit llm1")
    assert said.endswith("ended with 0"), said[-3000:]
    assert installed(gpus) == GOOD
    assert gpus.on("llm1", boot) != before
    assert gpus.on("llm1", "llm-gpu status").strip() == f"{MODEL}: in service"
    assert actions(gpus)[-1] == "gpu.driver_upgrade_done"
