"""Memory sizes as text. G is 2^30, as in the memory size that a GPU's vendor states."""

from llmcore.config import ConfigError

UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str, name: str = "--memory") -> int:
    """Bytes of 24G, 80GiB or 512M; raises ConfigError that names the option `name`."""
    number, unit = text.upper().removesuffix("IB").removesuffix("B"), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1]]
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name} is '{text}': specify a size such as 24G")
    return size


def gib(size: float) -> str:
    """In GiB with one decimal."""
    return f"{size / 2**30:.1f} GiB"
