"""The lab's hosts stand in the inventory, and a mistake there is told before anything is built."""

from pathlib import Path

import pytest

from lab.errors import BadInventory
from lab.inventory import Disk, read, size

HOSTS = """
all:
  vars: {lab_network: 192.0.2.0/24, lab_gateway: 192.0.2.1, lab_seat: 192.0.2.2}
  children:
    control:
      hosts:
        a: {lab_kind: kernel, ansible_host: 192.0.2.11, lab_memory: 1536M, lab_disks: [{serial: A-1, size: 2G}]}
    outer:
      children:
        serve:
          hosts:
            b: {ansible_host: 192.0.2.12, lab_memory: 1G}
            a:
"""


def inventory(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "hosts.yml").write_text(text, encoding="utf-8")
    return folder


def test_reads_memory_disks_and_groups(tmp_path: Path) -> None:
    lab = read([inventory(tmp_path / "one", HOSTS)])
    a, b = lab.hosts
    assert (a.memory, a.disks) == (1536 << 20, (Disk("A-1", 2 << 30),))
    assert a.groups == {"all", "control", "outer", "serve"}
    assert [host.name for host in lab.in_group("serve")] == ["a", "b"]
    assert b.disks == ()


def test_a_second_inventory_adds_its_hosts(tmp_path: Path) -> None:
    more = "all: {children: {train: {hosts: {t: {ansible_host: 192.0.2.21, lab_memory: 2G}}}}}"
    lab = read([inventory(tmp_path / "one", HOSTS), inventory(tmp_path / "two", more)])
    assert [host.name for host in lab.hosts] == ["a", "b", "t"]


def test_the_inventories_of_this_tree_are_sound() -> None:
    root = Path(__file__).parents[3] / "inventory"
    assert [host.name for host in read([root / "lab"]).hosts] == ["ops1", "llm1"]
    assert {host.kind for host in read([root / "lab"]).hosts} == {"container"}
    assert [host.name for host in read([root / "lab"]).in_group("chat")] == ["llm1"]
    kernels = read([root / "lab/hosts.yml", root / "lab-kernel", root / "lab-train"]).hosts
    assert [host.kind for host in kernels] == ["kernel"] * 4
    assert {"chat", "prometheus"}.isdisjoint(group for host in kernels for group in host.groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("192.0.2.12", "192.0.2.11"), "used twice"),
        (("192.0.2.12", "198.51.100.1"), "outside lab_network"),
        (("192.0.2.12", "somewhere"), "not an address"),
        (("lab_memory: 1G", "lab_memory: 1GB"), "not a size"),
        ((", lab_memory: 1G", ""), "has no lab_memory"),
        (("serial: A-1", "serial: 'A,1'"), "serial"),
        (("lab_seat: 192.0.2.2", "x: 1"), "lab_seat"),
        (("all:", "all: ["), "not YAML"),
        (("lab_kind: kernel, ", ""), "a has data disks, which need block devices .* set `lab_kind: kernel`"),
        (("lab_kind: kernel", "lab_kind: vm"), "lab_kind of a is 'vm': use container or kernel"),
        (
            ("lab_memory: 1G", "lab_memory: 1G, luks_volumes: [{}]"),
            "b has encrypted volumes, which need device-mapper",
        ),
        (("lab_memory: 1G", "lab_memory: 1G, llm_training_encrypt: true"), "which needs ESP"),
    ],
)
def test_refuses_with_the_value_seen(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(BadInventory, match=message):
        read([inventory(tmp_path / "one", HOSTS.replace(*change))])


@pytest.mark.parametrize("text", ["", "0M", "12", "1.5G", "-1G", "1 G"])
def test_a_size_is_a_whole_number_with_a_unit(text: str) -> None:
    with pytest.raises(BadInventory):
        size(text)
