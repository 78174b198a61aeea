"""Xid events of NVIDIA's driver that this program acts on or counts by code.

Codes, meanings and resolution buckets are facts of NVIDIA's Xid catalog
(https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, columns "Immediate Action" and "Investigatory
Action", as of October 2025); the wording is this project's. Codes whose action depends on fields that NVML events do not
carry (144 to 150, by sub-code) or for which the catalog names no action (162 to 172) are left out: they are counted as
`other`, and what they do to a GPU shows in its readings.
"""

from dataclasses import dataclass
from typing import Literal

# By rising severity. `none` and `restart`: the GPU keeps serving. `reset`: GPU reset, or a reboot, which includes it.
# `inspect`: by a person, at the machine; no reboot clears it.
Action = Literal["none", "restart", "reset", "reboot", "inspect"]
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Xid:
    """One code. `runbook` is an anchor of docs/operate/gpu-health.md."""

    code: int
    meaning: str
    action: Action
    runbook: str

    @property
    def drains(self) -> bool:
        """Whether the GPU must not serve until the action was taken."""
        return self.action in ("reset", "reboot", "inspect")

    @property
    def cleared_by_reboot(self) -> bool:
        """Whether a reboot performs the action."""
        return self.action in ("reset", "reboot")


APPLICATION, MEMORY, BUS, NVLINK = "application-xids", "memory-xids", "bus-xids", "nvlink-xids"
FIRMWARE, POWER = "firmware-xids", "power-xids"

TABLE: dict[int, Xid] = {
    each.code: each
    for each in (
        Xid(8, "the GPU stopped processing for a program", "restart", APPLICATION),
        Xid(11, "a program's command stream is invalid", "restart", APPLICATION),
        Xid(13, "exception of the graphics engine, mostly an access out of bounds", "restart", APPLICATION),
        Xid(25, "a program's command stream is invalid", "restart", APPLICATION),
        Xid(31, "page fault of the GPU's memory, mostly an illegal address", "restart", APPLICATION),
        Xid(32, "a program's command stream is corrupted", "restart", APPLICATION),
        Xid(38, "watchdog of the driver's firmware", "none", FIRMWARE),
        Xid(39, "exception of a copy engine", "restart", APPLICATION),
        Xid(40, "exception of a copy engine", "restart", APPLICATION),
        Xid(41, "exception of a copy engine", "restart", APPLICATION),
        Xid(43, "a program's channel was reset after its own fault", "none", APPLICATION),
        Xid(44, "graphics engine fault during a context switch", "none", APPLICATION),
        Xid(45, "channels removed after an earlier error or the end of a program", "none", APPLICATION),
        Xid(46, "the GPU stopped processing", "reset", FIRMWARE),
        Xid(48, "uncorrectable ECC error", "reset", MEMORY),
        Xid(54, "auxiliary power is not connected", "inspect", POWER),
        Xid(62, "the power management controller halted", "reset", FIRMWARE),
        Xid(63, "a memory row was remapped, or a page retired", "none", MEMORY),
        Xid(64, "a memory row could not be remapped", "reset", MEMORY),
        Xid(68, "exception of a video decoder", "restart", APPLICATION),
        Xid(69, "class error of the graphics engine", "restart", APPLICATION),
        Xid(74, "NVLink error", "reset", NVLINK),
        Xid(79, "the GPU has fallen off the bus", "reboot", BUS),
        Xid(92, "high rate of corrected ECC errors", "none", MEMORY),
        Xid(94, "uncorrectable memory error, contained to one program", "restart", MEMORY),
        Xid(95, "uncorrectable memory error, not contained", "reset", MEMORY),
        Xid(109, "timeout of a context switch", "reset", FIRMWARE),
        Xid(110, "security fault", "reset", FIRMWARE),
        Xid(119, "the GSP firmware does not answer", "reset", FIRMWARE),
        Xid(120, "error of the GSP firmware", "reset", FIRMWARE),
        Xid(121, "error of the chip-to-chip link", "none", NVLINK),
        Xid(136, "training of a link failed", "reset", NVLINK),
        Xid(137, "NVLink privilege error, mostly of a program", "none", NVLINK),
        Xid(140, "unrecovered ECC error", "reset", MEMORY),
        Xid(143, "the GPU failed to initialize", "reset", FIRMWARE),
        Xid(154, "the recommended recovery action has changed, reported with another Xid", "none", FIRMWARE),
        Xid(155, "NVLink error found by the driver", "reset", NVLINK),
        Xid(156, "a resource of the GPU was retired", "reset", MEMORY),
        Xid(157, "a resource of the GPU could not be retired", "none", MEMORY),
        Xid(158, "fatal timeout of the GPU", "reset", FIRMWARE),
    )
}  # fmt: skip


def label(code: int) -> str:
    """The code as a label of metrics: from a closed set, so that no driver adds series."""
    return str(code) if code in TABLE else OTHER
