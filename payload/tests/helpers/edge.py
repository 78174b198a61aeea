"""A real nginx with the configuration of the role `edge` in front of a gateway's socket, and CAs made by openssl."""

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jinja2
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from service import PATIENCE, eventually

from llmserve.local_run import free_port

ROLE = Path(__file__).resolve().parents[3] / "roles" / "edge"
AROUND = """
user root;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log warn;
worker_processes 1;
events {{ }}
http {{
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    access_log {folder}/access.log;
    ssl_protocols TLSv1.3;
    ssl_session_cache shared:tls:2m;
    ssl_session_tickets off;
    ssl_certificate {folder}/server.pem;
    ssl_certificate_key {folder}/server.key;
    include {folder}/edge.conf;
}}
"""


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def authority(folder: Path, name: str) -> Path:
    """Create a certificate authority: NAME.pem and NAME.key."""
    made = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    signs = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl("req", "-x509", *P256, "-subj", f"/CN={name}", "-days", "2", *made, *signs)
    return folder / f"{name}.pem"


def issue(ca: Path, name: str, *options: str) -> Path:
    """Issue NAME.pem and NAME.key, signed by `ca`; valid for one day by default."""
    signer = ["-CA", str(ca), "-CAkey", str(ca.with_suffix(".key"))]
    made = ["-keyout", str(ca.with_name(f"{name}.key")), "-out", str(ca.with_name(f"{name}.pem"))]
    extensions = ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    openssl(
        "req", "-x509", *P256, *signer, "-subj", f"/CN={name}", *made, *extensions, *(options or DAY_LONG)
    )
    return ca.with_name(f"{name}.pem")


def revoke(ca: Path, *certificates: Path, days: int = 1) -> Path:
    """Sign a list of revoked certificates, CA.crl, that is valid for `days`."""
    now = datetime.now(UTC)
    issuer = x509.load_pem_x509_certificate(ca.read_bytes())
    key = serialization.load_pem_private_key(ca.with_suffix(".key").read_bytes(), None)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.subject)
    builder = builder.last_update(now - timedelta(days=2)).next_update(now + timedelta(days=days))
    for each in certificates:
        serial = x509.load_pem_x509_certificate(each.read_bytes()).serial_number
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    path = ca.with_suffix(".crl")
    aside = path.with_suffix(".new")
    aside.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    aside.replace(path)
    return path


P256 = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
DAY_LONG = ["-days", "1"]


class Edge:
    """A running edge."""

    def __init__(self, folder: Path, port: int) -> None:
        """`clients`: the CA whose client certificates are accepted."""
        self.folder = folder
        self.port = port
        self.clients = folder / "clients.pem"

    def context(self, certificate: Path | None = None) -> ssl.SSLContext:
        """TLS of a client, optionally with a client certificate."""
        context = ssl.create_default_context(cafile=str(self.folder / "servers.pem"))
        if certificate:
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        return context

    def client(self, certificate: Path | None = None, **headers: str) -> httpx.Client:
        """An HTTP client, optionally with a client certificate."""
        return httpx.Client(
            base_url=f"https://localhost:{self.port}",
            verify=self.context(certificate),
            headers=headers,
            timeout=PATIENCE,
        )

    def asked(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None
    ) -> tuple[bytes, ssl.SSLSession | None]:
        """The answer to one request, which may resume a session, and the session to resume."""
        with (
            socket.create_connection(("localhost", self.port), timeout=PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
        ):
            tls.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: tls.recv(65536), b""))
            return answer, tls.session

    def reload(self) -> None:
        """Take in changed files; returns when no worker from before accepts connections."""
        master = int((self.folder / "nginx.pid").read_text())
        children = Path(f"/proc/{master}/task/{master}/children")
        before = set(children.read_text().split())
        os.kill(master, signal.SIGHUP)
        eventually("the workers are new", lambda: before.isdisjoint(children.read_text().split()))


def render(folder: Path, gateways: int, port: int, **changes: Any) -> None:
    """Render the role's configuration with its defaults and this test's paths."""
    environment = jinja2.Environment(  # noqa: S701 - the output is not HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    variables = yaml.safe_load((ROLE / "defaults/main.yml").read_text()) | {
        "base_ipv6": False,
        "estate_name": "localhost",
        "edge_port": port,
        "__edge_chat_page": False,
        "__edge_uploads": False,
        "edge_gateway_folder": str(folder),
        "llm_serving_gateways": gateways,
        "__edge_in_hsm": False,
        "edge_client_ca_file": "set",
        "__edge_client_ca": str(folder / "clients.pem"),
        "__edge_client_crl": "",
        "__edge_operator_socket": "",
        "__edge_certified_names": [],
        **changes,
    }
    text = environment.get_template("edge.conf.j2").render(variables)
    journal = "syslog:server=unix:/run/systemd/journal/dev-log,nohostname,tag=llmkeep_edge"
    assert journal in text
    (folder / "edge.conf").write_text(text.replace(journal, str(folder / "access.log")))
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder))


@contextmanager
def in_front_of(gateway: Path, folder: Path, *more: Path, **changes: Any) -> Iterator[Edge]:
    """Run nginx within the block, in front of the sockets `gateway` and `more`; `changes` are variables of the role."""
    gateways = gateway, *more
    folder.mkdir()
    for number, path in enumerate(gateways, 1):
        (folder / f"{number}.sock").symlink_to(path)
    servers, _ = authority(folder, "servers"), revoke(authority(folder, "clients"))
    issue(servers, "server")
    with free_port() as port:
        edge = Edge(folder, port)
        render(folder, len(gateways), port, **changes)
        with serving(edge):
            yield edge


@contextmanager
def serving(edge: Edge) -> Iterator[None]:
    """Run nginx in its folder within the block."""
    folder = edge.folder
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    with (folder / "nginx.out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)

    def answers() -> bool:
        assert process.poll() is None, (folder / "nginx.out").read_text()
        with edge.client() as client:
            try:
                return client.get("/livez").status_code == 200
            except httpx.TransportError:
                return False

    try:
        eventually("nginx answers", answers)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)
