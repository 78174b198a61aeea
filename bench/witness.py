#!/usr/bin/env python3
"""What a look of the witness costs the control node: `llmkeep audit collect` of hosts that have signed heads, by real SSH.

The hosts are addresses of one sshd on loopback, 127.1.0.1 and on, each with a connection, a record's heads and a copy
of its own; what they do is not counted. Counted, by a control group, is the command with all that it starts, Ansible's
processes and the masters of its SSH connections among them. The first look connects, and takes 192 KiB of heads of each
host; then what is kept is made complete by hand, and each later look has one new head of each host, as each minute.
Heads are signed, over no records, which the witness does not read. Needs root, and sshd of Debian's openssh-server:

    .venv/bin/python bench/witness.py --hosts 1 10 40 --heads 1440 43200
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from spent import Spent

from llmproof.heads import Head, Signer

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
PORT = 2222
SEED = bytes(range(32))
SIGNER = Signer("llm-audit/bench", SEED)


def head(number: int) -> bytes:
    """The head of minute NUMBER, as a file of heads has it."""
    at = f"{BEGIN + timedelta(minutes=number):%Y-%m-%dT%H:%M:%S}.000000Z"
    root = hashlib.sha256(str(number).encode()).digest()
    return SIGNER.sign(Head(1000 * (number + 1), root, at)) + b"\n"


def tip(number: int) -> bytes:
    """The same, as the file `tip` has it."""
    return head(number).partition(b"\n\n")[0] + b"\n"


class Hosts:
    """Their folders, and an inventory of them."""

    def __init__(self, folder: Path, count: int, heads: int) -> None:
        self.folder, self.heads = folder, heads
        self.names = [f"llm{number}" for number in range(1, count + 1)]
        (folder / "hosts").mkdir()
        shared = folder / "hosts/heads"  # all hosts have the same: a year's of 100 hosts would be 11 GB
        shared.write_bytes(b"".join(map(head, range(heads))))
        (folder / "hosts/tip").write_bytes(tip(heads - 1))
        for name in self.names:
            record = folder / "hosts" / name
            record.mkdir()
            (record / "verifier").write_text(SIGNER.verifier.text + "\n")
            for each in ("heads", "tip"):
                (record / each).symlink_to(f"../{each}")
        own = folder / "own"
        own.mkdir()
        (own / "heads").write_bytes(b"".join(map(head, range(1440))))
        (own / "verifier").write_text(SIGNER.verifier.text + "\n")
        key = f"-i {folder}/key -o UserKnownHostsFile={folder}/known_hosts -o StrictHostKeyChecking=yes"
        addresses = {
            name: {"ansible_host": f"127.1.{number // 250}.{number % 250 + 1}"}
            for number, name in enumerate(self.names)
        }
        groups = {
            "control": {"hosts": {"ops1": {"ansible_connection": "local"}}},
            "serve": {"hosts": addresses},
        }
        known = {
            "ansible_user": "root",
            "ansible_port": PORT,
            "ansible_ssh_common_args": key,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        (folder / "hosts.yml").write_text(json.dumps({"all": {"vars": known, "children": groups}}))

    def sign(self) -> None:
        """One more head on each host."""
        with (self.folder / "hosts/heads").open("ab") as file:
            file.write(head(self.heads))
        (self.folder / "hosts/tip").write_bytes(tip(self.heads))
        self.heads += 1

    def complete(self) -> None:
        """What is kept of each host, as after as many looks as it takes."""
        for name in self.names:
            shutil.copyfile(self.folder / "hosts/heads", self.folder / "kept" / name / "heads")


@contextmanager
def sshd(program: str, folder: Path) -> Iterator[None]:
    """It listens on all of 127/8, with keys of its own."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.1.*]:{PORT} {public}")
    options = {
        "Port": PORT,
        "ListenAddress": "0.0.0.0",  # noqa: S104 - one socket for all addresses of loopback; it lets the key below in only
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "key.pub",
        "PidFile": "none",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
        "MaxStartups": 200,
        "SetEnv": f"HOME={folder}",  # not this machine's .bashrc
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", os.devnull, *words], stderr=log)
        try:
            while b"listening" not in (folder / "sshd.log").read_bytes():
                if server.poll() is not None:
                    sys.exit((folder / "sshd.log").read_text())
                time.sleep(0.05)
            yield
        finally:
            server.terminate()
            server.wait()


def look(folder: Path) -> int:
    """`llmkeep audit collect` of the hosts in FOLDER, in this process; prints the seconds of CPU of it and of its children."""
    from llmkeep import cli
    from llmkeep.record import runs, witness

    os.environ |= {"ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"), "TMPDIR": "/run"}
    witness.KEPT, witness.COPY = folder / "kept", folder / "copy"
    witness.RECORD = folder / "hosts/{{ inventory_hostname }}"
    witness.SEEN = folder / "seen/{{ inventory_hostname }}"
    runs.FOLDER = folder / "own"
    code = cli.main(["audit", "collect", "-i", str(folder / "hosts.yml")])
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    told = {
        "own": own.ru_utime + own.ru_stime,
        "children": children.ru_utime + children.ru_stime,
        "rss": own.ru_maxrss,
    }
    print(json.dumps(told))
    return code


def measured(spent: Spent, hosts: Hosts) -> dict[str, float]:
    """One look, in a process of its own: seconds of CPU in all, of the command itself, and of Ansible."""
    before = spent.cpu()
    argv = [sys.executable, __file__, "--look", str(hosts.folder)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, preexec_fn=lambda: spent.entry.write_text("0")
    )
    if done.returncode:
        sys.exit(f"the look ended with {done.returncode}: {done.stdout}{done.stderr}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"cpu": spent.cpu() - before, **told}


def case(program: str, count: int, heads: int, looks: int) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, sshd(program, Path(name)), Spent() as spent:
        hosts = Hosts(Path(name), count, heads)
        first = measured(spent, hosts)
        hosts.complete()
        measured(spent, hosts)  # hosts are told for the first time what was seen of them
        rounds = []
        for _ in range(looks):
            hosts.sign()
            rounds.append(measured(spent, hosts))
        for kept in hosts.names:
            if (hosts.folder / "kept" / kept / "heads").stat().st_size != (
                hosts.folder / "hosts/heads"
            ).stat().st_size:
                sys.exit(f"{kept}'s heads are not all kept: what was measured is not a look of the witness")
        middle = {each: statistics.median(one[each] for one in rounds) for each in rounds[0]}
        rest = middle["cpu"] - middle["own"] - middle["children"]
        return (f"{count:>5} {heads:>7} {first['cpu']:>8.2f} {middle['cpu']:>8.2f} {middle['own']:>8.2f} "
                f"{middle['children']:>8.2f} {rest:>8.2f} {middle['rss'] / 1024:>8.0f}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[1440, 43200], help="kept of each host: a day's, a month's"
    )
    parser.add_argument("--looks", type=int, default=3, help="with a new head each; the median is told")
    parser.add_argument("--sshd", default="/usr/sbin/sshd")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.look:
        return look(given.look)
    print(
        "seconds of CPU: a first look; a later one, of it llmkeep itself, Ansible, and what outlives it; MiB of llmkeep"
    )
    print("hosts   heads    first    later  llmkeep  Ansible   masters   MiB")
    for heads in given.heads:
        for count in given.hosts:
            print(case(given.sshd, count, heads, given.looks), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
