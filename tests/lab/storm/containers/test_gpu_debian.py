"""The bundle of profile gpu-debian on a host: role gpu builds and installs Debian's driver 550, role vllm's tasks install vLLM.

The host is a container without a card, so the PCI devices are a stand-in, and no module can be loaded.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import ROOT, Lab, changed
from gpu_bundle import gpu_bundle, timed

from lab.demo import SENT

INVENTORY = Path(__file__).with_name("gpu_hosts")
# On the control node, which has the tree of the bundle, and what the lab and this test sent there.
THERE = f"{SENT}/{INVENTORY.relative_to(ROOT)}"
SITE = f"llmkeep site -i {THERE}/hosts.yml --tags gpu"
VLLM = f"llmkeep run {THERE}/vllm_part.yml -i {THERE}/hosts.yml -i {THERE}/vllm.yml -e part="
DRIVER = "550.163.01"
RELEASE = "/opt/vllm/releases/*"
PYTHON = f"{RELEASE}/bin/python"
ARGUMENTS = """
from pathlib import Path
from llmserve.engine import vllm
from llmserve.settings import VllmModel
model = VllmModel(driver="vllm", path="/models", manifest="/m", context=64, quantization="fp8", slots=4, batch_tokens=64)
print(*vllm.arguments("m", Path("/run/s"), 25.0, model)[1:])
"""
PARSER = """
import sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser(prog="vllm")
cmd_init()[0].subparser_init(parser.add_subparsers())
print(parser.parse_args(sys.argv[1:]))
"""
CARDS = """
for number in 1 2 3 4 5 6 7 8; do
  card=/var/lib/stand-in/pci/0000:0$number:00.0
  mkdir -p $card
  echo 0x10de > $card/vendor; echo 0x20b2 > $card/device; echo 0x030200 > $card/class
done
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A control node and a host for GPUs, thrown away afterwards, each with what all hosts have."""
    bundle = gpu_bundle()
    made = Lab("gpu-debian", (str(INVENTORY / "hosts.yml"),))
    begun = time.monotonic()
    made.floor("--bundle", str(bundle))
    timed("floor", begun)
    made.on("gpu1", CARDS)
    made.send("ops1", THERE, {each: INVENTORY / each for each in ("vllm.yml", "vllm_part.yml")})
    yield made
    if "LAB_KEEP" not in os.environ:
        made.run("destroy")


@pytest.fixture(scope="module")
def driven(lab: Lab) -> Lab:
    """With the driver, as role gpu leaves it."""
    begun = time.monotonic()
    lab.on("ops1", SITE, timeout=7200)
    timed("role gpu", begun)
    return lab


@pytest.fixture(scope="module")
def installed(lab: Lab) -> Lab:
    """With vLLM's release."""
    begun = time.monotonic()
    lab.on("ops1", f"{VLLM}install", timeout=3600)
    timed("vLLM's release", begun)
    return lab


def next_kernel(lab: Lab) -> str:
    return lab.on("gpu1", "cat /var/lib/llmkeep/gpu/kernel").strip()


def test_dkms_has_debians_driver_for_the_bundles_kernel(driven: Lab) -> None:
    kernel = next_kernel(driven)
    assert kernel.startswith("6.12.")
    assert kernel != driven.on("gpu1", "uname -r").strip()
    status = driven.on("gpu1", "dkms status")
    assert f"nvidia-current/{DRIVER}, {kernel}, x86_64: installed" in status


def test_the_modules_are_of_that_driver_and_that_kernel(driven: Lab) -> None:
    kernel = next_kernel(driven)
    modules = driven.on("gpu1", f"find /lib/modules/{kernel}/updates -name 'nvidia*.ko*'").split()
    names = {Path(each).name.partition(".")[0] for each in modules}
    assert names == {f"nvidia-current{each}" for each in ("", "-drm", "-modeset", "-peermem", "-uvm")}
    for each in modules:
        assert driven.on("gpu1", f"modinfo -F vermagic {each}").split()[0] == kernel
        assert driven.on("gpu1", f"modinfo -F version {each}").strip() in (DRIVER, "")
    size = driven.on("gpu1", f"du -ch {' '.join(modules)} | tail -n 1")
    print(f"{len(modules)} modules, {size}")


def test_what_belongs_to_the_driver_is_of_its_version_and_held(driven: Lab) -> None:
    held = driven.on("gpu1", "apt-mark showhold").split()
    kernel = next_kernel(driven)
    driver = ["nvidia-kernel-dkms", "libcuda1", "nvidia-smi", "nvidia-persistenced"]
    assert set(held) == {*driver, f"linux-image-{kernel}", f"linux-headers-{kernel}"}
    versions = driven.on("gpu1", f"dpkg-query --show --showformat='${{Version}}\\n' {' '.join(driver)}")
    assert all(version.startswith(f"{DRIVER}-") for version in versions.split())


def test_a_second_run_changes_nothing(driven: Lab) -> None:
    assert changed(driven.on("ops1", SITE, timeout=1200))["gpu1"] == 0


