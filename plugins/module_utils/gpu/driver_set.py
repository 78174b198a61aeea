"""Whether a driver set fits a host: its cards, its kernel, Secure Boot. Each misfit is a sentence with the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.gpu.cards import Card

# What UEFI tells the kernel: four bytes of attributes, then 1 while Secure Boot is on.
SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")


def secure_boot_is_on(variable: Path = SECURE_BOOT) -> bool:
    """Whether the firmware verified what booted. False without UEFI."""
    return variable.exists() and variable.read_bytes()[4:5] == b"\x01"


def numbers(release: str) -> tuple[int, ...]:
    """Leading version numbers of a kernel release: (6, 12, 118) of 6.12.118+deb13-amd64."""
    leading = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


def misfits(
    driver_set: Mapping[str, Any],
    cards: Sequence[Card],
    switches: int,
    kernel: str,
    secure_boot: bool,
    signs: bool,
) -> Iterator[str]:
    """Why the set cannot run on this host with this kernel; nothing if it can."""
    name = driver_set["name"]
    if not cards:
        yield "it has no NVIDIA GPU on its PCI bus: remove it from the group gpu, or check how the card is seated"
    for card in cards:
        title = f"the GPU {card.address} (PCI id 10de:{card.device:04x})"
        if not card.generation:
            yield f"{title} is of no generation that llmkeep knows: see docs/operate/gpu.md, Generations"
        elif card.generation not in driver_set["generations"]:
            yield (
                f"{title} is {card.generation}, and the set {name} ({driver_set['flavour']}) serves"
                f" {', '.join(driver_set['generations'])}: set gpu_set to one that serves {card.generation}"
            )
    if switches and not driver_set["fabric_manager"]:
        yield (
            f"it has {switches} NVSwitches, but the set {name} has no fabric manager, without which CUDA does not start: "
            "set gpu_set to one that has it"
        )
    limits = driver_set["kernel"]
    if not numbers(limits["from"]) <= numbers(kernel) < numbers(limits["below"]):
        yield (
            f"the kernel that boots next is {kernel}, and the set {name} is for kernels from {limits['from']} and below"
            f" {limits['below']}: set gpu_set to one for this kernel, or build the bundle with a kernel in that range"
        )
    if secure_boot and not signs:
        yield (
            "Secure Boot is on and modules are not signed (gpu_signing is none), so the kernel would load no driver: put"
            " the host into storage and set gpu_signing to hsm (docs/operate/gpu.md)"
        )
