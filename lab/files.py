"""Copies of files by `cp`, which preserves holes, links, owners and attributes."""

import shutil
import subprocess
from pathlib import Path

from lab.errors import LabError


def copy(source: Path, target: Path, *options: str) -> None:
    """Run `cp` with these options; on failure raises LabError and leaves nothing at `target`."""
    command = ["cp", "--reflink=auto", *options, str(source), str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        raise LabError(f"could not copy {source}: {done.stderr.strip()}; is the disk full?")


def copy_sparse(source: Path | str, target: Path | str) -> None:
    """Copy a sparse file and keep its holes."""
    copy(Path(source), Path(target), "--sparse=auto")
