"""Sessions that sudo keeps: made by hand, or by the real sudo in a mount namespace of its own."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

from plugin_modules import ROOT

ACCOUNT = {
    "passwd": "alice:x:1777:1777::/:/bin/sh",
    "group": "llm-operators:x:1777:",
    "shadow": "alice:!*:20000::::::",
}
PAM = "auth required pam_permit.so\naccount required pam_permit.so\nsession required pam_permit.so\n"
# As root, each word of a command by an argument of its own: what the caller types, in a terminal, as alice.
IN_NAMESPACE = """
for each in passwd group shadow sudoers; do mount --bind "$1/$each" "/etc/$each"; done
mount --bind "$1/pam" /etc/pam.d/sudo
cd "$2"
shift 2
for command; do runuser -u alice -- script --quiet --return --command "$command" /dev/null < /dev/null || true; done
"""


def loaded() -> ModuleType:
    """The program of role operators."""
    spec = importlib.util.spec_from_file_location(
        "sudo_output", ROOT / "roles/operators/files/sudo_output.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Host:
    """The folders of a host, and the program on them."""

    def __init__(self, program: ModuleType, root: Path) -> None:
        self.program = program
        self.sessions, self.ledger, self.log = root / "sudo-io", root / "state/ledger", root / "sudo.log"
        self.sessions.mkdir(mode=0o700)
        self.ledger.parent.mkdir(mode=0o700)

    def append(self, mib: int = 256) -> list[str]:
        problems: list[str] = self.program.append(self.sessions, self.ledger, self.log, mib)
        return problems

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]

    def check(self) -> tuple[bool, str]:
        finding = self.program.finding(self.sessions, self.ledger)
        return finding["ok"], finding["observed"]


def session(folder: Path, name: str, ended: bool = True, size: int = 100, **fields: object) -> Path:
    """A session as sudo leaves it, of `systemctl status` unless FIELDS of log.json say otherwise."""
    made = folder / name
    made.mkdir(mode=0o700)
    log = {
        "timestamp": {"seconds": 1796279998, "nanoseconds": 0},
        "submituser": name.split("-")[0],
        "command": "/usr/bin/systemctl",
        "runuser": "root",
        "runargv": ["systemctl", "status", "nginx.service"],
        "submitenv": ["TOKEN=canary"],
    }
    (made / "log.json").write_text(json.dumps(log | fields))
    (made / "ttyout").write_bytes(os.urandom(size))
    (made / "timing").write_bytes(b"")
    (made / "timing").chmod(0o400 if ended else 0o600)
    return made


def log_line(name: str, code: int, folder: str = "/root", command: str = "/usr/bin/systemctl status") -> str:
    """The line by which sudo logs the end of a session."""
    user, second, _ = name.rsplit("-", 2)
    return (
        f"Dec  3 06:39:58 : {user} : TTY=pts/1 ; PWD={folder} ; USER=root ; TSID={user}-{second}-XXXXXX ; "
        f"COMMAND={command} ; EXIT={code}\n"
    )


def lacking() -> str:
    """Why the real sudo cannot be run here; empty where it can."""
    if os.geteuid() != 0:
        return "sudo's own sessions need root"
    programs = [name for name in ("sudo", "unshare", "script", "runuser") if not shutil.which(name)]
    return f"sudo's own sessions need {', '.join(programs)}" if programs else ""


def real(folder: Path, rules: str, commands: list[str], where: Path) -> None:
    """Run COMMANDS of a shell as alice in folder WHERE under the sudoers RULES, its accounts in FOLDER."""
    for name, line in ACCOUNT.items():
        path = folder / name
        path.write_text(f"{Path('/etc', name).read_text()}{line}\n")
        path.chmod(0o600 if name == "shadow" else 0o644)
    (folder / "pam").write_text(PAM)
    (folder / "sudoers").write_text(f"Defaults env_reset, umask=0077\n{rules}")
    (folder / "sudoers").chmod(0o440)
    argv = ["unshare", "--mount", "sh", "-euc", IN_NAMESPACE, "sh", str(folder), str(where), *commands]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def sudo(*words: str) -> str:
    """A command line of sudo that asks for nothing."""
    return shlex.join(["sudo", "--non-interactive", *words])
