"""The stand-ins for NVIDIA's libraries (tests/doubles/nvml), compiled, and a file that says what the GPUs are like."""

import subprocess
from pathlib import Path

BUILD = Path(__file__).parents[3] / "tests/doubles/nvml/build.sh"


def compiled(folder: Path) -> Path:
    """A folder with libnvidia-ml.so.1 and libcuda.so.1, for LD_LIBRARY_PATH."""
    subprocess.run([BUILD, folder], check=True)
    return folder


class Gpus:
    """Simulated GPUs. By default 8 × A100-SXM4-80GB, healthy and idle."""

    def __init__(self, libraries: Path, folder: Path) -> None:
        """`libraries`: of `compiled`. `folder`: where the file goes."""
        self.libraries = libraries
        self.file = folder / "gpus.txt"
        self.become()

    def become(self, *lines: str) -> None:
        """From the next call on they are like this: lines such as "3.lost = 1"; nothing else is left of before."""
        aside = self.file.with_suffix(".new")
        aside.write_text("\n".join(lines) + "\n")
        aside.replace(self.file)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to see them."""
        return {"LD_LIBRARY_PATH": str(self.libraries), "MOCK_NVML_CONFIG": str(self.file)}
