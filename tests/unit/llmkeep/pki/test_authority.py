"""The estate's certificate authority: what it makes, what it refuses, what a power cut leaves."""

import ipaddress
import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from power_cut import losing_power
from small_authority import DOMAIN, NAMES, opened_with, openssl_accepts

from llmkeep import durable
from llmkeep.escrow import EscrowError
from llmkeep.pki import authority as pki
from llmkeep.pki.authority import PkiError
from llmkeep.places import Places


@pytest.fixture(scope="session")
def escrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An escrow key and its certificate, as `llmkeep keys init` makes them."""
    folder = tmp_path_factory.mktemp("escrow")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow",
         "-keyout", folder / "escrow.key", "-out", folder / "escrow.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "escrow.pem"


@pytest.fixture(autouse=True)
def sealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd-creds needs a host of its own, as the lab has. Here sealing shows, a forgotten one too."""
    monkeypatch.setattr(pki, "seal", lambda secret, _: b"sealed:" + secret)
    monkeypatch.setattr(pki, "unseal", lambda sealed, _: sealed.removeprefix(b"sealed:"))


@pytest.fixture
def places(tmp_path: Path, escrow: Path) -> Places:
    """A control node that was bootstrapped."""
    found = Places(tmp_path)
    pki.init(found, DOMAIN, escrow, list(pki.NETWORKS))
    return found


