"""An edge's certificate of another CA: to whom nginx shows it, and what the role's check says of it."""

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from other_authority import Authority, leaf_of, root_of
from plugin_modules import ROOT
from rendered_role import absent, content, rendered
from revoked_hosts import Estate
from role_nginx import COMMON, configuration, running
from waiting import own_port, until

from llmkeep.pki.authority import pem, private

ESTATE, PUBLIC = "llm1.estate.internal", "llm.example.org"
HOSTS = {ESTATE: "127.0.0.1", "ops1.estate.internal": "127.0.0.2"}
GROUPS = {"control": ["ops1"], "mirror": ["ops1"], "serve": ["llm1"], "edge": ["llm1"]}
STATE = {"names": [PUBLIC], "certificate": {"names": [PUBLIC]}}
CERTIFIED = {"__edge_public_read": {"stdout": json.dumps(STATE)}, "__edge_public": {"installed": True}}


def made(folder: Path, **variables: Any) -> Any:
    """What the role would write."""
    folder.mkdir()
    given = {
        "_common_nginx_user": "root",
        "base_ipv6": False,
        "edge_gateway_folder": str(folder.parent),
        **variables,
    }
    return rendered(folder, "edge", COMMON, "llm1", HOSTS, given, GROUPS, configured=True)


class Edge:
    """nginx by the role's configuration, with an estate's certificate and another CA's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.port = folder, own_port()
        (folder / "pki").mkdir()
        estate = Estate(folder / "pki", monkeypatch)
        estate.certificate("llm1")
        for end in "key", "pem":
            (folder / f"pki/llm1.{end}").rename(folder / f"pki/host.{end}")
        self.root = root_of("example")
        self.issuing = self.root.below("example issuing")
        self.key = ec.generate_private_key(ec.SECP256R1())
        (folder / "pki/public-root.pem").write_bytes(pem(self.root.certificate))
        self.install(self.issuing)
        given = {"edge_port": self.port, "edge_public_names": [PUBLIC], **CERTIFIED}
        tree = made(folder / "role", **given)
        server = content(tree, "conf.d/llmkeep-edge.conf").replace(
            "syslog:server=unix:/run/systemd/journal/dev-log,nohostname,tag=llmkeep_edge", "off;#"
        )
        self.configured = configuration(folder, tree["nginx"], server)

    def install(self, issuer: Authority, *chain: x509.Certificate) -> None:
        """Chain and key as the module leaves them."""
        leaf = leaf_of(issuer, self.key.public_key(), [PUBLIC])
        certificates = [leaf, *(chain or [issuer.certificate])]
        (self.folder / "pki/public.pem").write_bytes(b"".join(map(pem, certificates)) + private(self.key))

    def served(self, name: str | None, root: str) -> str:
        """The issuer of the certificate that a client gets who asks for NAME and trusts ROOT alone."""
        context = ssl.create_default_context(cafile=self.folder / "pki" / root)
        context.check_hostname = name is not None
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name) as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(True) or b"").issuer.rfc4514_string()

    def checked(self) -> subprocess.CompletedProcess[str]:
        """The role's check."""
        program = (ROOT / "roles/pki/files/served_certificate.py").read_text()
        place = self.folder / "served-certificate"
        place.write_text(program)
        place.chmod(0o755)
        text = (ROOT / "roles/edge/files/public-names.sh").read_text()
        text = text.replace("/etc/llmkeep/pki", f"{self.folder}/pki")
        text = text.replace("/usr/local/lib/llmkeep/served-certificate", str(place))
        argv = ["sh", "-c", text, "check", "127.0.0.1", str(self.port), PUBLIC]
        return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edge:
    return Edge(tmp_path, monkeypatch)


@pytest.fixture
def nginx(edge: Edge) -> Iterator[None]:
    with running(edge.folder, edge.configured):
        until(lambda: listens(edge.port))
        yield


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.usefixtures("nginx")
def test_a_public_name_has_the_other_cas_certificate_and_all_else_the_estates(edge: Edge) -> None:
    assert edge.served(PUBLIC, "public-root.pem") == "CN=example issuing"
    for name in (ESTATE, "127.0.0.1", None):
        assert edge.served(name, "root.pem") == "CN=estate.internal issuing"


@pytest.mark.usefixtures("nginx")
def test_the_check_accepts_the_certificate_that_is_served(edge: Edge) -> None:
    done = edge.checked()
    assert done.returncode == 0, done.stdout


def test_the_check_finds_a_chain_without_its_intermediate(edge: Edge) -> None:
    edge.install(edge.issuing, edge.root.certificate)
    with running(edge.folder, edge.configured):
        until(lambda: listens(edge.port))
        done = edge.checked()
    assert done.returncode == 1
    assert "unable to get local issuer certificate" in done.stdout


def test_the_check_finds_a_certificate_of_a_stranger(edge: Edge) -> None:
    edge.install(root_of("stranger"))
    with running(edge.folder, edge.configured):
        until(lambda: listens(edge.port))
        assert edge.checked().returncode == 1


def test_until_a_certificate_is_installed_there_is_no_server_for_the_public_name(tmp_path: Path) -> None:
    waiting = made(tmp_path / "role", edge_public_names=[PUBLIC], __edge_public={"installed": False})
    assert PUBLIC not in content(waiting, "conf.d/llmkeep-edge.conf")
    removed = absent(waiting)
    assert "/etc/llmkeep/pki/public.pem" in removed
    assert "/etc/llmkeep/pki/public.key" not in removed


def test_without_public_names_nothing_of_them_stays(tmp_path: Path) -> None:
    removed = absent(made(tmp_path / "role", **CERTIFIED))
    assert {f"/etc/llmkeep/pki/public{end}" for end in (".pem", ".key", "-root.pem")} <= {*removed}


def test_a_name_that_the_certificate_lacks_is_served_as_the_estates(tmp_path: Path) -> None:
    tree = made(tmp_path / "role", edge_public_names=[PUBLIC, "new.example.org"], **CERTIFIED)
    assert f"server_name {PUBLIC};" in content(tree, "conf.d/llmkeep-edge.conf")
    assert "/etc/llmkeep/pki/public.pem" not in absent(tree)


@pytest.mark.parametrize(
    "name", ["*.example.org", "LLM.example.org", "10.0.0.1", "llm", ESTATE, "ask.estate.internal"]
)
def test_a_public_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "role").mkdir()
    given = {"edge_public_names": [PUBLIC, name], "_common_virtual_names": ["ask.estate.internal"]}
    bad = rendered(tmp_path / "role", "edge", {"bad": "__edge_bad_names"}, "llm1", HOSTS, given, GROUPS)[
        "bad"
    ]
    assert bad == [name]
