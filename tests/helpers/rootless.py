"""podman as a user without rights, with storage of its own in a folder; the machine's accounts stay as they are.

The user exists in a mount namespace alone, where /etc/passwd, /etc/subuid and their like are files of the folder. runc starts the
containers, since crun refuses machines that mount cgroup v1 and v2 at once.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, FIRST, COUNT = 54_321, 600_000, 65_536
ACCOUNTS = {
    "passwd": f"root:x:0:0::/root:/bin/sh\ncontainers:x:{USER}:{USER}::{{home}}:/bin/sh\n",
    "group": f"root:x:0:\ncontainers:x:{USER}:\n",
    "subuid": f"containers:{FIRST}:{COUNT}\n",
    "subgid": f"containers:{FIRST}:{COUNT}\n",
}
AS_USER = """
for file in passwd group subuid subgid; do mount --bind "$HOME/.accounts/$file" "/etc/$file"; done
exec "$READABLE_TREE" setpriv --reuid="$1" --regid="$1" --clear-groups --inh-caps=-all "$0" "${@:2}"
"""


@dataclass
class Podman:
    """podman of a user whose home is `home`."""

    home: Path

    def __call__(self, *arguments: str, check: bool = True, stdin: bytes = b"") -> str:
        """Run podman; returns its output. CalledProcessError carries what it said."""
        command = [
            "unshare",
            "--mount",
            "bash",
            "-euc",
            AS_USER,
            "podman",
            str(USER),
            "--runtime=runc",
            "--log-level=error",
        ]
        environment = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "TMPDIR": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            "READABLE_TREE": str(
                Path(__file__).parent / "readable-tree"
            ),  # volumes may be folders of this tree
        }
        done = subprocess.run(
            [*command, *arguments],
            env=environment,
            input=stdin,
            capture_output=True,
            check=False,
            cwd=self.home,
        )
        said = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == 0 or not check, f"podman {' '.join(arguments)}: {said}"
        return done.stdout.decode() if check else said

    def volume(self, name: str) -> Path:
        """Where a volume's files lie."""
        return self.home / ".local/share/containers/storage/volumes" / name / "_data"


@contextmanager
def podman(home: Path) -> Iterator[Podman]:
    """HOME, which the user must be able to reach, belongs to the user. All containers end with the block."""
    accounts = home / ".accounts"
    accounts.mkdir()
    for name, content in ACCOUNTS.items():
        (accounts / name).write_text(content.format(home=home))
    (home / "run").mkdir(mode=0o700)
    for path in (home, home / "run"):
        os.chown(path, USER, USER)
    run = Podman(home)
    try:
        yield run
    finally:
        run("rm", "--all", "--force", "--time=2", "--volumes", check=False)
        run("system", "migrate", check=False)  # ends the process that holds the user's namespaces
