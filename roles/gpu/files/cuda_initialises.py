"""cuda_initialises.py DEVICES LOADED VERSION SECONDS WHERE: wait so many seconds until CUDA initialises; exit 1 if it does not.

WHERE: "always", or "nvswitches" for hosts that have some and a loaded driver, whose version is in the file LOADED. A fabric
manager whose unit is active need not have set the switches up, and until then CUDA has no GPU. VERSION, which may be empty: of
the set. While another one is loaded its libraries cannot work, and what is asked for comes by the next boot.
"""

import ctypes
import re
import sys
import time
from pathlib import Path

BRIDGE, NVIDIA = "0x0680", "0x10de"


def switches(devices: Path) -> int:
    """NVSwitches, as sysfs lists PCI devices."""
    places = [(place / "vendor", place / "class") for place in devices.iterdir()] if devices.is_dir() else []
    return sum(
        vendor.read_text().strip() == NVIDIA and kind.read_text().startswith(BRIDGE)
        for vendor, kind in places
    )


def trouble() -> str:
    """Why CUDA does not start; an empty text if it does."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"libcuda.so.1 cannot be loaded: {error}"
    if code := cuda.cuInit(0):
        return f"cuInit failed with {code}: see `journalctl -k` and `journalctl --unit nvidia-fabricmanager`"
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return "" if count.value else "CUDA finds no GPU"


def main() -> int:
    devices, loaded, version, seconds, where = sys.argv[1:]
    if where != "always" and not (switches(Path(devices)) and Path(loaded).exists()):
        return 0
    if version:
        runs = re.search(r"Kernel Module(?: +for \S+)? +([\d.]+)", Path(loaded).read_text())
        if runs and runs[1] != version:
            print(f"the driver {version} is loaded by the next boot, {runs[1]} until then")
            return 0
    end = time.monotonic() + float(seconds)
    while (wrong := trouble()) and time.monotonic() < end:
        time.sleep(1)
    print(wrong or "CUDA initialises")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