def request(names: list[str], key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> bytes:
    """What a host sends."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llm1")]))
        .add_extension(x509.SubjectAlternativeName(pki.general_names(names)), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def test_a_signed_certificate_verifies_names_the_host_and_lives_at_most_ninety_days(
    places: Places,
) -> None:
    chain = pki.sign(places, request(NAMES), NAMES, "llm1")
    leaf = x509.load_pem_x509_certificate(chain)
    assert openssl_accepts(places, chain, "-verify_hostname", "llm1.estate.internal")
    assert openssl_accepts(places, chain, "-verify_ip", "10.77.0.12")
    assert not openssl_accepts(places, chain, "-verify_hostname", "ops1.estate.internal")
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(days=90)


def test_the_root_key_is_kept_nowhere_but_encrypted_to_the_escrow_key(places: Places, escrow: Path) -> None:
    opened = opened_with(escrow, places.root_key)
    key = serialization.load_pem_private_key(opened, password=None)
    assert (
        key.public_key() == x509.load_pem_x509_certificate(places.root_certificate.read_bytes()).public_key()
    )
    secret = opened.splitlines()[1]
    for path in (path for path in places.root.rglob("*") if path.is_file()):
        assert secret not in path.read_bytes(), path
    assert places.issuing_key.read_bytes().startswith(b"sealed:")


def test_the_ca_is_constrained_to_the_domain_and_to_private_addresses(places: Places) -> None:
    root = x509.load_pem_x509_certificate(places.root_certificate.read_bytes())
    issuing = x509.load_pem_x509_certificate(places.issuing_certificate.read_bytes())
    for certificate, path_length in ((root, 1), (issuing, 0)):
        limits = certificate.extensions.get_extension_for_class(x509.NameConstraints)
        assert limits.critical
        assert pki.permitted(certificate)[0] == [DOMAIN, "localhost"]
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert (basic.ca, basic.path_length) == (True, path_length)


def test_openssl_itself_refuses_a_name_outside_the_constraints(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "check_names", lambda *_: None)
    assert not openssl_accepts(places, pki.sign(places, request(["example.com"]), ["example.com"], "x"))


@pytest.mark.parametrize(
    "name",
    [
        "example.com",
        "estate.internal.example.com",
        "notestate.internal",
        "*.estate.internal",
        "8.8.8.8",
        "llm1",
    ],
)
def test_refuses_a_name_outside_the_estate(places: Places, name: str) -> None:
    with pytest.raises(PkiError, match="is outside this estate"):
        pki.sign(places, request([name]), [name], "llm1")


@pytest.mark.parametrize(
    "name", ["llm1.estate.internal", "a.b.estate.internal", "localhost", "::1", "fd00::12"]
)
def test_signs_a_name_inside_the_estate(places: Places, name: str) -> None:
    assert openssl_accepts(places, pki.sign(places, request([name]), [name], "llm1"))


@pytest.mark.parametrize(
    "asked",
    [[], ["llm1.estate.internal"], [*NAMES, "ops1.estate.internal"], ["ops1.estate.internal", "10.77.0.12"]],
)
def test_refuses_names_that_the_inventory_does_not_allow_the_host(places: Places, asked: list[str]) -> None:
    with pytest.raises(PkiError, match="but the inventory allows"):
        pki.sign(places, request(asked), NAMES, "llm1")
    assert not places.issued.exists()


def test_refuses_a_key_that_is_not_elliptic(places: Places) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with pytest.raises(PkiError, match="only EC keys"):
        pki.sign(places, request(NAMES, key), NAMES, "llm1")


def test_refuses_a_request_that_was_changed_on_its_way(places: Places) -> None:
    csr = x509.load_pem_x509_csr(request(NAMES))
    changed = csr.public_bytes(serialization.Encoding.DER).replace(b"llm1.estate", b"llm2.estate")
    forged = x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(PkiError, match="changed in transit"):
        pki.sign(places, forged, ["llm2.estate.internal", "10.77.0.12"], "llm2")


@pytest.mark.parametrize("csr", [b"", b"garbage", b"-----BEGIN CERTIFICATE REQUEST-----\n"])
def test_refuses_what_is_no_request(places: Places, csr: bytes) -> None:
    with pytest.raises(PkiError, match="did not send a certificate request"):
        pki.sign(places, csr, NAMES, "llm1")


@pytest.mark.parametrize("days", [0, 91, -1])
def test_refuses_a_life_that_is_too_long_or_none(places: Places, days: int) -> None:
    with pytest.raises(PkiError, match="1 to 90 days"):
        pki.sign(places, request(NAMES), NAMES, "llm1", days)


def test_refuses_when_the_clock_is_outside_the_issuing_certificates_life(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, *_: object) -> "Clock":
            return cls(2001, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(pki, "datetime", Clock)
    with pytest.raises(PkiError, match="set the clock"):
        pki.sign(places, request(NAMES), NAMES, "llm1")


def test_init_again_changes_nothing(places: Places, escrow: Path) -> None:
    before = {path: path.read_bytes() for path in places.root.rglob("*") if path.is_file()}
    assert "already exists" in pki.init(places, DOMAIN, escrow, list(pki.NETWORKS))
    assert before == {path: path.read_bytes() for path in places.root.rglob("*") if path.is_file()}


def test_init_refuses_another_domain_than_the_cas(places: Places, escrow: Path) -> None:
    with pytest.raises(PkiError, match=r"created for estate\.internal, not for other\.internal"):
        pki.init(places, "other.internal", escrow, [])


@pytest.mark.parametrize(
    "domain", ["", "internal", "Estate.Internal", "estate..internal", "a b.internal", "-x.internal"]
)
def test_init_refuses_what_is_no_domain(tmp_path: Path, escrow: Path, domain: str) -> None:
    with pytest.raises(PkiError, match="--domain"):
        pki.init(Places(tmp_path), domain, escrow, [])
    assert not list(tmp_path.iterdir())


def test_init_refuses_a_weak_escrow_key_and_writes_nothing(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-subj", "/CN=weak",
         "-keyout", tmp_path / "weak.key", "-out", tmp_path / "weak.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(EscrowError, match="RSA of 2048 bits"):
        pki.init(Places(tmp_path / "host"), DOMAIN, tmp_path / "weak.pem", [])
    assert not (tmp_path / "host").exists()


@pytest.mark.parametrize("cut", range(4))
def test_init_that_lost_power_at_any_write_is_made_whole_by_the_next(
    tmp_path: Path, escrow: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    places = Places(tmp_path)
    monkeypatch.setattr(pki, "write", losing_power(cut))
    with pytest.raises(KeyboardInterrupt):
        pki.init(places, DOMAIN, escrow, list(pki.NETWORKS))
    monkeypatch.setattr(pki, "write", durable.write)
    pki.init(places, DOMAIN, escrow, list(pki.NETWORKS))
    assert openssl_accepts(places, pki.sign(places, request(NAMES), NAMES, "llm1"))
    opened = opened_with(escrow, places.root_key)
    root = x509.load_pem_x509_certificate(places.root_certificate.read_bytes())
    assert serialization.load_pem_private_key(opened, password=None).public_key() == root.public_key()


@pytest.mark.parametrize("lost", ["issuing_certificate", "issuing_key"])
def test_a_lost_file_is_told_and_not_made_anew(places: Places, escrow: Path, lost: str) -> None:
    getattr(places, lost).unlink()
    with pytest.raises(PkiError, match=r"is missing|does not exist"):
        pki.init(places, DOMAIN, escrow, [])
    assert not getattr(places, lost).exists()


def test_another_cas_issuing_key_is_told(places: Places) -> None:
    places.issuing_key.chmod(0o600)
    places.issuing_key.write_bytes(b"sealed:" + pki.private(ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(PkiError, match="is not the key of"):
        pki.sign(places, request(NAMES), NAMES, "llm1")


def test_every_issue_is_on_record_and_a_change_of_the_record_shows(places: Places) -> None:
    for _ in range(3):
        pki.sign(places, request(NAMES), NAMES, "llm1")
    lines = places.issued.read_text().splitlines()
    assert [json.loads(line)["host"] for line in lines] == ["llm1"] * 3
    assert durable.broken_at(places.issued) is None
    places.issued.write_text("\n".join([lines[0].replace("llm1", "llm9"), *lines[1:]]) + "\n")
    assert durable.broken_at(places.issued) == 2
    assert pki.status(places)["record_broken_at_line"] == 2


def test_a_line_that_a_power_cut_tore_does_not_break_the_record(places: Places) -> None:
    pki.sign(places, request(NAMES), NAMES, "llm1")
    with places.issued.open("a") as file:
        file.write('{"host": "llm')
    pki.sign(places, request(NAMES), NAMES, "llm1")
    assert durable.broken_at(places.issued) is None
    assert len(places.issued.read_text().splitlines()) == 3


def test_status_says_whether_the_root_key_was_taken_away(places: Places) -> None:
    assert pki.status(places)["root_key_still_here"] == str(places.root_key)
    places.root_key.unlink()
    assert pki.status(places)["root_key_still_here"] is None


def test_a_host_that_is_no_control_node_is_told(tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="run bootstrap"):
        pki.status(Places(tmp_path))


def test_write_replaces_a_file_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    durable.write(path, b"old", 0o444)
    durable.write(path, b"new", 0o400)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o400
    assert list(path.parent.iterdir()) == [path]


def test_permitted_networks_are_what_init_was_given(tmp_path: Path, escrow: Path) -> None:
    places = Places(tmp_path)
    pki.init(places, DOMAIN, escrow, ["198.51.100.0/24"])
    networks = pki.permitted(x509.load_pem_x509_certificate(places.root_certificate.read_bytes()))[1]
    assert networks == [ipaddress.ip_network("198.51.100.0/24")]
