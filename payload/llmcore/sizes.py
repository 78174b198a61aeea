"""Sizes of memory, as a person writes and reads them. G is 2^30, as for the memory that a card's maker prints on it."""

from llmcore.config import ConfigError

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str, name: str = "--memory") -> int:
    """24G, 80GiB or 512M in bytes; raises ConfigError, which says that `name` is wrong."""
    number, unit = text.upper().removesuffix("IB").removesuffix("B"), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1]]
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name} is '{text}': write a size, such as 24G")
    return size


def gib(size: float) -> str:
    """For people."""
    return f"{size / 2**30:.1f} GiB"
