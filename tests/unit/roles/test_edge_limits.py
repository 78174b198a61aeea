"""Sources that open connections to the edge and send no request: the roles' nginx and nftables in network namespaces."""

import http.client
import json
import os
import re
import select
import shutil
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread
from typing import Any

import pytest
from namespaces import cabled, inside, ip, namespace
from plugin_modules import ROOT
from rendered_role import content, rendered
from role_nginx import COMMON, configuration, running
from waiting import until

NAME, PORT = "llm1.estate.internal", 443
HOSTS = {NAME: "10.0.0.12", "ops1.estate.internal": "10.0.0.11"}
GROUPS = {"control": ["ops1"], "mirror": ["ops1"], "serve": ["llm1"], "edge": ["llm1"]}
ADDRESS = {"ip": "10.0.0.12", "ip6": "2001:db8:0:1::12"}
NEIGHBOUR = {"ip": "10.0.0.7", "ip6": "2001:db8:0:7::1"}
IP_FREEBIND = 15  # linux/in.h: an address of a network that is this host's, without being an interface's
LIMIT, WORKER = 128, 256  # connections: of one source, by default; of nginx's worker, here
HEADS = 300
GIVEN = {"base_ipv6": True, "llm_serving_gateways": 1, "role_path": str(ROOT / "roles/base")}


def edge_of(source: str) -> tuple[str, int]:
    """Where the edge is for this source."""
    return ADDRESS["ip6" if ":" in source else "ip"], PORT


class Gateway(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "nginx"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


@dataclass
class Edge:
    """An edge with its firewall in one namespace, and the other namespace, where its clients are."""

    folder: Path
    host: int
    clients: int
    held: list[socket.socket] = field(default_factory=list)

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "pki/host.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    def load(self, rules: str) -> None:
        with inside(self.host):
            subprocess.run(["nft", "--file", "-"], input=rules, text=True, check=True)

    def refused(self) -> int:
        """Packets that the firewall refused."""
        with inside(self.host):
            shown = subprocess.run(
                ["nft", "list", "counter", "inet", "llmkeep", "refused_in"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        return int(re.findall(r"packets (\d+)", shown)[0])

    def served(self, source: str, path: str = "/livez") -> float:
        """Seconds that a whole request takes, the handshake included; OSError where it is not served."""
        begin = time.perf_counter()
        raw = self.bound(source)
        raw.settimeout(5)
        raw.connect(edge_of(source))
        with self.trust().wrap_socket(raw, server_hostname=NAME) as secure:
            secure.sendall(f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode())
            answer = http.client.HTTPResponse(secure)
            answer.begin()
            assert answer.status == 200
        return time.perf_counter() - begin

    def bound(self, source: str) -> socket.socket:
        """A socket of the clients' that speaks as this source."""
        with inside(self.clients):
            made = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        made.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
        made.bind((source, 0))
        return made

    def connected(self, source: str) -> bool:
        """Whether a connection from this source comes about; it is kept then."""
        refused, made = self.refused(), self.bound(source)
        made.setblocking(False)
        made.connect_ex(edge_of(source))
        until(lambda: select.select([], [made], [], 0)[1] or self.refused() > refused)
        if not select.select([], [made], [], 0)[1]:
            made.close()
            return False
        self.held.append(made)
        return True

    def hold_slow_heads(self, sources: list[str]) -> int:
        """How many requests are begun, from one source after the other, until one is refused; none of them ends its head."""
        for number, source in enumerate(sources):
            if not self.connected(source):
                return number
            self.held[-1].settimeout(2)
            try:
                self.held[-1] = self.trust().wrap_socket(self.held[-1], server_hostname=NAME)
            except OSError:
                return number
            self.held[-1].sendall(f"GET /livez HTTP/1.1\r\nHost: {NAME}\r\nX-Slow: ".encode())
        return len(sources)

    def let_go(self) -> None:
        for each in self.held:
            each.close()
        self.held.clear()


def certificate(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", "/CN=llm1", "-addext", f"subjectAltName=DNS:{NAME}", "-days", "2",
         "-keyout", str(folder / "host.key"), "-out", str(folder / "host.pem")],
        check=True, capture_output=True,
    )  # fmt: skip


def configured(folder: Path) -> tuple[str, str]:
    """nginx's configuration and the firewall's rules: those of _common and base, with the role edge's in them."""
    for each in ("edge", "base"):
        (folder / each).mkdir()
    given = {**GIVEN, "_common_nginx_user": "root", "edge_gateway_folder": str(folder)}
    made = rendered(folder / "edge", "edge", COMMON, "llm1", HOSTS, given, GROUPS, configured=True)
    rules = {"rules": "lookup('ansible.builtin.template', 'nftables.conf.j2')"}
    firewall: str = rendered(folder / "base", "base", rules, "llm1", HOSTS, GIVEN, GROUPS)["rules"]
    firewall = re.sub(r'include "/etc/nftables.d/(refuse|output)-.*', "", firewall)
    for part in ("sets", "input"):
        firewall = firewall.replace(
            f'include "/etc/nftables.d/{part}-*.nft"', content(made, f"{part}-edge.nft")
        )
    assert "include" not in firewall
    journal = "syslog:server=unix:/run/systemd/journal/dev-log,nohostname,tag=llmkeep_edge"
    server = content(made, "conf.d/llmkeep-edge.conf")
    assert journal in server
    server = server.replace(journal, str(folder / "access.log"))
    here = {
        "worker_processes auto": "worker_processes 1",
        "worker_connections 4096": f"worker_connections {WORKER}",
        "client_header_timeout 10s": "client_header_timeout 600s",  # a busy machine needs longer to open them all
    }
    nginx = configuration(folder, made["nginx"], server, here)
    return nginx, firewall


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Edge, str]]:
    if not (os.geteuid() == 0 and shutil.which("nft") and shutil.which("nginx")):
        pytest.skip("a firewall of its own takes root, nft and nginx")
    try:
        os.close(namespace())
    except OSError as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    folder = tmp_path_factory.mktemp("edge")
    certificate(folder / "pki")
    nginx, firewall = configured(folder)
    ends = cabled(
        ["10.0.0.12/24", "2001:db8:0:1::12/64"], ["10.0.0.66/24", "10.0.0.7/24", "2001:db8:0:1::1/64"]
    )
    # Each address of these networks is the clients' own.
    networks = [f"2001:db8:0:{each}::/64" for each in (7, 66)]
    ip(ends[1], *(f"route add local {each} dev lo" for each in networks))
    ip(ends[0], *(f"route add {each} via 2001:db8:0:1::1" for each in networks))
    edge = Edge(folder, *ends)
    edge.load(firewall)
    gateway = Server(str(folder / "1.sock"), Gateway)
    Thread(target=gateway.serve_forever, daemon=True).start()
    with ExitStack() as stack:
        with inside(ends[0]):
            stack.enter_context(running(folder, nginx))
        for neighbour in NEIGHBOUR.values():
            until(
                partial(edge.connected, neighbour)
            )  # the first one waits for routes and link-layer addresses
        edge.let_go()
        yield edge, firewall
    gateway.shutdown()
    gateway.server_close()
    for end in ends:
        os.close(end)