def test_a_container_cannot_load_the_driver_and_nothing_says_that_it_did(driven: Lab) -> None:
    told = driven.on(
        "gpu1", f"insmod $(find /lib/modules/{next_kernel(driven)} -name 'nvidia-current.ko*') 2>&1; true"
    )
    assert re.search("not permitted|Invalid module format", told), told
    assert "couldn't communicate with the NVIDIA driver" in driven.on("gpu1", "nvidia-smi 2>&1; true")
    assert not driven.on("gpu1", "cat /proc/driver/nvidia/version 2> /dev/null; true")


def test_vllm_is_refused_before_anything_changes_while_no_driver_is_loaded(lab: Lab) -> None:
    before = lab.on("gpu1", "ls -d /opt/vllm 2>&1; dpkg --list | sha256sum; true")
    said = " ".join(lab.on("ops1", f"{VLLM}main; echo ended with $?").split())
    assert not said.endswith("ended with 0")
    assert (
        "gpu1 cannot run environment vllm; nothing was changed. vllm has CUDA 12.8, which needs NVIDIA's driver"
        in said
    )
    assert "the host has no /proc/driver/nvidia/version" in said
    assert lab.on("gpu1", "ls -d /opt/vllm 2>&1; dpkg --list | sha256sum; true") == before


def test_vllms_release_is_whole_by_pip(installed: Lab) -> None:
    installed.on("gpu1", "apt-get -qq install -y python3-pip-whl")
    pip = "/usr/share/python-wheels/pip-*.whl"
    told = installed.on("gpu1", f"cd /tmp && {PYTHON} $(ls {pip})/pip --disable-pip-version-check check")
    assert told.strip() == "No broken requirements found."
    print(installed.on("gpu1", f"du -sh {RELEASE}"))


def test_vllm_and_torch_of_cuda_are_imported(installed: Lab) -> None:
    program = "import torch, vllm; print(vllm.__version__, torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    assert installed.on("gpu1", f"cd /tmp && {PYTHON} -c '{program}' 2> /dev/null").split() == [
        "0.19.1",
        "2.10.0+cu128",
        "12.8",
        "False",
    ]


def test_programs_in_wheels_can_be_executed(installed: Lab) -> None:
    ptxas = f"{RELEASE}/lib/python3.13/site-packages/triton/backends/nvidia/bin/ptxas"
    assert "Cuda compilation tools, release 12" in installed.on("gpu1", f"{ptxas} --version")


def test_libraries_of_cuda_in_one_folder_are_all_there(installed: Lab) -> None:
    """NVIDIA's wheels share the package `nvidia`."""
    program = """
import ctypes, nvidia, pathlib
for name in "cuda_runtime", "nccl", "cublas":
    for path in sorted(pathlib.Path(nvidia.__path__[0], name, "lib").glob("lib*.so.*")):
        ctypes.CDLL(str(path))
        print(path.name)
"""
    told = installed.on("gpu1", f"cd /tmp && {PYTHON} -", given=program).split()
    assert {"libcudart.so.12", "libnccl.so.2", "libcublas.so.12"} <= set(told)


def test_vllms_parser_takes_what_an_engine_gives_it(driven: Lab, installed: Lab, tmp_path: Path) -> None:
    """It parses nothing without a GPU, so NVML is a stand-in; libcuda is Debian's."""
    subprocess.run([ROOT / "tests/doubles/nvml/build.sh", tmp_path], check=True)
    installed.send("gpu1", "/root/nvml", {"libnvidia-ml.so.1": tmp_path / "libnvidia-ml.so.1"})
    options = installed.on("gpu1", "/opt/llmkeep/releases/*/bin/python -", given=ARGUMENTS).split()
    parse = f"cd /tmp && LD_LIBRARY_PATH=/root/nvml {PYTHON} - {' '.join(options)} 2> /dev/null"
    told = driven.on("gpu1", parse, given=PARSER)
    for expected in (
        "model_tag='/models'",
        "uds='/run/s'",
        "max_model_len=64",
        "quantization='fp8'",
        "shutdown_timeout=25",
    ):
        assert expected in told, told


def test_vllm_without_a_gpu_ends_and_says_so(installed: Lab) -> None:
    weights = "/srv/llmkeep/models/smollm2-135m-instruct"
    told = installed.on(
        "gpu1", f"cd /tmp && HF_HUB_OFFLINE=1 {RELEASE}/bin/vllm serve {weights} 2>&1; echo ended with $?"
    )
    assert not told.rstrip().endswith("ended with 0")
    assert re.search("Failed to infer device type|No CUDA|no NVIDIA driver|libcuda", told), told[-3000:]


def test_the_same_release_again_changes_nothing(installed: Lab) -> None:
    assert changed(installed.on("ops1", f"{VLLM}install", timeout=600))["gpu1"] == 0


def test_no_packet_left(installed: Lab) -> None:
    assert installed.sink() == []
