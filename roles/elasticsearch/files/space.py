#!/usr/bin/python3
"""space.py SHARE (FOLDER BYTES)…: volumes whose folders may come to hold more than a SHARE of them, a line each."""

import os
import sys
from collections import defaultdict
from pathlib import Path

share, *pairs = sys.argv[1:]
budgets: dict[Path, dict[str, int]] = defaultdict(dict)
for folder, size in zip(pairs[::2], pairs[1::2], strict=True):
    there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    volume = next(path for path in (there, *there.parents) if path.is_mount())
    budgets[volume][folder] = int(size)
for volume, held in budgets.items():
    status = os.statvfs(volume)
    room, asked = status.f_blocks * status.f_frsize, sum(held.values())
    if asked > room * float(share):
        print(f"{' and '.join(held)} may come to {asked >> 20} MiB, and {volume} has {room >> 20}")
