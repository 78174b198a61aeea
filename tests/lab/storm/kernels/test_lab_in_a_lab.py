"""A lab of containers on what its users have: Debian 13 with systemd as process 1 and cgroup v2, here a host of a lab."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import ROOT, Lab

from lab import image

PLACE = "/srv/lab"
# The control node's own Python has what the lab imports.
INNER = (
    f"cd {PLACE} && python=$(ls -d /opt/llmkeep/control-*/bin/python3 | head -n 1) && "
    f"export XDG_CACHE_HOME={PLACE}/cache && $python -m lab"
)
INVENTORY = """
all:
  vars: {lab_network: 10.98.7.0/24, lab_gateway: 10.98.7.1, lab_seat: 10.98.7.2}
  children: {control: {hosts: {inner: {ansible_host: 10.98.7.11, lab_memory: 512M}}}}
"""


@pytest.fixture
def host(floor: Lab, tmp_path: Path) -> Iterator[Lab]:
    """ops1 with the lab's code, the bare Debian, and the package that a container needs."""
    floor.run("restore", "ops1", "floor")
    subprocess.run(["apt-get", "-qq", "download", "systemd-container"], cwd=tmp_path, check=True)
    [package] = tmp_path.glob("*.deb")
    tree = image.base_tree(print)
    (tmp_path / "hosts.yml").write_text(INVENTORY, encoding="utf-8")
    parts = {"lab": ROOT / "lab", f"cache/llmkeep/{tree.name}": tree, "nspawn.deb": package}
    floor.send("ops1", PLACE, {**parts, "hosts.yml": tmp_path / "hosts.yml"})
    floor.on("ops1", f"dpkg --install --force-depends {PLACE}/nspawn.deb")
    yield floor
    floor.on("ops1", f"{INNER} destroy; rm -rf {PLACE}", check=False)


def test_its_containers_boot_keep_their_limits_and_leave_nothing(host: Lab) -> None:
    def inner(words: str, check: bool = True) -> str:
        return host.on("ops1", f"{INNER} {words}", check=check)

    inner("-i hosts.yml up")
    assert '"memory": true' in inner("status --json")
    assert inner("exec inner -- systemctl is-system-running --wait").strip() == "running"
    hog = "exec inner -- 'systemd-run --quiet --wait -p MemoryMax=16M -p MemorySwapMax=0 tail /dev/zero; echo ended with $?'"
    assert inner(hog, check=False).strip() != "ended with 0"
    ask = "timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/22 && head -c 4 <&3'"
    for denied, seen in (("", "SSH-"), ("-p IPAddressDeny=any", "")):
        said = inner(f'exec inner -- "systemd-run --quiet --wait --pipe {denied} {ask}"', check=False)
        assert said == seen
    inner("power-off inner")
    inner("power-on inner")
    inner("destroy")
    assert host.on("ops1", "ls -d /sys/fs/cgroup/llmkeep-* /run/netns/* 2>/dev/null; true") == ""
