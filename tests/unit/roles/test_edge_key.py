"""An edge whose key is in an HSM: nginx, OpenSSL's provider, p11-kit and SoftHSM, by the role's own configuration."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from plugin_modules import ROOT, load
from rendered_role import played
from revoked_hosts import Estate
from role_nginx import running
from softhsm import SOFTHSM, double, faulty
from waiting import PATIENCE, listens, own_port

from llmkeep.pki import authority as pki
from llmkeep.places import Places

services = load("module_utils.patch.services")

estate = load("filter.estate")
host_certificate = load("modules.host_certificate")
CLIENT = "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so"
NAME = "llm1.estate.internal"
# systemctl for the one thing that the watch asks of it.
SYSTEMCTL = """#!/bin/sh
case "$*" in
  "reload nginx.service") kill -HUP $(cat {folder}/nginx.pid); echo reloaded >> {folder}/asked ;;
  "--quiet is-active nginx.service") ;;
  *) echo "$*" >> {folder}/asked ;;
esac
"""
NGINX = """
user root;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log info;
events {{ worker_connections 64; }}
http {{
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  access_log off;
  client_header_timeout 600s;
  ssl_protocols TLSv1.3;
  ssl_session_tickets off;
  ssl_session_cache shared:tls:2m;
  include {folder}/edge.conf;
}}
"""


def eventually(what: Callable[[], Any]) -> Any:
    ends = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)
    return found


class Edge:
    """The edge of llm1, its token, and the way between them, in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.lab = folder, double(folder, monkeypatch)
        self.lab.make_tokens(tokens=["llmkeep-edge"])
        self.port = own_port()
        self.pin = folder / "credentials/llmkeep-edge.pin"
        self.pin.parent.mkdir()
        self.seal((folder / "user-pin").read_text())
        self.variables = {
            "__edge_in_hsm": True,
            "__edge_operator_socket": "",
            "__edge_certified_names": [],
            "__edge_address": f"127.0.0.1:{self.port}",
            "__edge_certificate": f"{folder}/pki/edge.pem",
            "__edge_hsm_folder": str(folder),
            "__edge_hsm_pin": "llmkeep-edge.pin",
            "__edge_hsm_token": "pkcs11:token=llmkeep-edge",
            "__edge_watch_seconds": 0.2,
            "ansible_host": "127.0.0.1",
            "base_ipv6": False,
            "edge_answer_seconds": 10,
            "edge_body_bytes": 1024,
            "__edge_chat_page": False,
            "__edge_uploads": False,
            "edge_client_ca_file": "",
            "edge_connections": 64,
            "edge_connections_per_address": 64,
            "edge_gateway_folder": folder,
            "llm_serving_gateways": 1,
            "edge_hsm_module": CLIENT,
            "edge_hsm_relay": "ops1",
            "edge_port": self.port,
            "edge_request_burst": 200,
            "edge_requests_per_second": 100,
            "estate_name": NAME,
            "hsm_edge_token": "llmkeep-edge",
            "hsm_key_label": "llm1",
        }
        self.environment = {
            **os.environ,
            "OPENSSL_CONF": f"{folder}/openssl.cnf",
            "P11_KIT_SERVER_ADDRESS": f"unix:path={folder}/hsm.sock",
            "CREDENTIALS_DIRECTORY": str(self.pin.parent),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
        }
        (folder / "bin/systemctl").write_text(SYSTEMCTL.format(folder=folder))
        (folder / "bin/systemctl").chmod(0o755)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        (folder / "edge.key").write_text(
            estate.pkcs11_key_file("pkcs11:token=llmkeep-edge;object=llm1;type=private")
        )
        for name in "openssl.cnf", "edge.conf", "edge-key.env":
            self.render(name)
        self.place("edge-key", (ROOT / "roles/edge/files/edge-key.sh").read_text())
        lines = (folder / "edge-key.env").read_text().splitlines()
        settings = [line.partition("=") for line in lines if not line.startswith("#")]
        self.environment |= {name: value.strip('"') for name, _, value in settings}
        self.hsm: subprocess.Popen[bytes] | None = None
        self.watch: subprocess.Popen[str] | None = None

    def seal(self, pin: str) -> None:
        """As systemd hands it over, and what it was sealed in."""
        self.pin.write_text(pin)
        self.pin.with_name(f"{self.pin.name}-sealed").write_text(f"sealed {pin}")

    def render(self, name: str) -> None:
        text = (ROOT / f"roles/edge/templates/{name}.j2").read_text()
        shown = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)  # noqa: S701 no HTML
        self.place(name, shown.from_string(text).render(self.variables))

    def place(self, name: str, text: str) -> None:
        """A file of the role with this folder's paths."""
        (self.folder / name).write_text(
            text.replace("/etc/llmkeep/pki", f"{self.folder}/pki")
            .replace("/var/lib/llmkeep-edge", str(self.folder))
            .replace("syslog:server=unix:/run/systemd/journal/dev-log,nohostname,tag=llmkeep_edge", "off;#")
        )

    def come(self, tokens: Sequence[str] = ("llmkeep-edge",)) -> None:
        """The HSM is there, and shows these tokens."""
        where = self.folder / "hsm.sock"
        argv = ["p11-kit", "server", "--foreground", "--name", str(where), "--provider", faulty(self.folder)]
        self.hsm = subprocess.Popen(
            [*argv, *(f"pkcs11:token={each}" for each in tokens)],
            env={**os.environ, "FAULTY_HSM_MODULE": SOFTHSM, "FAULTY_HSM_LOGINS": f"{self.folder}/logins"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        eventually(lambda: listens(where))

    def leave(self) -> None:
        """It goes away with every connection to it."""
        assert self.hsm
        os.killpg(self.hsm.pid, signal.SIGKILL)
        self.hsm.wait()
        self.hsm = None
        (self.folder / "hsm.sock").unlink(missing_ok=True)

    def logins(self) -> int:
        path = self.folder / "logins"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def key(self, **more: Any) -> dict[str, Any]:
        """What hsm_key says of the edge's key."""
        words = {"tokens": ["llmkeep-edge"], "signs": True, "record": None, "state": "probed"}
        (found,) = self.lab.key(**{**words, **more})["key_pairs"]
        return dict(found)

    def certify(self, places: Places) -> dict[str, Any]:
        """As the role does: a request that the HSM signs, and the authority's answer."""
        chain = places.issuing_certificate.read_text() + places.root_certificate.read_text()
        words = {
            "names": [NAME],
            "chain": chain,
            "certificate": None,
            "directory": str(self.folder / "pki"),
            "group": "root",
            "name": "edge",
            "key": str(self.folder / "edge.key"),
            "public_key": self.key()["public_pem"],
            "openssl": ["env", *(f"{name}={self.environment[name]}" for name in ENVIRONMENT), "openssl"],
            "renew_days": 30,
            "reload_unit": "llmkeep-certificate.service",
        }
        asked: dict[str, Any] = host_certificate.settle(words, False)
        if asked["reasons"]:
            signed = pki.sign(places, asked["request"].encode(), [NAME], "llm1").decode()
            host_certificate.settle({**words, "certificate": signed}, False)
        return asked

    def ready(self) -> subprocess.CompletedProcess[str]:
        """What the unit runs before nginx."""
        return self.run(str(self.folder / "edge-key"), "ready")

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        if argv[0].endswith("edge-key"):
            argv = ("sh", *argv)
        return subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def start(self) -> None:
        # It goes into the background, and would keep a pipe open.
        with (self.folder / "start.log").open("w") as log:
            words = ["-c", f"{self.folder}/nginx.conf", "-g", PASSED_ON]
            done = subprocess.run(["/usr/sbin/nginx", *words], env=self.environment, stderr=log, check=False)
        assert done.returncode == 0, (self.folder / "start.log").read_text()

    def keep_watch(self) -> None:
        with (self.folder / "watch.log").open("a") as log:
            self.watch = subprocess.Popen(
                ["sh", str(self.folder / "edge-key"), "watch"],
                env=self.environment,
                text=True,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def handshake(self) -> str:
        """The public key of the certificate that the edge serves; empty where no handshake comes about."""
        trust = ["-CAfile", f"{self.folder}/pki/root.pem", "-verify_return_error", "-verify_hostname", NAME]
        shown = subprocess.run(
            [
                "openssl",
                "s_client",
                "-connect",
                f"127.0.0.1:{self.port}",
                "-servername",
                NAME,
                "-tls1_3",
                *trust,
            ],
            input=b"",
            capture_output=True,
            timeout=60,
            check=False,
        )
        if shown.returncode != 0:
            return ""
        read = subprocess.run(
            ["openssl", "x509", "-noout", "-pubkey"], input=shown.stdout, capture_output=True, check=True
        )
        return read.stdout.decode().strip()

    def session(self, *words: str) -> str:
        """What openssl says of a session that is kept, or taken up again."""
        done = subprocess.run(
            [
                "openssl",
                "s_client",
                "-connect",
                f"127.0.0.1:{self.port}",
                "-servername",
                NAME,
                "-tls1_3",
                *words,
            ],
            input=b"GET / HTTP/1.1\r\nHost: llm1.estate.internal\r\nConnection: close\r\n\r\n",
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.stdout.decode(errors="replace")

    def end(self) -> None:
        if self.watch:
            os.killpg(self.watch.pid, signal.SIGKILL)
            self.watch.wait()
        if (self.folder / "nginx.pid").exists():
            os.kill(int((self.folder / "nginx.pid").read_text()), signal.SIGTERM)
        if self.hsm:
            self.leave()


# What the role's unit has nginx pass on to the one that takes its place.
UNIT = (ROOT / "roles/edge/templates/nginx-hsm.service.j2").read_text()
PASSED_ON = " ".join(re.findall(r"env \w+;", UNIT))
ENVIRONMENT = ("OPENSSL_CONF", "P11_KIT_SERVER_ADDRESS", "CREDENTIALS_DIRECTORY")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node whose sealing is left out."""
    found = Places(tmp_path / "control")
    monkeypatch.setattr(pki, "seal", lambda secret, _: secret)
    monkeypatch.setattr(pki, "unseal", lambda sealed, _: sealed)
    monkeypatch.setattr(pki, "encrypt_to", lambda *_: b"")
    pki.init(found, "estate.internal", Path("escrow.pem"), list(pki.NETWORKS))
    return found


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: Places) -> Iterator[Edge]:
    """An edge that has its key and its certificate; nginx does not run yet."""
    found = Edge(tmp_path, monkeypatch)
    found.key(state="present")
    found.come()
    try:
        found.certify(places)
        yield found
    finally:
        found.end()


def test_serves_by_tls_1_3_with_the_key_of_the_token_which_is_in_no_file(edge: Edge) -> None:
    assert edge.ready().returncode == 0
    edge.start()
    assert edge.handshake() == edge.key()["public_pem"]
    held = subprocess.run(
        ["grep", "-rlE", "BEGIN (EC )?PRIVATE KEY", str(edge.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [Path(path).parent.name for path in held.stdout.split()] in ([], ["credstore.encrypted"])


def test_an_nginx_that_takes_the_place_of_a_running_one_has_the_key_too(edge: Edge) -> None:
    edge.start()
    assert edge.handshake()
    file = edge.folder / "nginx.pid"
    old = int(file.read_text())
    assert services.replace_nginx(old, file, PATIENCE) != old
    eventually(lambda: not Path(f"/proc/{old}").exists())
    assert edge.handshake() == edge.key()["public_pem"]


def test_a_certificate_that_stands_is_not_asked_for_again_and_one_of_another_key_is(
    edge: Edge, places: Places
) -> None:
    before = edge.logins()
    assert edge.certify(places)["reasons"] == []
    assert edge.logins() == before, "whether it stands is no question for the HSM"
    edge.lab.by_hand(
        lambda session: [session.destroy(each) for each in session.find({})] and None, token="llmkeep-edge"
    )
    edge.key(state="present")
    assert edge.certify(places)["reasons"] == ["it was made for another key"]
    edge.start()
    assert edge.handshake() == edge.key()["public_pem"]


def test_comes_back_by_itself_when_the_hsm_does_and_open_connections_stay(edge: Edge) -> None:
    edge.start()
    edge.keep_watch()
    assert edge.handshake()
    with socket.create_connection(("127.0.0.1", edge.port)) as still_open:
        edge.leave()
        assert edge.handshake() == ""
        assert edge.handshake() == ""
        eventually(lambda: "shows no token llmkeep-edge" in (edge.folder / "watch.log").read_text())
        still_open.setblocking(False)
        with pytest.raises(BlockingIOError):
            still_open.recv(1)
    assert "reloaded" not in (edge.folder / "asked").read_text()
    edge.come()
    eventually(edge.handshake)


def test_whoever_was_there_takes_up_his_session_while_the_hsm_is_away(edge: Edge) -> None:
    edge.start()
    kept = f"{edge.folder}/session"
    assert "New, TLSv1.3" in edge.session("-ign_eof", "-sess_out", kept)
    edge.leave()
    assert edge.handshake() == ""
    assert "Reused, TLSv1.3" in edge.session("-ign_eof", "-sess_in", kept)


def test_nginx_starts_while_the_hsm_is_away_and_serves_when_it_comes(edge: Edge) -> None:
    edge.leave()
    assert edge.ready().returncode == 0
    edge.start()
    assert edge.handshake() == ""
    edge.keep_watch()
    edge.come()
    eventually(edge.handshake)


def test_a_pin_that_is_refused_is_shown_once_and_not_by_every_worker(edge: Edge) -> None:
    right = edge.pin.read_text()
    edge.seal("9999999999")
    before = edge.logins()
    done = [edge.ready() for _ in range(3)]
    assert [each.returncode for each in done] == [1, 1, 1]
    assert edge.logins() == before + 1
    assert "does not take the PIN, which was tried once" in done[0].stdout
    assert "refused this PIN before" in done[2].stdout
    edge.seal(right)
    assert "says user-pin-count-low so no login was tried" in edge.ready().stdout
    edge.lab.by_hand(lambda _session: None, token="llmkeep-edge")
    assert edge.ready().returncode == 0


def test_a_worker_shows_a_wrong_pin_once_however_many_handshakes_it_gets(edge: Edge) -> None:
    edge.seal("9999999999")
    edge.start()
    before = edge.logins()
    assert [edge.handshake() for _ in range(8)] == [""] * 8
    assert edge.logins() - before <= 2, "there are two workers"


def test_a_pin_that_the_provider_would_cut_short_is_not_shown(edge: Edge) -> None:
    edge.seal("7" * 32)
    before = edge.logins()
    done = edge.ready()
    assert (done.returncode, edge.logins()) == (1, before)
    assert "has 32 characters and OpenSSL's provider reads 31" in done.stdout


def test_no_login_is_tried_while_the_token_warns(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    edge.leave()
    monkeypatch.setenv("FAULTY_HSM_FLAGS", "0x20000")
    edge.come()
    before = edge.logins()
    done = edge.ready()
    assert (done.returncode, edge.logins()) == (1, before)
    assert "says user-pin-final-try so no login was tried" in done.stdout


def test_a_label_too_long_for_the_key_file_is_refused() -> None:
    with pytest.raises(ValueError, match="take shorter labels"):
        estate.pkcs11_key_file("pkcs11:token=" + "x" * 120)


def test_an_edge_s_leftovers_are_what_its_way_to_the_hsm_brings() -> None:
    folder = "/etc/llmkeep/edge-hsm"
    (tree,) = (
        task["llmkeep.estate.config_tree"]
        for task in yaml.safe_load((ROOT / "roles/edge/tasks/hsm.yml").read_text())
        if "llmkeep.estate.config_tree" in task
    )
    brought = {entry["dest"].replace("{{ __edge_hsm_folder }}", folder) for entry in tree["files"]}
    known = set(yaml.safe_load((ROOT / "roles/edge/vars/main.yml").read_text())["__edge_hsm_paths"])
    # Certificate and PIN come by other modules.
    assert known - {"/etc/llmkeep/pki/edge.pem", "{{ __edge_hsm_sealed }}"} == brought


@pytest.fixture
def clients(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> Estate:
    """Certificates of the estate: of the edge's host, of one that runs Prometheus, and of one that is revoked."""
    (edge.folder / "clients").mkdir()
    found = Estate(edge.folder / "clients", monkeypatch)
    for name in ("host", "ops1", "train1"):
        found.certificate(name)
    found.revoke("train1")
    return found


def beside_other_tokens(edge: Edge, places: Places) -> None:
    """The HSM shows the volumes' token, too, whose PIN is another one, and that one first."""
    edge.lab.seal("volumes-pin", "aaaaaaaaaaaaaaaa")
    names = ["llmkeep-edge", "llmkeep"]
    shown: list[str] = []
    while shown != ["llmkeep", "llmkeep-edge"]:  # the order is that of their serials, which are random
        edge.leave()
        for path in [*edge.folder.glob("tokens/*"), *edge.folder.glob("*.json")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        edge.lab.make_tokens(tokens=names[:1])
        record = str(edge.folder / "volumes.json")
        edge.lab.make_tokens(tokens=names[1:], user_pin=str(edge.folder / "volumes-pin"), record=record)
        edge.come(names)
        shown = re.findall(
            "^token: (.*)$",
            edge.run("p11-kit", "list-tokens", "--provider", CLIENT, "pkcs11:").stdout,
            re.MULTILINE,
        )
    edge.key(state="present")
    edge.certify(places)


def metrics(clients: Estate) -> tuple[int, str]:
    """The port of the listener of role exporters, which answers only itself here, and nginx's configuration of it."""
    port = own_port()
    given = {
        "__exporters_clients": ["ops1"],
        "__exporters_edges": [],
        "__exporters_ports": {},
        "ansible_host": "127.0.0.1",
        "estate_name": NAME,
        "exporters_port": port,
        "inventory_hostname": "llm1",
    }
    text = (ROOT / "roles/exporters/templates/exporters.conf.j2").read_text()
    shown = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)  # noqa: S701 no HTML
    server = shown.from_string(text).render(given).replace("/etc/llmkeep/pki", str(clients.folder))
    pair = f"ssl_certificate {clients.folder}/host.pem; ssl_certificate_key {clients.folder}/host.key;"
    return port, server.replace("server {", f"server {{ {pair}", 1)


def answers(clients: Estate, port: int) -> dict[str, str]:
    """The status that each client gets of a path that is not there, if any."""
    said = {name: clients.handshake(port, name) for name in ("ops1", "host", "train1")}
    return {
        name: (re.findall("^HTTP/1.1 ([0-9]+)", text, re.MULTILINE) or ["none"])[0]
        for name, text in said.items()
    }


def test_metrics_are_shown_by_a_process_that_has_no_hsm(edge: Edge, clients: Estate, places: Places) -> None:
    """As role exporters does: whatever the edge did with its key, also while the HSM is away."""
    beside_other_tokens(edge, places)
    edge.start()
    port, server = metrics(clients)
    inside = (
        NGINX.format(folder=edge.folder / "inside")
        .replace("include", f"{server}\n#")
        .replace("env P11", "# env P11")
    )
    (edge.folder / "inside").mkdir()
    with running(edge.folder / "inside", inside.replace(f"pid {edge.folder}/inside/nginx.pid;", "")):
        for _ in range(3):
            assert edge.handshake()
            assert answers(clients, port) == {"ops1": "404", "host": "403", "train1": "400"}
        edge.leave()
        assert answers(clients, port) == {"ops1": "404", "host": "403", "train1": "400"}


def test_the_process_that_has_the_hsm_verifies_clients_there_with_another_tokens_pin(
    edge: Edge, clients: Estate, places: Places
) -> None:
    """Why the role refuses it (decision 0054). Once this fails, OpenSSL or its provider is mended."""
    beside_other_tokens(edge, places)
    port, server = metrics(clients)
    with (edge.folder / "edge.conf").open("a") as file:
        file.write(server)
    configured = edge.folder / "nginx.conf"
    configured.write_text(configured.read_text().replace("worker_processes 2", "worker_processes 1"))
    edge.start()
    assert edge.handshake()
    before = edge.logins()
    assert answers(clients, port) == {"ops1": "none", "host": "none", "train1": "none"}
    assert edge.logins() == before + 1, "the PIN was tried once"
    shown = edge.run("p11-kit", "list-tokens", "--provider", CLIENT, "pkcs11:").stdout
    foreign = shown.partition("token: llmkeep-edge")
    assert "user-pin-count-low" in foreign[0], "at a token that it is not of"
    assert "user-pin-count-low" not in foreign[2].partition("token: ")[0]


def test_a_client_is_known_by_its_certificate_unless_that_is_revoked(edge: Edge, clients: Estate) -> None:
    """With the edge's key in a file: the role refuses it beside a key in the HSM."""
    edge.variables |= {
        "__edge_in_hsm": False,
        "edge_client_ca_file": "given",
        "__edge_client_ca": f"{clients.folder}/root.pem",
        "__edge_client_crl": str(clients.list),
    }
    edge.render("edge.conf")
    pair = f"ssl_certificate {clients.folder}/host.pem; ssl_certificate_key {clients.folder}/host.key;\n"
    configured = edge.folder / "nginx.conf"
    configured.write_text(configured.read_text().replace("  include", f"  {pair}  include"))
    edge.start()
    said = {
        name: edge.session(
            "-ign_eof", "-cert", f"{path}.pem", "-cert_chain", f"{path}.pem", "-key", f"{path}.key"
        )
        for name, path in ((name, clients.folder / name) for name in ("ops1", "train1"))
    }
    assert "HTTP/1.1 503" in said["ops1"], "there is no gateway behind this edge"
    assert "HTTP/1.1 400" in said["train1"]
    assert "bad_certificate" in said["train1"]


def test_the_role_refuses_to_verify_clients_in_the_process_that_has_the_hsm(tmp_path: Path) -> None:
    facts = {
        "distribution": "Debian",
        "distribution_major_version": "13",
        "os_family": "Debian",
        "pkg_mgr": "apt",
    }
    edges: dict[str, dict[str, str]] = {
        "clients": {"edge_key_source": "hsm", "edge_client_ca_file": "/ca.pem"},
        "mirror": {"edge_key_source": "hsm"},
        "none": {"edge_key_source": "hsm"},
        "file": {"edge_key_source": "file", "edge_client_ca_file": "/ca.pem"},
    }
    play = {
        "hosts": "all",
        "connection": "local",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.set_fact": {**facts, "cacheable": True}},
            {"ansible.builtin.import_role": {"name": "llmkeep.estate.edge", "tasks_from": "preflight"}},
        ],
    }
    groups = {"serve": {"hosts": dict.fromkeys(edges)}, "mirror": {"hosts": {"mirror": None}}}
    done = played(tmp_path, play, {"hosts": edges, "children": groups})
    output = " ".join(done.stdout.split())
    refused = dict(part.split("]: FAILED!", 1) for part in output.split("fatal: [")[1:])
    assert set(refused) == {"clients", "mirror"}, done.stdout
    assert "and edge_client_ca_file /ca.pem; nothing was changed" in refused["clients"]
    assert "leave edge_client_ca_file empty" in refused["clients"]
    assert "take the host out of [edge]" in refused["mirror"]
