"""NVIDIA's cards and NVSwitches of a host, as sysfs lists its PCI devices. No driver is needed to read them.

The role's check runs this file alone: cards.py DEVICES GENERATION... prints the cards, and exits with 1 if there is none or
one of another generation. Standard library only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
NVIDIA = 0x10DE
DISPLAY, BRIDGE = 0x03, 0x0680  # PCI class (upper byte), and class with subclass
# PCI device ids by generation, first and last; chip names as in Debian's pci.ids of 2025-06-09.
GENERATIONS = (
    ("volta", 0x1D81, 0x1DF6),
    ("turing", 0x1E02, 0x1FF9),
    ("turing", 0x2182, 0x21D1),
    ("ampere", 0x2080, 0x20FF),
    ("ampere", 0x2200, 0x223F),
    ("ampere", 0x2414, 0x25FB),
    ("hopper", 0x2302, 0x23F0),
    ("ada", 0x2681, 0x28F8),
    ("blackwell", 0x2900, 0x3340),
)


@dataclass(frozen=True)
class Card:
    """A GPU. `generation` is empty for a device id that the table does not know."""

    address: str
    device: int
    generation: str


def generation(device: int) -> str:
    """Generation of a PCI device id; an empty string if it is unknown."""
    return next((name for name, first, last in GENERATIONS if first <= device <= last), "")


def inventory(devices: Path = DEVICES) -> tuple[list[Card], int]:
    """The GPUs by address, and the number of NVSwitches."""
    cards, switches = [], 0
    for place in sorted(devices.iterdir()) if devices.is_dir() else []:
        vendor, device, kind = (int((place / name).read_text(), 16) for name in ("vendor", "device", "class"))
        if vendor != NVIDIA:
            continue
        if kind >> 16 == DISPLAY:
            cards.append(Card(place.name, device, generation(device)))
        switches += kind >> 8 == BRIDGE
    return cards, switches


def main() -> int:
    devices, *served = sys.argv[1:]
    cards, switches = inventory(Path(devices))
    for card in cards:
        fate = "" if card.generation in served else ": not served"
        print(f"{card.address} 10de:{card.device:04x} {card.generation or 'of no known generation'}{fate}")
    print(f"{len(cards)} GPUs, {switches} NVSwitches")
    return int(not cards or any(card.generation not in served for card in cards))


if __name__ == "__main__":
    sys.exit(main())
