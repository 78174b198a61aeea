"""limits: what the kernel applies of a unit's bounds comes from the kernel; "not enforceable" neither passes nor fails."""

import ctypes
import errno
import os
import platform
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

limits = load("module_utils.config.limits")
checks = load("module_utils.config.checks")

UNIT = "opa.service"
DENIES = {"IPAddressDeny": "::/0 0.0.0.0/0", "IPAddressAllow": "::1/128 127.0.0.0/8"}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A unified hierarchy with a memory controller, and process 7 in the cgroup of its unit, bounded to 64 MiB."""
    root = tmp_path / "cgroup"
    cgroup = root / "system.slice" / UNIT
    cgroup.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu io memory pids\n")
    (cgroup / "memory.max").write_text(f"{64 << 20}\n")
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text(f"4:memory:/elsewhere\n0::/system.slice/{UNIT}\n")
    monkeypatch.setattr(limits, "HIERARCHIES", (tmp_path / "none", root))
    monkeypatch.setattr(limits, "PROCESSES", tmp_path / "proc")
    return root


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What systemd says of each unit."""
    properties = {"MainPID": "7", "MemoryMax": str(64 << 20), **DENIES}
    monkeypatch.setattr(limits, "shown", lambda units, _: dict.fromkeys(units, properties))
    return properties


def attached(
    monkeypatch: pytest.MonkeyPatch, incoming: int = 1, outgoing: int = 1, refusal: int | None = None
) -> None:
    """A kernel that tells so many programs, or refuses to tell."""

    def programs(_: Path, way: int) -> list[int]:
        if refusal:
            raise OSError(refusal, os.strerror(refusal))
        return list(range((incoming, outgoing)[way]))

    monkeypatch.setattr(limits, "programs", programs)


def result(limit: str, wanted: object) -> dict[str, Any]:
    """A limit's result as role and report show it."""
    check = dict.fromkeys(checks.OPTIONS) | {
        "id": "opa.it",
        "title": "It is",
        "limit": limit,
        "units": {UNIT: wanted},
    }
    found: dict[str, Any] = checks.run([check])[0]
    return found


@pytest.mark.usefixtures("kernel", "systemd")
def test_a_bound_that_the_kernel_applies_holds() -> None:
    assert result("MemoryMax", 64 << 20) == {
        "id": "opa.it",
        "title": "It is",
        "expected": f"the kernel enforces MemoryMax of {UNIT} {64 << 20}",
        "observed": f"enforced for {UNIT}",
        "ok": True,
    }


@pytest.mark.usefixtures("systemd")
@pytest.mark.parametrize("seen", ["max", str(65 << 20), "0"])
def test_a_bound_that_the_kernel_does_not_apply_has_failed(kernel: Path, seen: str) -> None:
    (kernel / "system.slice" / UNIT / "memory.max").write_text(f"{seen}\n")
    found = result("MemoryMax", 64 << 20)
    assert (found["ok"], "not_enforceable" in found) == (False, False)
    assert f"has {seen} in " in found["observed"]


@pytest.mark.usefixtures("systemd")
def test_a_controller_that_does_not_reach_the_unit_is_a_failure(kernel: Path) -> None:
    (kernel / "system.slice" / UNIT / "memory.max").unlink()
    found = result("MemoryMax", 64 << 20)
    assert checks.has_failed(found)
    assert "memory.max" in found["observed"]


@pytest.mark.usefixtures("systemd")
def test_a_process_that_left_its_units_cgroup_is_not_bounded(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "proc/7/cgroup").write_text("0::/free\n")
    (kernel / "free").mkdir()
    (kernel / "free/memory.max").write_text("max\n")
    assert checks.has_failed(result("MemoryMax", 64 << 20))


