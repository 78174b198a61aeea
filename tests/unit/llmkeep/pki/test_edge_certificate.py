"""An edge's certificate of another CA: what is checked before `site` brings it to the host."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from other_authority import Authority, dns_names, leaf_of, request_for, root_of

from llmkeep import cli
from llmkeep.errors import LlmkeepError
from llmkeep.pki import edges
from llmkeep.pki.authority import PkiError, private
from llmkeep.pki.edges import Edge
from llmkeep.places import Places
from llmkeep.record import runs

NAMES = ["llm.example.org", "ask.example.org"]
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    """The edge's key, which is on its host alone."""
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def root() -> Authority:
    return root_of("example")


@pytest.fixture(scope="module")
def issuing(root: Authority) -> Authority:
    return root.below("example issuing")


@pytest.fixture
def places(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> Places:
    """A control node that the edge's request has reached."""
    found = Places(tmp_path)
    edges.accept(found, "edge1", NAMES, request_for(NAMES, key))
    return found


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def refusal(places: Places, chain: bytes, root: bytes | None = None) -> str:
    """Why the certificate is refused; asserts that nothing was written."""
    before = places.edge("edge1").read_bytes()
    with pytest.raises(PkiError) as caught:
        edges.install(places, "edge1", chain, root, NOW)
    assert places.edge("edge1").read_bytes() == before
    return str(caught.value)


# ---------------------------------------------------------------- request
def test_a_request_is_handed_out_as_the_host_made_it(places: Places, key: ec.EllipticCurvePrivateKey) -> None:
    request = x509.load_pem_x509_csr(places.edge_request("edge1").read_bytes())
    assert request.public_key() == key.public_key()
    assert dns_names(NAMES) == list(
        request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )


@pytest.mark.parametrize("host", ["../../../etc/llmkeep/x", "a/b", "", ".", "a\n"])
def test_a_host_name_that_leads_elsewhere_is_refused(
    places: Places, host: str, key: ec.EllipticCurvePrivateKey
) -> None:
    with pytest.raises(PkiError, match="give the host's name in the inventory"):
        edges.accept(places, host, NAMES, request_for(NAMES, key))


@pytest.mark.parametrize(
    ("request_pem", "reason"),
    [
        (b"x" * 20_000, "has 20000 bytes, more than 16384"),
        (b"\0garbage", "did not send a certificate request"),
        (request_for([*NAMES, "ops1.estate.internal"]), "asks for the names .*ops1.estate.internal"),
        (request_for(NAMES[:1]), "asks for the names"),
        (request_for(NAMES, rsa.generate_private_key(65537, 2048)), "only EC keys"),
    ],
)  # fmt: skip
def test_a_request_that_is_not_what_the_inventory_says_is_refused(
    places: Places, request_pem: bytes, reason: str
) -> None:
    before = places.edge("edge1").read_bytes()
    with pytest.raises(PkiError, match=reason):
        edges.accept(places, "edge1", NAMES, request_pem)
    assert places.edge("edge1").read_bytes() == before


@pytest.mark.parametrize("name", ["*.example.org", "10.0.0.1/8", "LLM.example.org", "llm", "a_b.example.org"])
def test_a_public_name_that_no_certificate_should_have_is_refused(places: Places, name: str) -> None:
    with pytest.raises(PkiError, match="lowercase DNS names without wildcards"):
        edges.accept(places, "edge1", [name], b"")


def test_a_document_of_a_newer_format_is_refused(places: Places) -> None:
    path = places.edge("edge1")
    path.write_text(path.read_text().replace('"format": 1', '"format": 2, "bundle": 9'))
    with pytest.raises(
        LlmkeepError, match="has format 2, and this llmkeep reads 1: bundle serial 9 wrote it"
    ):
        edges.hand_out(places, "edge1")


# ---------------------------------------------------------------- install
def test_a_good_certificate_is_for_the_next_site_to_bring(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    leaf = leaf_of(issuing, key.public_key(), NAMES)
    edge = edges.install(places, "edge1", pem(leaf, issuing.certificate, root.certificate), None, NOW)
    edge.write(places, "edge1")
    assert Edge.read(places, "edge1") == edge
    assert edge.certificate is not None
    assert edge.certificate.chain.encode() == pem(leaf, issuing.certificate)
    assert edge.certificate.root.encode() == pem(root.certificate)


def test_the_order_of_a_chain_is_repaired(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    leaf = leaf_of(issuing, key.public_key(), NAMES)
    edge = edges.install(places, "edge1", pem(root.certificate, issuing.certificate, leaf), None, NOW)
    assert edge.certificate is not None
    assert edge.certificate.chain.encode() == pem(leaf, issuing.certificate)


def test_a_wildcard_is_good_for_the_names_below_it(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    leaf = leaf_of(issuing, key.public_key(), ["*.example.org"])
    edge = edges.install(places, "edge1", pem(leaf, issuing.certificate), pem(root.certificate), NOW)
    assert edge.certificate is not None
    assert edge.certificate.names == NAMES


def test_a_renewal_needs_no_root_again(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    leaf = leaf_of(issuing, key.public_key(), NAMES)
    edges.install(places, "edge1", pem(leaf, issuing.certificate), pem(root.certificate), NOW).write(
        places, "edge1"
    )
    again = pem(leaf_of(issuing, key.public_key(), NAMES), issuing.certificate)
    assert edges.install(places, "edge1", again, None, NOW).certificate


type Make = Callable[[Authority, ec.EllipticCurvePublicKey], x509.Certificate]
STRANGER = ec.generate_private_key(ec.SECP256R1())
BAD: dict[str, tuple[Make, str]] = {
    "other key": (
        lambda ca, _: leaf_of(ca, STRANGER.public_key(), NAMES),
        "no certificate in CHAIN is for the key",
    ),
    "expired": (
        lambda ca, key: leaf_of(ca, key, NAMES, end=NOW - timedelta(days=1)),
        r"ends at .*this host's clock says",
    ),
    "few days": (
        lambda ca, key: leaf_of(ca, key, NAMES, end=NOW + timedelta(days=6)),
        "at least 7 more days",
    ),
    "not yet valid": (
        lambda ca, key: leaf_of(ca, key, NAMES, begin=NOW + timedelta(days=1)),
        r"is valid from .*this host's clock says",
    ),
    "a name missing": (
        lambda ca, key: leaf_of(ca, key, NAMES[:1]),
        r"is not for ask\.example\.org: it names llm\.example\.org",
    ),
    "no names": (lambda ca, key: leaf_of(ca, key, []), "it names nothing"),
    "a CA": (lambda ca, key: leaf_of(ca, key, NAMES, ca=True), "is a CA certificate"),
    "clientAuth": (
        lambda ca, key: leaf_of(ca, key, NAMES, usages=[ExtendedKeyUsageOID.CLIENT_AUTH]),
        r"usages 1\.3\.6\.1\.5\.5\.7\.3\.2: .*serverAuth",
    ),
    "no usage": (lambda ca, key: leaf_of(ca, key, NAMES, usages=[]), "usages none"),
    "forged": (lambda ca, key: leaf_of(replace(ca, key=STRANGER), key, NAMES), "does not verify against"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_a_certificate_that_clients_would_refuse_is_refused(
    places: Places,
    key: ec.EllipticCurvePrivateKey,
    issuing: Authority,
    root: Authority,
    make: Make,
    reason: str,
) -> None:
    chain = pem(make(issuing, key.public_key()), issuing.certificate, root.certificate)
    assert re.search(reason, refusal(places, chain))


def test_a_missing_intermediate_is_named(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    said = refusal(places, pem(leaf_of(issuing, key.public_key(), NAMES)), pem(root.certificate))
    assert "the certificate of 'CN=example issuing' is missing in CHAIN" in said


def test_a_chain_without_a_root_is_refused_until_one_is_given(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority
) -> None:
    said = refusal(places, pem(leaf_of(issuing, key.public_key(), NAMES), issuing.certificate))
    assert "'CN=example root': give the root of that CA with --root" in said


def test_another_root_is_refused(places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority) -> None:
    chain = pem(leaf_of(issuing, key.public_key(), NAMES), issuing.certificate)
    assert "is missing in CHAIN" in refusal(places, chain, pem(root_of("stranger").certificate))
    assert "does not verify against" in refusal(places, chain, pem(root_of("example").certificate))


def test_a_weak_intermediate_is_refused(places: Places, key: ec.EllipticCurvePrivateKey) -> None:
    top = root_of("example")
    below = top.below("example weak", rsa.generate_private_key(65537, 1024))  # noqa: S505 the weak one
    chain = pem(leaf_of(below, key.public_key(), NAMES), below.certificate, top.certificate)
    assert "does not verify against" in refusal(places, chain)


def test_a_certificate_signed_with_sha_1_is_refused(
    places: Places, key: ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    """By OpenSSL, since our library signs with no such hash."""
    top = root_of("example")
    assert isinstance(top.key, ec.EllipticCurvePrivateKey)
    (tmp_path / "ca.key").write_bytes(private(top.key))
    (tmp_path / "edge.key").write_bytes(private(key))
    (tmp_path / "ca.pem").write_bytes(pem(top.certificate))
    argv = ["openssl", "req", "-x509", "-sha1", "-key", "edge.key", "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", "/CN=edge",
            "-not_before", f"{NOW - timedelta(days=1):%Y%m%d%H%M%SZ}", "-days", "30",
            "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth"]  # fmt: skip
    leaf = subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True).stdout
    said = refusal(places, leaf + pem(top.certificate))
    assert "is signed with sha1: have the CA sign with SHA-256 or better" in said


def test_a_self_signed_certificate_is_refused(places: Places, key: ec.EllipticCurvePrivateKey) -> None:
    own = Authority.of("CN=llm.example.org", key)
    said = refusal(places, pem(leaf_of(own, key.public_key(), NAMES, subject=own.name)))
    assert "is self-signed" in said


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (b"", "holds no certificates in PEM"),
        (b"\0\1garbage", "give the file that the CA sent"),
        (root_of("x").certificate.public_bytes(serialization.Encoding.DER), "it is DER or PKCS #7; convert it with openssl x509"),
        (b"-----BEGIN CERTIFICATE-----\n" * 4000, "bytes, more than 65536"),
        (pem(root_of("x").certificate) * 11, "has 11 certificates, more than 10"),
        (b"-----BEGIN PRIVATE KEY-----\n" + pem(root_of("x").certificate), "contains a private key"),
    ],
    ids=["empty", "garbage", "DER", "huge", "many", "a key"],
)  # fmt: skip
def test_a_file_that_is_no_chain_is_refused(places: Places, chain: bytes, reason: str) -> None:
    assert reason in refusal(places, chain)


def test_a_host_without_a_request_is_refused(places: Places) -> None:
    with pytest.raises(PkiError, match=r"edge2 has sent no request .* Hosts with a request: edge1"):
        edges.install(places, "edge2", b"", None, NOW)


# ---------------------------------------------------------------- renewal
def installed(places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority) -> None:
    chain = pem(leaf_of(issuing, key.public_key(), NAMES), issuing.certificate, root.certificate)
    edges.install(places, "edge1", chain, None, NOW).write(places, "edge1")


def test_a_new_key_leaves_the_certificate_of_the_retired_one_in_force(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    installed(places, key, issuing, root)
    edges.retire(places, "edge1").write(places, "edge1")
    with pytest.raises(PkiError, match="`--new-key` retired"):
        edges.accept(places, "edge1", NAMES, request_for(NAMES, key))
    edges.accept(places, "edge1", NAMES, request_for(NAMES))
    edge = Edge.read(places, "edge1")
    assert edge is not None
    assert edge.certificate is not None
    assert edge.certificate.key != edge.key


def test_a_host_that_lost_its_key_gets_no_certificate_of_before(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority
) -> None:
    installed(places, key, issuing, root)
    assert "has lost the key" in edges.accept(places, "edge1", NAMES, request_for(NAMES))
    edge = Edge.read(places, "edge1")
    assert edge is not None
    assert edge.certificate is None


def test_a_key_in_an_hsm_is_not_retired_here(places: Places, key: ec.EllipticCurvePrivateKey) -> None:
    edges.accept(places, "edge1", NAMES, request_for(NAMES, key), in_hsm=True)
    with pytest.raises(PkiError, match="is in an HSM"):
        edges.retire(places, "edge1")


# ---------------------------------------------------------------- command line
def test_install_is_on_record_and_again_changes_nothing(
    places: Places, key: ec.EllipticCurvePrivateKey, issuing: Authority, root: Authority, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    events: list[dict[str, object]] = []
    monkeypatch.setattr(runs, "is_kept", lambda _: True)
    monkeypatch.setattr(runs, "append", events.append)
    monkeypatch.setattr("llmkeep.pki.authority.Places", lambda: places)
    file = places.root / "chain.pem"
    file.write_bytes(pem(leaf_of(issuing, key.public_key(), NAMES), issuing.certificate, root.certificate))
    assert cli.main(["pki", "install", "--host", "edge1", str(file)]) == 0
    kept = places.edge("edge1").read_bytes()
    assert cli.main(["pki", "install", "--host", "edge1", str(file)]) == 0
    assert "already has this certificate" in capsys.readouterr().out
    assert places.edge("edge1").read_bytes() == kept
    (event,) = events
    assert event["event.action"] == "pki install edge1"
    assert event["llmkeep.certificate.names"] == NAMES


def test_a_refused_certificate_is_not_on_record(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "is_kept", lambda _: pytest.fail("a record is written"))
    monkeypatch.setattr("llmkeep.pki.authority.Places", lambda: places)
    (places.root / "chain.pem").write_bytes(b"garbage")
    assert cli.main(["pki", "install", "--host", "edge1", str(places.root / "chain.pem")]) == 1
    assert "holds no certificates in PEM" in capsys.readouterr().err
