"""The lab itself: hosts that are containers, what is refused, and what is left of them."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from estate import LAB, ROOT, Lab

from lab.instance import Instance
from lab.process import stat

HOST = "only"
INVENTORY = f"""
all:
  vars: {{lab_network: 10.99.7.0/24, lab_gateway: 10.99.7.1, lab_seat: 10.99.7.2}}
  children: {{control: {{hosts: {{{HOST}: {{ansible_host: 10.99.7.11, lab_memory: 512M}}}}}}}}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab of one small host, which is not started yet."""
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(INVENTORY, encoding="utf-8")
    made = Lab("trial", (str(inventory),))
    made.run("--inventory", str(inventory), "destroy")
    yield made
    made.run("destroy")


def up(lab: Lab, check: bool = True) -> subprocess.CompletedProcess[str]:
    return lab.run("--inventory", *lab.inventories, "up", check=check)


def test_what_was_written_survives_a_reboot_and_a_power_cut_and_not_a_restore(lab: Lab) -> None:
    up(lab)
    lab.run("snapshot", HOST, "fresh")
    boot = "cat /proc/sys/kernel/random/boot_id; uptime --since"
    lab.on(HOST, "echo kept > /root/kept; rm /etc/locale.conf; mv /etc/ssh/sshd_config.d /etc/ssh/renamed.d")
    started = lab.on(HOST, "systemctl show --property=UserspaceTimestampMonotonic")
    lab.on(HOST, "systemd-run --quiet --on-active=0.1 --timer-property=AccuracySec=10ms systemctl reboot")
    end = time.monotonic() + 60
    while lab.on(HOST, "systemctl show --property=UserspaceTimestampMonotonic", check=False) in ("", started):
        assert time.monotonic() < end, f"it did not come back: {boot}"
        time.sleep(0.2)
    lab.run("power-off", HOST)
    assert lab.run("exec", HOST, "--", "true", check=False).returncode == 8
    lab.run("snapshot", HOST, "off")
    lab.run("power-on", HOST)
    seen = "cat /root/kept; ls /etc/locale.conf /etc/ssh/sshd_config.d 2>/dev/null; ls -d /etc/ssh/renamed.d"
    assert lab.on(HOST, seen).split() == ["kept", "/etc/ssh/renamed.d"]
    lab.run("restore", HOST, "fresh")
    assert lab.on(HOST, "ls -d /root/kept /etc/ssh/renamed.d 2>/dev/null; ls /etc/locale.conf").split() == [
        "/etc/locale.conf"
    ]
    lab.run("restore", HOST, "off")
    assert lab.on(HOST, seen).split() == ["kept", "/etc/ssh/renamed.d"]


def test_a_cable_that_is_out_stays_out_through_a_reboot(lab: Lab) -> None:
    up(lab)
    lab.on(HOST, "systemd-run --quiet --on-active=1 --timer-property=AccuracySec=10ms systemctl reboot")
    lab.run("cut", HOST)
    console = ROOT / ".lab/instances/trial/hosts" / HOST / "console.log"
    end = time.monotonic() + 60
    while "ended with 133" not in console.read_text(errors="replace"):
        assert time.monotonic() < end
        time.sleep(0.2)
    status = json.loads(lab.run("status", "--json").stdout)["hosts"][HOST]
    assert (status["power"], status["cable"], status["ssh"]) == (True, False, False)
    lab.run("join", HOST)
    end = time.monotonic() + 60
    while lab.on(HOST, "echo here", check=False).strip() != "here":
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_running_command_survives_a_cut_cable_and_ends_with_the_power(lab: Lab) -> None:
    up(lab)
    running = begun(lab, "sleep 3; cat; exit 7")
    lab.run("cut", HOST)
    assert lab.run("exec", HOST, "--", "true", check=False).returncode == 255
    lab.run("join", HOST)
    assert (running.communicate("given\n")[0], running.returncode) == ("given\n", 7)
    running = begun(lab, "sleep 60")
    lab.run("power-off", HOST)
    assert running.wait(timeout=5) == 255


def begun(lab: Lab, command: str) -> subprocess.Popen[str]:
    """`lab exec`, whose COMMAND has begun."""
    argv = [str(LAB), "--instance", lab.instance, "exec", HOST, "--", f"echo begun; {command}"]
    running = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout
    assert running.stdout.readline() == "begun\n"
    return running


def test_a_command_that_makes_its_input_non_blocking_changes_no_others(lab: Lab) -> None:
    up(lab)
    lab.outside("python3.13", "-c", "import os; os.set_blocking(0, False)")
    assert os.get_blocking(0)


def test_a_denied_address_is_refused_by_the_kernel(lab: Lab) -> None:
    up(lab)
    ask = "systemd-run --quiet --wait --pipe {} timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/22 && head -c 4 <&3'"
    assert lab.on(HOST, ask.format("")) == "SSH-"
    assert lab.on(HOST, ask.format("-p IPAddressDeny=any"), check=False) == ""


def test_its_status_is_what_the_schema_says(lab: Lab) -> None:
    schema = json.loads((ROOT / "lab/status.schema.json").read_text())
    for step in ("down", "up"):
        if step == "up":
            up(lab)
        status = json.loads(lab.run("status", "--json").stdout)
        jsonschema.validate(status, schema)
        assert status["up"] is (step == "up")
    assert status["machine"]["kinds"]["container"]["possible"]


def test_one_that_is_up_and_one_of_another_kind_are_told(lab: Lab, tmp_path: Path) -> None:
    up(lab)
    assert up(lab, check=False).returncode == 7
    (tmp_path / "kernel.yml").write_text(
        INVENTORY.replace("lab_memory", "lab_kind: kernel, lab_memory"), encoding="utf-8"
    )
    other = lab.run("--inventory", str(tmp_path / "kernel.yml"), "up", check=False)
    assert other.returncode == 1
    assert (
        f"{HOST} is a container in lab 'trial', and the inventory wants a kernel: `lab destroy` first"
        in other.stderr
    )


def left_of(lab: Lab) -> dict[str, list[str]]:
    """Everything on this machine that bears the lab's name, or lies in its folder."""
    folder = ROOT / ".lab/instances" / lab.instance
    namespace = json.loads(lab.run("status", "--json").stdout)["namespace"] or name(lab)
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    processes = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and stat(int(entry.name))
        and namespace.encode() in _read(entry / "cmdline") + _read(entry / "cgroup")
    ]
    return {
        "processes": processes,
        "mounts": [line for line in mounts if str(folder) in line or namespace in line],
        "namespaces": [path.name for path in Path("/run/netns").glob("*") if path.name == namespace],
        "cgroups": [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{namespace}")],
        "files": [path.name for path in folder.iterdir() if path.name != "lock"],
        "sockets": [str(path) for path in Path("/run").glob(f"{namespace}*")],
        "nspawn": [str(path) for path in Path("/run/systemd/nspawn").glob(f"**/*{namespace}*")],
    }


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def name(lab: Lab) -> str:
    """Its namespace, also where it is down."""
    return Instance(lab.instance, [Path(lab.inventories[0])]).namespace.name


def test_nothing_is_left_after_destroy(lab: Lab) -> None:
    up(lab)
    lab.on(HOST, "true")
    there = left_of(lab)
    assert any(Path(folder).iterdir() for folder in there["sockets"]), "no connection could be left"
    assert all(there[what] for what in ("processes", "namespaces", "cgroups", "files")), there
    lab.run("destroy")
    assert not any(left_of(lab).values()), left_of(lab)


def test_a_lab_that_was_copied_from_another_one_boots_after_that_one_was_destroyed(lab: Lab) -> None:
    copy = Lab("trial-copy", lab.inventories)
    up(lab)
    lab.on(HOST, "echo kept > /root/kept")
    lab.run("snapshot", HOST, "kept")
    begun = Instance(copy.instance, [Path(each) for each in copy.inventories])
    with begun.changing():
        begun.copy_from(Instance(lab.instance), "kept")
    lab.run("destroy")
    try:
        up(copy)
        assert copy.on(HOST, "cat /root/kept; systemctl is-system-running --wait").split() == [
            "kept",
            "running",
        ]
    finally:
        copy.run("destroy")


# A few moments in the suite, twenty and more in `make storm`.
MOMENTS = int(os.environ.get("STORM", "3"))


@pytest.mark.parametrize("number", range(MOMENTS))
def test_an_up_that_is_killed_anywhere_is_completed_by_the_next_one(lab: Lab, number: int) -> None:
    seconds = random.Random(f"{os.environ.get('SEED', '5')} {number}").uniform(0.1, 1.6)  # noqa: S311 - a moment
    running = subprocess.Popen(
        [LAB, "--instance", lab.instance, "--inventory", lab.inventories[0], "up"],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    time.sleep(seconds)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert up(lab, check=False).returncode in (0, 7)
    assert lab.on(HOST, "hostname").strip() == HOST