@pytest.mark.usefixtures("systemd")
@pytest.mark.parametrize("controllers", ["", "cpu io pids"])
def test_without_a_memory_controller_it_is_neither_held_nor_failed(kernel: Path, controllers: str) -> None:
    (kernel / "cgroup.controllers").write_text(f"{controllers}\n")
    (kernel / "system.slice" / UNIT / "memory.max").unlink()
    found = result("MemoryMax", 64 << 20)
    assert (found["ok"], checks.has_failed(found)) == (False, False)
    assert "has no memory controller" in found["not_enforceable"]


def test_without_a_unified_hierarchy_it_is_not_enforceable(
    systemd: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "HIERARCHIES", (tmp_path,))
    assert systemd
    assert "no unified hierarchy" in result("MemoryMax", 64 << 20)["not_enforceable"]


@pytest.mark.parametrize("controllers", ["", "memory"])
def test_a_unit_without_the_declared_bound_fails_on_every_host(
    kernel: Path, systemd: dict[str, str], controllers: str
) -> None:
    (kernel / "cgroup.controllers").write_text(controllers)
    systemd["MemoryMax"] = "infinity"
    found = result("MemoryMax", 64 << 20)
    assert checks.has_failed(found)
    assert found["observed"] == f"{UNIT} is to have infinity, declared is {64 << 20}"


@pytest.mark.parametrize("controllers", ["", "memory"])
def test_a_unit_that_is_declared_unbounded_holds_everywhere(
    kernel: Path, systemd: dict[str, str], controllers: str
) -> None:
    (kernel / "cgroup.controllers").write_text(controllers)
    systemd["MemoryMax"] = "infinity"
    assert result("MemoryMax", "infinity")["ok"] is True


@pytest.mark.usefixtures("kernel")
def test_a_unit_that_does_not_run_is_said(systemd: dict[str, str]) -> None:
    systemd["MainPID"] = "0"
    assert result("MemoryMax", 64 << 20)["observed"] == f"enforced for none; not running: {UNIT}"


@pytest.mark.usefixtures("kernel", "systemd")
def test_addresses_are_filtered_by_a_program_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    attached(monkeypatch)
    assert result("IPAddressDeny", "any")["ok"] is True


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("cgroup", "told"),
    [
        ("/system.slice/opa.service", "enforced for opa.service"),
        ("", "enforced for none; not running: opa.service"),
    ],
)
def test_a_scope_which_has_no_main_process_is_looked_at_itself(
    systemd: dict[str, str], cgroup: str, told: str
) -> None:
    del systemd["MainPID"]
    systemd["ControlGroup"] = cgroup
    assert result("MemoryMax", 64 << 20)["observed"] == told


@pytest.mark.usefixtures("kernel", "systemd")
@pytest.mark.parametrize(
    ("programs", "told"),
    [((0, 1), "incoming"), ((1, 0), "outgoing"), ((0, 0), "incoming and outgoing")],
)
def test_a_way_without_a_program_has_failed(
    monkeypatch: pytest.MonkeyPatch, programs: tuple[int, int], told: str
) -> None:
    attached(monkeypatch, *programs)
    found = result("IPAddressDeny", "any")
    assert checks.has_failed(found)
    assert f"no filter of {told} packets" in found["observed"]


