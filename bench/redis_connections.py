#!/usr/bin/env python3
"""Measures redis-server's memory per idle connection by mutual TLS 1.3, with the relevant settings of role redis.

Each connection logs in and sends one query, like a gateway's, and is then idle. The output has the server's resident memory per
connection, and the part that Redis itself counts, to which alone maxmemory applies. Without --tls by TCP in clear.

    .venv/bin/python bench/redis_connections.py --connections 500 1000 2000 4000 --tls
"""

import argparse
import datetime
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

REST_SECONDS = 15  # after which Redis has given buffers of idle connections back


def certificate(folder: Path) -> None:
    """One self-signed P-256 certificate for both ends."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
    begin = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def resident(pid: int) -> int:
    """Bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    sys.exit(f"process {pid} has no memory: it has ended")


def ask(connection: socket.socket, command: str) -> bytes:
    """The answer, or a good part of it."""
    connection.sendall(f"{command}\r\n".encode())
    return connection.recv(65536)


def measure(counts: list[int], tls: bool) -> None:
    """Print a line for each number of connections."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        certificate(folder)
        options = [
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            name,
            "--maxclients",
            "20000",
            "--maxmemory",
            "256mb",
        ]
        options += ["--timeout", "0", "--tcp-keepalive", "60", "--requirepass", "secret"]
        options += ["--tls-port" if tls else "--port", str(port)]
        if tls:
            options += ["--port", "0", "--tls-protocols", "TLSv1.3", "--tls-auth-clients", "yes"]
            options += ["--tls-cert-file", f"{name}/cert.pem", "--tls-key-file", f"{name}/key.pem"]
            options += ["--tls-ca-cert-file", f"{name}/cert.pem"]
        context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        context.check_hostname = False
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        held: list[socket.socket] = []

        def connect() -> socket.socket:
            plain = socket.create_connection(("127.0.0.1", port))
            made = context.wrap_socket(plain) if tls else plain
            for command in ("AUTH secret", "SET llm:x 1", "GET llm:x"):
                if ask(made, command)[:1] not in b"+$":
                    sys.exit(f"Redis refuses {command}")
            return made

        def counted(watch: socket.socket) -> int:
            said = ask(watch, "INFO memory").decode()
            return int(said.partition("used_memory:")[2].split()[0])

        try:
            for _ in range(100):
                try:
                    watch = connect()
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                sys.exit("redis-server does not listen after 10 s")
            empty, known = resident(server.pid), counted(watch)
            for count in counts:
                held += [connect() for _ in range(count - len(held))]
                busy = resident(server.pid)
                time.sleep(REST_SECONDS)
                now, own = resident(server.pid), counted(watch)
                each, first, of_redis = ((bytes_now - before) / count / 1024
                                         for bytes_now, before in ((now, empty), (busy, empty), (own, known)))  # fmt: skip
                print(f"{count:>6} connections: {each:.1f} KiB each, {first:.1f} when they came, {of_redis:.1f} by Redis' "
                      f"count; {now / 2**20:.0f} MiB in all, {empty / 2**20:.0f} without")  # fmt: skip
        finally:
            for connection in held:
                connection.close()
            server.terminate()
            server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--tls", action="store_true")
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    measure(sorted(given.connections), given.tls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
