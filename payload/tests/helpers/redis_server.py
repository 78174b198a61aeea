"""Debian's redis-server with the ACL of the role redis."""

import hashlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from jinja2 import Template
from service import eventually

PASSWORD = "a password for tests"
OTHER = "other"  # a second host that may share a Redis
ACL = Path(__file__).resolve().parents[3] / "roles/redis/templates/users.acl.j2"


class RedisServer:
    """A Redis on a UNIX socket."""

    def __init__(self, folder: Path, more: Sequence[str] = ()) -> None:
        """Start it, with the additional options `more`."""
        self.socket = folder / "redis.sock"
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        passwords = {name: {"sha256": digest} for name in ("__redis_password", "__redis_exporter_password")}
        users = Template(ACL.read_text()).render(
            passwords,
            __redis_client_passwords={"results": [{"sha256": digest, "item": OTHER}]},
            inventory_hostname="local",
        )
        (folder / "users.acl").write_text(users + "\nuser operator on nopass ~* &* +@all\n")
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
            *more,
        ]
        self.start()

    @property
    def settings(self) -> dict[str, str]:
        """The section `redis` of the gateway's configuration; the credential is PASSWORD."""
        return {
            "url": f"unix://{self.socket}",
            "user": "gateway-local",
            "password_credential": "redis.gateway",
        }

    def start_tls(self, ca: Path, certificate: Path) -> int:
        """Listen for clients that have a certificate of CA, as role redis does; returns the port on 127.0.0.1."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        settings = {
            "tls-ca-cert-file": ca,
            "tls-cert-file": certificate,
            "tls-key-file": certificate.with_suffix(".key"),
            "tls-auth-clients": "yes",
            "tls-protocols": "TLSv1.3",
            "tls-port": port,
        }
        with self.client() as operator:
            operator.config_set(*(word for pair in settings.items() for word in map(str, pair)))
        return port

    def client(self) -> redis.Redis:
        """A client that may do everything."""
        return redis.Redis(unix_socket_path=str(self.socket), username="operator", password="any")

    @contextmanager
    def delayed(self, path: Path, seconds: float, made: list[float] | None = None) -> Iterator[Path]:
        """A socket that delays every response by `seconds`; `made` receives the time of each connection."""

        def carry(come: socket.socket, go: socket.socket, late: float) -> None:
            with suppress(OSError):
                while data := come.recv(65536):
                    time.sleep(late)
                    go.sendall(data)
            for end in come, go:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    if made is not None:
                        made.append(time.monotonic())
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(str(self.socket))
                    for pair in (client, server, 0.0), (server, client, seconds):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(100)
            threading.Thread(target=accept, daemon=True).start()
            yield path
            listener.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Start it, and wait until it accepts connections; its socket file exists earlier."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        eventually("Redis listens", self.listens)

    def listens(self) -> bool:
        """Whether it accepts connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)