@pytest.mark.usefixtures("kernel", "systemd")
@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_where_the_kernel_refuses_bpf_it_is_not_enforceable(
    monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    attached(monkeypatch, refusal=refusal)
    found = result("IPAddressDeny", "any")
    assert (found["ok"], checks.has_failed(found)) == (False, False)
    assert os.strerror(refusal) in found["not_enforceable"]


@pytest.mark.usefixtures("kernel", "systemd")
@pytest.mark.parametrize("refusal", [errno.EACCES, errno.ENOSPC, errno.EOPNOTSUPP])
def test_any_other_refusal_is_a_failure(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    attached(monkeypatch, refusal=refusal)
    assert checks.has_failed(result("IPAddressDeny", "any"))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "properties",
    [{"IPAddressDeny": ""}, {"IPAddressDeny": "0.0.0.0/0"}, {"IPAddressAllow": "::/0 0.0.0.0/0"}],
)
@pytest.mark.parametrize("refusal", [None, errno.EPERM])
def test_a_unit_that_lets_addresses_through_fails_on_every_host(
    systemd: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    properties: dict[str, str],
    refusal: int | None,
) -> None:
    attached(monkeypatch, refusal=refusal)
    systemd.update(properties)
    assert checks.has_failed(result("IPAddressDeny", "any"))


@pytest.mark.parametrize("limit", limits.LIMITS)
@pytest.mark.parametrize("lacking", ["", "no means"])
def test_a_command_that_proves_a_limit_is_run_where_the_kernel_has_the_means(
    monkeypatch: pytest.MonkeyPatch, limit: str, lacking: str
) -> None:
    monkeypatch.setattr(limits, "lacking", lambda _: lacking)
    check = dict.fromkeys(checks.OPTIONS) | {
        "id": "base.it",
        "title": "It is",
        "argv": ["false"],
        "rc": 0,
        "timeout": 10,
    }
    found = checks.run([check | {"limit": limit}])[0]
    assert (checks.has_failed(found), found.get("not_enforceable")) == (not lacking, lacking or None)


# From here on it is this machine's kernel.


def bpf(command: int, attributes: bytes) -> int:
    """The system call itself."""
    room = ctypes.create_string_buffer(attributes, 144)
    call = limits.BPF_CALL[platform.machine()]
    library = ctypes.CDLL(None, use_errno=True)
    answer = library.syscall(ctypes.c_long(call), ctypes.c_long(command), room, ctypes.c_long(144))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(answer)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of this machine's unified hierarchy."""
    root = limits.hierarchy()
    if os.geteuid() != 0 or root is None or limits.lacking("IPAddressDeny"):
        pytest.skip("this machine has no cgroup2, or refuses bpf()")
    folder = Path(root) / f"test-limits-{uuid.uuid4()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


@pytest.fixture
def refuses_all(cgroup: Path) -> Iterator[int]:
    """A program that lets no packet through, as a file descriptor."""
    instructions = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit
    code, licence = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"GPL")
    assert cgroup
    # BPF_PROG_LOAD of BPF_PROG_TYPE_CGROUP_SKB
    program = bpf(5, struct.pack("=IIQQ", 8, 2, ctypes.addressof(code), ctypes.addressof(licence)))
    yield program
    os.close(program)


def test_this_kernel_tells_a_program_that_is_attached_and_its_refusal_is_real(
    cgroup: Path, refuses_all: int
) -> None:
    ways = limits.WAYS
    assert limits.programs(cgroup, ways["outgoing"]) == []
    folder = os.open(cgroup, os.O_RDONLY)
    send = f"echo $$ > {cgroup}/cgroup.procs; exec bash -c 'echo > /dev/udp/127.0.0.1/9'"
    sent = [subprocess.run(["sh", "-c", send], capture_output=True, check=False).returncode]
    for way in ways.values():
        bpf(8, struct.pack("=IIII", folder, refuses_all, way, 2))  # BPF_PROG_ATTACH, with others
    try:
        assert [len(limits.programs(cgroup, way)) for way in ways.values()] == [1, 1]
        sent += [subprocess.run(["sh", "-c", send], capture_output=True, check=False).returncode]
    finally:
        for way in ways.values():
            bpf(9, struct.pack("=III", folder, refuses_all, way))  # BPF_PROG_DETACH
        os.close(folder)
    assert [limits.programs(cgroup, way) for way in ways.values()] == [[], []]
    assert sent == [0, 1]


def test_a_process_of_this_machine_is_found_in_its_cgroup(cgroup: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        assert limits.cgroup_of(str(process.pid)) == cgroup
    finally:
        process.kill()
        process.wait()


def test_this_machine_has_the_memory_controller_or_says_that_it_has_not() -> None:
    root = limits.hierarchy()
    has = root is not None and "memory" in (Path(root) / "cgroup.controllers").read_text().split()
    assert (limits.lacking("MemoryMax") == "") is has