@pytest.fixture
def edge(host: tuple[Edge, str]) -> Iterator[Edge]:
    yield host[0]
    host[0].let_go()
    host[0].load(host[1])


def spread(seconds: list[float]) -> str:
    last = statistics.quantiles(seconds, n=100)[-1]
    return f"median {statistics.median(seconds) * 1000:.1f} ms, p99 {last * 1000:.1f} ms"


@pytest.mark.parametrize(
    ("family", "sources"),
    [
        ("ip", ["10.0.0.66"] * HEADS),
        ("ip6", [f"2001:db8:0:66::{number:x}" for number in range(1, HEADS + 1)]),
    ],
    ids=["one address", "the addresses of one /64"],
)
def test_a_neighbour_is_served_while_one_source_sends_slow_heads(
    edge: Edge, family: str, sources: list[str]
) -> None:
    before = [edge.served(NEIGHBOUR[family]) for _ in range(100)]
    held = edge.hold_slow_heads(sources)
    meanwhile = [edge.served(NEIGHBOUR[family]) for _ in range(100)]
    assert held == LIMIT
    print(f"a neighbour's requests: {spread(before)}; under {held} slow heads: {spread(meanwhile)}")


def test_a_source_whose_connections_ended_is_served_again(edge: Edge) -> None:
    edge.hold_slow_heads(["10.0.0.66"] * HEADS)
    assert not edge.connected("10.0.0.66")
    edge.let_go()
    until(lambda: edge.connected("10.0.0.66"))


def test_a_source_opens_no_more_connections_a_second_than_its_rate(
    edge: Edge, host: tuple[Edge, str]
) -> None:
    rules = host[1]
    for own, here in {
        "rate over 100/second burst 200": "rate over 1/hour burst 20",
        "timeout 3s": "timeout 1h",
    }.items():
        assert own in rules
        rules = rules.replace(own, here)
    edge.load(rules)
    opened = next(number for number in range(HEADS) if not edge.connected("10.0.0.66"))
    assert opened == 20
    assert edge.connected(NEIGHBOUR["ip"])


def test_the_log_has_each_request_but_those_that_found_the_edge_ready(edge: Edge) -> None:
    log = edge.folder / "access.log"
    log.write_text("")
    for path in ("/readyz", "/livez"):
        edge.served(NEIGHBOUR["ip"], path)
    until(log.read_text)
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == ["/livez"]
