"""Budgets of logs beside the volumes that they are on, as role elasticsearch compares them before it changes anything."""

import os
import subprocess
import sys
from pathlib import Path

from plugin_modules import ROOT

PROGRAM = ROOT / "roles/elasticsearch/files/space.py"


def said(*words: str) -> str:
    return subprocess.run(
        [sys.executable, PROGRAM, "0.85", *words], check=True, capture_output=True, text=True
    ).stdout


def test_folders_that_are_not_there_yet_count_on_the_volume_that_they_will_be_on(tmp_path: Path) -> None:
    volume = os.statvfs(tmp_path)
    size = volume.f_blocks * volume.f_frsize
    data, snapshots = str(tmp_path / "data"), str(tmp_path / "x/snapshots")
    assert said(data, str(size * 8 // 10)) == ""
    assert said(data, str(size * 4 // 10), snapshots, str(size * 4 // 10)) == ""
    both = said(data, str(size * 5 // 10), snapshots, str(size * 4 // 10))
    assert both.startswith(
        f"{data} and {snapshots} may come to {(size * 5 // 10 + size * 4 // 10) >> 20} MiB, and "
    )
    assert both.endswith(f" has {size >> 20}\n")


def test_folders_on_two_volumes_are_judged_apart(tmp_path: Path) -> None:
    volume = os.statvfs("/dev/shm")
    size = volume.f_blocks * volume.f_frsize
    assert said(str(tmp_path), "1", "/dev/shm/data", str(size)).startswith("/dev/shm/data may come to ")
