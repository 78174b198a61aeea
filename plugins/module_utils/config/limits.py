"""What the kernel applies of a unit's MemoryMax and IPAddressDeny, read from the kernel.

systemd starts a unit all the same where the kernel has no means to enforce its limits: in a container without the memory
controller, or where seccomp refuses bpf(). So a unit's property alone proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config.units import Refused, shown

LIMITS = ("MemoryMax", "IPAddressDeny")
# The unified hierarchy, on its own or beside the first version's controllers, which then has none of them.
HIERARCHIES = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
PROCESSES = Path("/proc")
PROPERTIES = ["MainPID", "ControlGroup", "MemoryMax", "IPAddressDeny", "IPAddressAllow"]
UNLIMITED = "infinity"

# From linux/bpf.h. The numbers of the system call are those of asm/unistd.h.
BPF_PROG_QUERY = 16
WAYS = {"incoming": 0, "outgoing": 1}  # BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS
BPF_CALL = {
    "x86_64": 321, "i686": 357, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351,
}  # fmt: skip
# Bytes of union bpf_attr that are handed over; a kernel that knows fewer wants the rest to be zero.
ATTRIBUTES = 144
MOST_PROGRAMS = 64  # BPF_CGROUP_MAX_PROGS
NO_MEANS = (errno.EPERM, errno.EINVAL, errno.ENOSYS)


def hierarchy() -> Path | None:
    """Mount point of the unified cgroup hierarchy."""
    return next((place for place in HIERARCHIES if (place / "cgroup.controllers").exists()), None)


def programs(cgroup: Path, way: int) -> list[int]:
    """Ids of the programs attached to this very cgroup for its packets of one of WAYS; OSError as the kernel says it.

    The struct is `query` of union bpf_attr: target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt.
    """
    call = BPF_CALL.get(platform.machine())
    if call is None:
        raise OSError(errno.EOPNOTSUPP, f"the number of bpf() on {platform.machine()} is not known here")
    ids = (ctypes.c_uint32 * MOST_PROGRAMS)()
    folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        asked = struct.pack("=IIIIQI", folder, way, 0, 0, ctypes.addressof(ids), MOST_PROGRAMS)
        attributes = ctypes.create_string_buffer(asked, ATTRIBUTES)
        library = ctypes.CDLL(None, use_errno=True)
        if library.syscall(
            ctypes.c_long(call), ctypes.c_long(BPF_PROG_QUERY), attributes, ctypes.c_long(ATTRIBUTES)
        ):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        count: int = struct.unpack_from("=I", attributes.raw, 24)[0]
        return list(ids)[:count]
    finally:
        os.close(folder)


def lacking(limit: str) -> str:
    """Why this host's kernel cannot enforce a limit; an empty string if it can."""
    root = hierarchy()
    if root is None:
        return "no unified hierarchy of cgroups is mounted"
    if limit == "MemoryMax":
        controllers = (root / "cgroup.controllers").read_text().split()
        names = ", ".join(controllers) or "none"
        return (
            ""
            if "memory" in controllers
            else f"{root} has no memory controller (its controllers are {names})"
        )
    try:
        programs(root, WAYS["outgoing"])
    except OSError as problem:
        if problem.errno in NO_MEANS:
            return f"the kernel refuses bpf() to ask for a cgroup's programs ({problem.strerror})"
        raise
    return ""


def cgroup_of(pid: str) -> Path:
    """The cgroup that a process is in, whatever its unit says."""
    root = hierarchy()
    entries = (PROCESSES / pid / "cgroup").read_text().splitlines()
    path = next((entry[3:] for entry in entries if entry.startswith("0::")), None)
    if root is None or path is None:
        raise OSError(errno.ENOENT, f"process {pid} is in no cgroup of the unified hierarchy")
    return root / path.strip("/")


def runs(properties: dict[str, str]) -> bool:
    """Whether a unit has a main process; a scope, which has none, is judged by its cgroup."""
    return (properties.get("MainPID") or properties["ControlGroup"]) not in ("0", "")


def cgroup_in_use(properties: dict[str, str]) -> Path:
    """The cgroup of the main process of a unit that runs; a scope's own."""
    if pid := properties.get("MainPID"):
        return cgroup_of(pid)
    return (hierarchy() or Path("/")) / properties["ControlGroup"].strip("/")


def memory_fault(properties: dict[str, str], declaration: str, able: bool) -> str:
    """Fault of a unit's memory limit; DECLARATION: bytes, or infinity. Where the kernel is not ABLE, systemd alone is asked."""
    if properties["MemoryMax"] != declaration:
        return f"is to have {properties['MemoryMax']}, declared is {declaration}"
    if declaration == UNLIMITED or not able or not runs(properties):
        return ""
    file = cgroup_in_use(properties) / "memory.max"
    page = os.sysconf("SC_PAGE_SIZE")  # in which the kernel counts
    actual = file.read_text().strip()
    return (
        ""
        if actual == str(int(declaration) // page * page)
        else f"has {actual} in {file}, declared is {declaration}"
    )


def address_fault(properties: dict[str, str], able: bool) -> str:
    """The fault of a unit's address filter, which must deny all addresses except those it allows."""
    if not {"0.0.0.0/0", "::/0"} <= set(properties["IPAddressDeny"].split()):
        return f"is to deny {properties['IPAddressDeny'] or 'no address'}, declared is any"
    if any(network.endswith("/0") for network in properties["IPAddressAllow"].split()):
        return f"allows {properties['IPAddressAllow']}"
    if not able or not runs(properties):
        return ""
    cgroup = cgroup_in_use(properties)
    open_ways = [name for name, way in WAYS.items() if not programs(cgroup, way)]
    return f"has no filter of {' and '.join(open_ways)} packets at {cgroup}" if open_ways else ""


def judged(limit: str, units: dict[str, str]) -> tuple[str, bool, str]:
    """What was seen, whether it holds, and why this host cannot enforce it.

    UNITS: each with its bound, in bytes or infinity; of addresses, any. A unit's own property is looked at on every host, so
    that a wrong one fails even where no kernel would enforce it. A unit that does not run has no more to look at, which is said.
    """
    try:
        reason = lacking(limit)
        properties = shown(list(units), PROPERTIES)
        faults = []
        for unit, declaration in units.items():
            if limit == "MemoryMax":
                fault = memory_fault(properties[unit], declaration, not reason)
            else:
                fault = address_fault(properties[unit], not reason)
            faults += [f"{unit} {fault}"] if fault else []
    except (OSError, Refused) as problem:
        return str(problem), False, ""
    if faults:
        return "; ".join(faults), False, ""
    declared = [unit for unit, declaration in units.items() if declaration != UNLIMITED]
    if reason and declared:
        return f"declared for {', '.join(declared)}, enforced for none", False, reason
    running = [unit for unit in declared if runs(properties[unit])]
    resting = [unit for unit in declared if unit not in running]
    state = f"enforced for {', '.join(running) or 'none'}"
    return state + (f"; not running: {', '.join(resting)}" if resting else ""), True, ""
