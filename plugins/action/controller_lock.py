"""Hold a lock on the control node for as long as this run of Ansible lives."""

from __future__ import annotations

import getpass
import os
import select
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, cast

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

ANSWER_SECONDS = 30
BUSY = 75  # EX_TEMPFAIL of sysexits.h

# On the host: the lock lives as long as this shell, and the shell as long as its standard input.
ON_THE_HOST = """
umask 077; mkdir -p {folder}; exec 9<> {path}
if flock --nonblock 9; then echo {holder} > {path}; echo locked; exec cat > /dev/null; fi
cat {path}; exit {busy}
"""

# Here: keeps ssh's standard input open until the run ends. A pidfd, since a process id may be given again.
WATCH = """
import os, select, subprocess, sys
run = os.pidfd_open(int(sys.argv[1]))
ssh = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE)
gone = os.pidfd_open(ssh.pid)
select.select([run, gone], [], [])
ssh.stdin.close()
sys.exit(ssh.wait())
"""


def script(path: str, holder: str) -> str:
    """What the shell on the host runs."""
    return ON_THE_HOST.format(
        folder=shlex.quote(str(Path(path).parent)),
        path=shlex.quote(path),
        holder=shlex.quote(holder),
        busy=BUSY,
    )


def hold(run: int, command: list[str]) -> tuple[bool, str]:
    """Start the process that holds the lock while process RUN lives; whether it has it, and what was said."""
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(run), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = cast(IO[bytes], watcher.stdout)
    ready, _, _ = select.select([output], [], [], ANSWER_SECONDS)
    if not ready:
        watcher.kill()
        return False, f"no answer within {ANSWER_SECONDS} s"
    line = output.readline().decode(errors="replace").strip()
    if line == "locked":
        return True, ""
    rest = output.read().decode(errors="replace").strip()
    message = " ".join(part for part in (line, rest) if part)
    return False, f"busy: {message}" if watcher.wait() == BUSY else message or f"exit {watcher.returncode}"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller; see the module's documentation."""

    _requires_connection = True
    _supports_check_mode = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec({"path": {"type": "path", "required": True}})
        holder = f"{getpass.getuser()}@{socket.gethostname()}, process {os.getppid()}"
        held, reason = hold(os.getppid(), self._ssh(script(arguments["path"], holder)))
        if not held and reason.startswith("busy: "):
            raise AnsibleActionFail(
                f"another controller is at work on this estate ({reason.removeprefix('busy: ')}); nothing was"
                " changed. Wait until it is done and run again: its lock ends with it, whatever ends it"
            )
        if not held:
            raise AnsibleActionFail(
                f"the lock {arguments['path']} on the control node could not be asked for ({reason}); nothing"
                f" was changed. Try `ssh {self._connection.get_option('host')}` with the same key"
            )
        result.update(changed=False, holder=holder)
        return result

    def _ssh(self, remote: str) -> list[str]:
        """A connection of its own: over Ansible's shared one, the lock would outlive a killed controller."""
        option = self._connection.get_option
        command = [option("ssh_executable")]
        for name in ("ssh_args", "ssh_common_args", "ssh_extra_args"):
            command += shlex.split(option(name) or "")
        command += ["-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "BatchMode=yes"]
        command += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        if option("private_key_file"):
            command += ["-i", str(option("private_key_file"))]
        if option("port"):
            command += ["-p", str(option("port"))]
        if option("remote_user"):
            command += ["-l", str(option("remote_user"))]
        return [*command, str(option("host")), remote]
