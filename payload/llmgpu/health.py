"""Judges the health of a host's GPUs from a reading and the expectations.

Findings either drain (no answer of this GPU can be trusted, or its engine cannot run) or only warn: what makes a GPU
slow is no reason to serve from fewer of them, and taking the load off a hot GPU would cool it and bring the load back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmgpu import history
from llmgpu.declared import COMPUTE, ECC, MIG, PERSISTENCE, POWER, differences
from llmgpu.nvml import SLOWDOWN, Gpu, Reading
from llmgpu.settings import Expect
from llmgpu.xids import TABLE

ADVICE = {
    "reset": "reset the GPU or reboot the host",
    "reboot": "reboot the host",
    "inspect": "have the hardware inspected, then `llm-gpu repaired`",
}
CHECKS = {ECC: "ecc", MIG: "mig", PERSISTENCE: "persistence", POWER: "power", COMPUTE: "compute-mode"}
DRAINING = {ECC, MIG}
IDLE = 0.05  # share of time; below it a GPU may lower its PCIe generation to save power


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `gpu`: its index, or None for the host as a whole. `runbook`: anchor of gpu-health.md."""

    check: str
    text: str
    runbook: str
    drains: bool = True
    gpu: int | None = None

    def __str__(self) -> str:
        return self.text if self.gpu is None else f"GPU {self.gpu}: {self.text}"


def judge(
    reading: Reading | None, trouble: str, expect: Expect, histories: Mapping[str, history.State]
) -> list[Finding]:
    """All findings, those of the host first. `reading`: None if there is no recent one; `trouble` then says why.

    `histories`: by UUID of the GPU.
    """
    if reading is None:
        return [Finding("reading", f"no reading of the GPUs: {trouble}", "no-reading")]
    findings = []
    # Indices shift when the driver no longer counts a GPU, so which engine has lost it is not known.
    if len(reading.gpus) != expect.count:
        text = f"the driver finds {len(reading.gpus)} GPUs, but {expect.count} are expected: see `lspci -d 10de:`"
        findings.append(Finding("count", text, "missing-gpu"))
    for gpu in reading.gpus:
        findings += lost(gpu) if gpu.lost else state_of(gpu, expect)
        findings += xids(gpu, histories.get(gpu.uuid, history.HEALTHY))
    return findings


def lost(gpu: Gpu) -> list[Finding]:
    return [Finding("lost", "it does not answer: reboot the host", "bus-xids", gpu=gpu.index)]


def xids(gpu: Gpu, state: history.State) -> Iterator[Finding]:
    """One finding for each Xid whose advice was not followed yet."""
    for code, action in history.pending(state).items():
        entry = TABLE[code]
        again = f", again after {state[code].reboots} reboots" if state[code].reboots else ""
        text = f"Xid {code} ({entry.meaning}){again}: {ADVICE[action]}"
        yield Finding(f"xid-{code}", text, entry.runbook, gpu=gpu.index)


def state_of(gpu: Gpu, expect: Expect) -> Iterator[Finding]:
    """The findings about a GPU that answers."""

    def finding(check: str, text: str, runbook: str, drains: bool = True) -> Finding:
        return Finding(check, text, runbook, drains, gpu.index)

    if expect.name and gpu.name != expect.name:
        yield finding("name", f"it is a {gpu.name}, but a {expect.name} is expected", "acceptance")
    if gpu.remap_failed:
        yield finding("remap", "a memory row could not be remapped: have the GPU replaced", "memory-xids")
    elif gpu.remap_pending:
        yield finding("remap", "a row remapping is pending: reset the GPU or reboot the host", "memory-xids")
    if gpu.retirement_pending:
        yield finding("pages", "the retirement of a page is pending: reboot the host", "memory-xids")
    if gpu.ecc_uncorrected:
        text = f"{gpu.ecc_uncorrected} uncorrected ECC errors since the driver was loaded"
        yield finding(
            "ecc", text, "memory-xids", drains=False
        )  # Xids 48, 94 and 95 tell which of them matter
    width = expect.pcie_width or gpu.pcie_width_max
    if gpu.pcie_width is not None and width and gpu.pcie_width < width:
        text = f"PCIe has {gpu.pcie_width} lanes, but {width} are expected: reseat the card or the riser"
        yield finding("pcie", text, "bus-xids")
    generation = expect.pcie_generation or gpu.pcie_generation_max
    busy = gpu.utilization is not None and gpu.utilization > IDLE
    if busy and gpu.pcie_generation is not None and generation and gpu.pcie_generation < generation:
        text = f"PCIe runs at generation {gpu.pcie_generation} under load, but {generation} is expected"
        yield finding("pcie", text, "bus-xids", drains=False)
    links = gpu.nvlinks - len(gpu.nvlinks_down)
    # Compared only with what is declared: PCIe cards have links, too, which are up where bridges were plugged in.
    if expect.nvlinks is not None and links < expect.nvlinks:
        down = ", ".join(map(str, gpu.nvlinks_down)) or "those that it does not have"
        yield finding("nvlink", f"{links} of {expect.nvlinks} NVLinks are up; down: {down}", "nvlink-xids")
    yield from settings_of(gpu, expect)
    if slow := [name for bit, name in SLOWDOWN.items() if bit & gpu.throttled and bit != 0x4]:
        limit = f" of {gpu.slowdown_temperature}" if gpu.slowdown_temperature else ""
        text = f"slowed down by {' and '.join(slow)} at {gpu.temperature}{limit} °C: check airflow and power supply"
        yield finding("throttled", text, "throttled", drains=False)


def settings_of(gpu: Gpu, expect: Expect) -> Iterator[Finding]:
    """The differences from the declared settings. Only ECC and MIG affect the resources for computing."""
    for each in differences(gpu, expect):
        waits = ", which takes effect after a reset of the GPU or a reboot" if each.pending else ""
        text = f"{each.setting} is {each.before}, but {each.after} is expected{waits}"
        yield Finding(CHECKS[each.setting], text, "settings", each.setting in DRAINING, gpu.index)
