"""Debian's redis-server with the ACL of the redis role."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from jinja2 import Template
from service import eventually

PASSWORD = "a password for tests"
ACL = Path(__file__).resolve().parents[2] / "roles/redis/templates/users.acl.j2"


class RedisServer:
    """One, on a UNIX socket."""

    def __init__(self, folder: Path) -> None:
        """Start it."""
        self.socket = folder / "redis.sock"
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        users = Template(ACL.read_text()).render(__redis_password={"sha256": digest}, redis_key_prefix="llm:")
        (folder / "users.acl").write_text(users + "\n")
        options = ["--port", "0", "--unixsocket", str(self.socket), "--aclfile", str(folder / "users.acl")]
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("Debian's redis-server is not installed")
        self.command = [
            program,
            *options,
            "--save",
            "",
            "--dir",
            str(folder),
            "--logfile",
            str(folder / "redis.out"),
        ]
        self.start()

    def start(self) -> None:
        """Until its socket is there."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        eventually("Redis listens", self.socket.exists)

    def stop(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)
