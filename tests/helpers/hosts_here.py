"""This machine as several hosts of Ansible, each of which may be away."""

import shlex
import sys
from pathlib import Path

# What comes in each task's archive is compiled by each task. This takes Ansible's own, which has been: half of its time.
INTERPRETER = """#!{python}
import sys, ansible
exec(sys.stdin.read())
"""
# Like SSH: a host may be away, and has a folder for temporary files, in which no file may come to lie.
CONNECTION = """
DOCUMENTATION = '''
name: here
short_description: this machine as a host
extends_documentation_fragment: [connection_pipelining]
options:
  become_success_timeout: {type: int, default: 120, description: as of local}
  become_strip_preamble: {type: bool, default: true, description: as of local}
'''
import pathlib
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection.local import Connection as Local

class Connection(Local):
    transport = "here"
    _remote_is_local = False

    def exec_command(self, cmd, *args, **kwargs):
        if pathlib.Path("FOLDER", f"away-{self._play_context.remote_addr}").exists():
            raise AnsibleConnectionFailure("No route to host")
        return super().exec_command("READABLE_TREE " + cmd, *args, **kwargs)
"""


def made(folder: Path) -> dict[str, str]:
    """Put the connection `here` and `python-of-hosts` into a folder; returns what Ansible's environment needs.

    A file `away-HOST` there has the host away.
    """
    # The users of hosts run programs of this tree.
    readable_tree = Path(__file__).parent / "readable-tree"
    connection = CONNECTION.replace("FOLDER", str(folder)).replace(
        "READABLE_TREE", shlex.quote(str(readable_tree))
    )
    (folder / "here.py").write_text(connection)
    (folder / "python-of-hosts").write_text(INTERPRETER.format(python=sys.executable))
    (folder / "python-of-hosts").chmod(0o755)
    return {"ANSIBLE_CONNECTION_PLUGINS": str(folder), "ANSIBLE_REMOTE_TMP": "/dev/null/on-the-disk"}
