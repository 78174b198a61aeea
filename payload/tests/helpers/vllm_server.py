"""The real vLLM, built for CPUs: a server of OpenAI's API on a socket. `make peers PEER=vllm` installs it (4 GB)."""

import os
import signal
import subprocess
from pathlib import Path

from service import eventually

PYTHON = Path(__file__).parents[3] / "bench/.venv-vllm/bin/python"
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class VllmServer:
    """One model, in float32, on one core. `socket` answers once `wait` has returned."""

    def __init__(self, folder: Path, model: Path, context: int = 2048) -> None:
        """Start it; log and cache are in `folder`."""
        self.socket = folder / f"{model.name}-vllm.sock"
        self.log = folder / f"{model.name}-vllm.log"
        options = {
            "--model": str(model),
            "--served-model-name": model.name,
            "--uds": str(self.socket),
            "--dtype": "float32",
            "--max-model-len": str(context),
            "--max-num-seqs": "8",
        }
        words = [word for option in options.items() for word in option]
        sizes = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"],
                env=os.environ | QUIET | sizes | {"HOME": str(folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers; raises AssertionError with the end of its log if it exits."""

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return "Application startup complete" in self.log.read_text()

        eventually(f"vLLM has loaded {self.log.stem}", answers, 300)

    def stop(self) -> None:
        """Stop it and its workers."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
