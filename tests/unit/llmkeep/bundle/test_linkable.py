"""Which files of this host may be linked into a bundle or release, on real mounts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkeep.bundle.join import linkable

ON_A_MOUNT_OF_ITS_OWN = """
import sys
from pathlib import Path
from llmkeep.bundle.join import linkable
print(linkable(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A file in one folder, and another folder of the same disk."""
    file, other = tmp_path / "one" / "file", tmp_path / "other"
    file.parent.mkdir()
    other.mkdir()
    file.touch(0o644)
    return file, other


def test_a_file_of_the_same_disk_is_linked(places: tuple[Path, Path]) -> None:
    assert linkable(*places)


def test_a_file_that_others_can_change_is_not(places: tuple[Path, Path]) -> None:
    places[0].chmod(0o666)
    assert not linkable(*places)


def test_a_folder_that_is_mounted_on_itself_is_another_place(places: tuple[Path, Path]) -> None:
    """As role hardening mounts /home: the device is the same, and the kernel refuses the link."""
    file, other = places
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    script = 'mount --bind "$1" "$1" && exec "$2" -c "$3" "$4" "$1"'
    command = [
        *unshare,
        "sh",
        "-c",
        script,
        "sh",
        str(other),
        sys.executable,
        ON_A_MOUNT_OF_ITS_OWN,
        str(file),
    ]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout == "False\n"
