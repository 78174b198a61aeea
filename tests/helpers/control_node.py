"""This machine, which has to be Debian 13, as a control node: what a run writes is in a folder, and not on the machine."""

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from plugin_modules import ROOT

# The folder's content over the machine's, for one program and those that it starts.
OVERLAID = """
folder=$1; shift
for each in etc usr/local var/lib; do
  mount -t overlay overlay -o "lowerdir=/$each,upperdir=$folder/$each,workdir=$folder/overlay/$each" "/$each"
done
exec "$@"
"""


class ControlNode:
    """The host ops1 of an inventory, with variables, in the network namespace of the thread that plays."""

    def __init__(self, folder: Path, variables: dict[str, Any]) -> None:
        self.folder = folder
        for each in "etc", "usr/local", "var/lib":
            (folder / each).mkdir(parents=True)
            (folder / "overlay" / each).mkdir(parents=True)
        (folder / "var/lib/llmkeep").mkdir()  # as `bootstrap` does
        host = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3", **variables}
        children = {group: {"hosts": {"ops1": None}} for group in ("control", "kubernetes")}
        inventory = {"all": {"hosts": {"ops1": host}, "children": children}}
        (folder / "inventory.yml").write_text(yaml.safe_dump(inventory))

    def bring(self, path: str, content: bytes) -> None:
        """As an operator does: a file for root alone."""
        file = self.folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o600)

    def play(self, playbook: Path) -> str:
        """What Ansible prints; AssertionError with it if it fails."""
        argv: list[str | Path] = ["unshare", "--mount", "sh", "-euc", OVERLAID, "sh", self.folder]
        argv += [ROOT / ".venv/bin/ansible-playbook", "-i", self.folder / "inventory.yml", playbook]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
