"""The bundle of profile gpu-debian, for `make storm`: built from Debian's mirrors and PyPI, or kept where nothing changed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plugin_modules import ROOT

BUNDLE = ROOT / ".lab/gpu-debian"
BUILT = "GPU_BUNDLE"  # variable with the path of one that is built already, and signed by the lab's keys
KEYS = ROOT / ".lab/keys"
SIGNED_BY = (f"--keys={KEYS}", f"--passphrase-file={ROOT / '.lab/passphrase'}")
DISK = 40e9  # bytes, measured: the bundle, and then an estate of it, or an image and its layers


def timed(what: str, begun: float) -> None:
    """Print how long something took that began at a time of `time.monotonic`."""
    print(f"{what}: {time.monotonic() - begun:.0f} s", flush=True)


def run_llmkeep(*words: str, **environment: str) -> None:
    """Run the command line of llmkeep; AssertionError with its messages if it fails."""
    command = [sys.executable, "-m", "llmkeep", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def gpu_bundle() -> Path:
    """The bundle. The test is skipped where the disk has too little room."""
    if built := os.environ.get(BUILT):
        return Path(built)
    BUNDLE.parent.mkdir(exist_ok=True)
    if shutil.disk_usage(BUNDLE.parent).free < DISK and not BUNDLE.exists():
        pytest.skip(f"`make storm` needs {DISK / 1e9:.0f} GB of disk for the bundle of profile gpu-debian")
    begun = time.monotonic()
    run_llmkeep("bundle", "build", "--profile=gpu-debian", f"--out={BUNDLE}", *SIGNED_BY)
    timed("bundle", begun)
    return BUNDLE
