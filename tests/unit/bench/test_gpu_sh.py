"""bench/gpu.sh on a machine without a GPU."""

import os
import subprocess
from pathlib import Path

from plugin_modules import ROOT


def test_without_a_gpu_it_says_so_in_a_sentence_and_measures_nothing(tmp_path: Path) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"  # as it answers where there is no driver
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    nvidia_smi.chmod(0o755)
    done = subprocess.run(
        [ROOT / "bench/gpu.sh", "--out", tmp_path / "out"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "nvidia-smi lists no GPU on this machine, so nothing was measured" in done.stdout
    assert not (tmp_path / "out").exists()
