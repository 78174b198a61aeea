"""bootstrap on a machine whose folders are moved to a temporary one, up to the point where it installs packages."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import small_bundle


@dataclass
class Machine:
    """What bootstrap would write to /srv, /var/lib, /opt and /etc."""

    root: Path
    stick: Path
    meanwhile: str = (
        ""  # a command that is run between the first read of the manifest and the copy of the files
    )

    def bootstrap(self, stick: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the medium's bootstrap up to the point where it installs; another STICK is plugged in first."""
        self.stick = stick or self.stick
        return subprocess.run(["sh", str(self.script())], capture_output=True, text=True, check=False)

    def script(self) -> Path:
        """The stick's bootstrap, with its folders below `root`."""
        text = small_bundle.BOOTSTRAP.read_text()
        signer = re.search(r"^signer='(.*)'$", (self.stick / "bootstrap").read_text(), re.MULTILINE)
        assert signer
        text = text.replace("@SIGNER@", signer[1])
        text, moved = re.subn(r"(?<=[ =])/(srv|var|opt|etc/apt)/", rf"{self.root}/\1/", text)
        assert moved >= 5
        text = text.split("# --- Debian packages")[0]
        text = text.replace('stick=$(dirname "$(readlink -f "$0")")', f"stick={self.stick}")
        copied = '    mkdir -p "$incoming"\n'
        assert copied in text
        text = text.replace(copied, f"{self.meanwhile}\n{copied}")
        script = self.root / "bootstrap"
        script.write_text(text)
        return script

    @property
    def accepted(self) -> list[str]:
        """Bundles that are in place, `current` included."""
        return sorted(path.name for path in self.store.glob("[!.]*"))

    @property
    def store(self) -> Path:
        return self.root / "srv/llmkeep/bundle"
