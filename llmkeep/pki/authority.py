"""The estate's certificate authority, on the control node: `llmkeep pki init | sign | chain | status`.

Root (P-384, constrained to the estate's domain and to private addresses) → issuing (P-384) → leaves of at
most 90 days. The root's private key is encrypted to the estate's escrow certificate when it is generated and is stored
nowhere else; the issuing key is sealed by systemd-creds and decrypted only in memory, or is in an HSM once
`llmkeep issuing` has moved it there.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llmkeep.durable import broken_at, record, write
from llmkeep.errors import LlmkeepError
from llmkeep.escrow import encrypt_to
from llmkeep.pki.issuing_key import HsmKey
from llmkeep.pki.revocations import LEAF_DAYS, key_digest, refused, revoked_names, signed_list
from llmkeep.places import ISSUING_KEY, Places
from llmkeep.sealing import seal, unseal

ROOT_DAYS = 20 * 365
ISSUING_DAYS = 5 * 365
# Certificates start an hour ago: a host whose clock is a little behind must not refuse them.
BACKDATED = timedelta(hours=1)
DOMAIN = "estate.internal"  # .internal is reserved for private use; the same default as base_domain
# Where an estate's addresses may lie: RFC 1918, RFC 4193, link-local, loopback.
NETWORKS = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "127.0.0.0/8",
    "fc00::/7",
    "fe80::/10",
    "::1/128",
)

type Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class PkiError(LlmkeepError):
    """The CA refused. The message says what is wrong, the value seen, and what to do."""


# ---------------------------------------------------------------- certificates
def constraints(domain: str, networks: list[str]) -> x509.NameConstraints:
    """The CA's name constraints, which every client checks when it verifies a chain."""
    names: list[x509.GeneralName] = [x509.DNSName(domain), x509.DNSName("localhost")]
    names += [x509.IPAddress(ipaddress.ip_network(network)) for network in networks]
    return x509.NameConstraints(permitted_subtrees=names, excluded_subtrees=None)


def authority(
    common_name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    limits: x509.NameConstraints,
    days: int,
) -> x509.Certificate:
    """A CA certificate: self-signed with path length 1 when ISSUER is None, else path length 0."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    start = datetime.now(UTC).replace(microsecond=0) - BACKDATED
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0 if issuer else 1), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(limits, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA384())
    )


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def root_list(root: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The root's revocation list, empty and valid as long as the root: OpenSSL needs a list for each CA in a chain."""
    return signed_list(root, key, {}, 1, root.not_valid_after_utc).public_bytes(serialization.Encoding.PEM)


def private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError as error:
        raise PkiError(
            f"{path} does not exist: this host is not a control node, run bootstrap from the medium"
        ) from error
    except ValueError as error:
        raise PkiError(
            f"{path} contains no certificate ({error}): restore it from a backup of this host"
        ) from error


def permitted(certificate: x509.Certificate) -> tuple[list[str], list[Network]]:
    """The domains and networks that a CA certificate's name constraints permit."""
    limits = (
        certificate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    )
    domains = [name.value for name in limits if isinstance(name, x509.DNSName)]
    networks = [
        name.value
        for name in limits
        if isinstance(name, x509.IPAddress)
        and isinstance(name.value, ipaddress.IPv4Network | ipaddress.IPv6Network)
    ]
    return domains, networks


# ---------------------------------------------------------------- init
def init(places: Places, domain: str, escrow: Path, networks: list[str]) -> str:
    """Create the CA if there is none; returns a message for the operator. Idempotent.

    root.pem is written last and marks completion: without it, no host can have trusted the rest, which is then
    created again. Each step is on disk before the next begins.
    """
    if places.root_certificate.exists():
        return _standing(places, domain)
    if not re.fullmatch(
        r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+", domain
    ):
        raise PkiError(f"the domain {domain!r} is not a lowercase DNS name of at least two labels: give one with --domain, "
            "the same as base_domain in the inventory")  # fmt: skip
    limits = constraints(domain, networks)
    root_key, issuing_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = authority(f"{domain} root", root_key.public_key(), None, root_key, limits, ROOT_DAYS)
    issuing = authority(
        f"{domain} issuing", issuing_key.public_key(), root.subject, root_key, limits, ISSUING_DAYS
    )
    write(places.root_key, encrypt_to(escrow, private(root_key)), 0o400)
    places.issuing_key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write(places.issuing_key, seal(private(issuing_key), ISSUING_KEY), 0o400)
    write(places.issuing_certificate, pem(issuing), 0o444)
    write(places.root_list, root_list(root, root_key), 0o444)
    del root_key
    write(places.root_certificate, pem(root), 0o444)
    return (
        f"created the CA of {domain}; root certificate's sha256: {fingerprint(root)}\n"
        f"The root key is in {places.root_key}, encrypted to the escrow key: move it off this host."
    )


def _standing(places: Places, domain: str) -> str:
    """The message of `init` on a host that has a CA; PkiError if the CA belongs to another domain or is damaged."""
    root, _ = load(places.root_certificate), issuing_pair(places)
    domains, _ = permitted(root)
    if domain not in domains:
        raise PkiError(f"this host's CA was created for {domains[0]}, not for {domain}: use --domain {domains[0]} and set "
            "base_domain to that, or use a host without a CA")  # fmt: skip
    return f"the CA of {domain} already exists; root certificate's sha256: {fingerprint(root)}"


def issuing_pair(places: Places) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The issuing certificate and its key, decrypted in memory, checked to match each other and the root.

    A key in the HSM is not used here: a mismatch shows when it signs.
    """
    certificate = load(places.issuing_certificate)
    try:
        certificate.verify_directly_issued_by(load(places.root_certificate))
    except Exception as error:
        raise PkiError(f"{places.issuing_certificate} was not issued by {places.root_certificate} ({error}): "
                       "restore both from a backup of this host") from error  # fmt: skip
    if not places.issuing_key.exists():
        public = certificate.public_key()
        if places.issuing_hsm.exists() and isinstance(public, ec.EllipticCurvePublicKey):
            return certificate, HsmKey.standing(places.issuing_hsm, public)
        raise PkiError(f"{places.issuing_key} is missing: restore it from a backup of this host")
    key = serialization.load_pem_private_key(
        unseal(places.issuing_key.read_bytes(), ISSUING_KEY), password=None
    )
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{places.issuing_key} is not the key of {places.issuing_certificate}: "
                       "complete `llmkeep issuing adopt`, or restore both from a backup of this host")  # fmt: skip
    return certificate, key


# ---------------------------------------------------------------- sign
def general_names(names: list[str]) -> list[x509.GeneralName]:
    """Names as a certificate carries them: addresses as addresses, the rest as DNS names."""
    entries: list[x509.GeneralName] = []
    for name in names:
        try:
            entries.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            entries.append(x509.DNSName(name))
    return entries


def check_names(names: list[x509.GeneralName], issuing: x509.Certificate) -> None:
    """Refuse names that the CA's constraints forbid: no client would accept the certificate."""
    domains, networks = permitted(issuing)
    for name in names:
        if isinstance(name, x509.IPAddress):
            inside = any(ipaddress.ip_address(str(name.value)) in network for network in networks)
        elif isinstance(name, x509.DNSName) and "*" not in name.value:
            inside = any(name.value == domain or name.value.endswith(f".{domain}") for domain in domains)
        else:
            inside = False
        if not inside:
            raise PkiError(f"the name {name.value} is outside this estate: its CA certifies only hosts below {domains[0]} "
                f"and addresses in {', '.join(map(str, networks))}, and no wildcards; "
                           "correct the inventory (ansible_host, base_domain, pki_extra_names)")  # fmt: skip


def requested_key(csr_pem: bytes, names: list[str], host: str) -> ec.EllipticCurvePublicKey:
    """The key of a request that is self-signed, uses EC on P-256 or P-384, and asks for exactly NAMES; else PkiError."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
    except ValueError as error:
        raise PkiError(f"{host} did not send a certificate request ({error})") from error
    key = csr.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1
    ):
        raise PkiError(f"{host} sent a key of type {type(key).__name__}, but only EC keys on P-256 or P-384 are certified: "
            "remove that key there and run again")  # fmt: skip
    if not csr.is_signature_valid:
        raise PkiError(f"the request from {host} is not signed by the key in it: it was changed in transit")
    try:
        asked = list(csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        asked = []
    if not names or {str(name) for name in asked} != {str(name) for name in general_names(names)}:
        raise PkiError(f"{host} asks for the names {[name.value for name in asked]}, but the inventory allows {names}: run "
            "site.yml again with the correct inventory")  # fmt: skip
    return key


def sign(
    places: Places,
    csr_pem: bytes,
    names: list[str],
    host: str,
    days: int = LEAF_DAYS,
    in_hsm: bool = False,
) -> bytes:
    """A certificate of at most 90 days for the request, with its chain, as PEM; on record before it returns.

    The request must be signed by the EC key in it, and ask for exactly the NAMES that the inventory allows HOST.
    IN_HSM: the key is in an HSM; this is recorded, since the key outlives the host.
    """
    if not 1 <= days <= LEAF_DAYS:
        raise PkiError(f"--days is {days}: certificates are valid for 1 to {LEAF_DAYS} days")
    key = requested_key(csr_pem, names, host)
    allowed = general_names(names)
    if refusal := refused(places, host, key):
        raise PkiError(refusal)
    issuing, issuing_key = issuing_pair(places)
    check_names(allowed, issuing)
    now = datetime.now(UTC).replace(microsecond=0)
    if not issuing.not_valid_before_utc <= now < issuing.not_valid_after_utc:
        raise PkiError(f"the issuing certificate is valid from {issuing.not_valid_before_utc} to "
                       f"{issuing.not_valid_after_utc}, but this host's clock says {now}: set the clock, or "
                       "renew the CA")  # fmt: skip
    end = min(now - BACKDATED + timedelta(days=days), issuing.not_valid_after_utc)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]))
        .issuer_name(issuing.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName(allowed), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing_key.public_key()), critical=False
        )
        .sign(issuing_key, hashes.SHA384())
    )
    record(places.issued, {
        "time": now.isoformat(), "host": host, "names": names, "serial": f"{leaf.serial_number:x}",
        "not_after": end.isoformat(), "sha256": fingerprint(leaf), "key": key_digest(key),
        **({"hsm": True} if in_hsm else {}),
    })  # fmt: skip
    if refusal := refused(places, host, key):  # revoked meanwhile
        raise PkiError(refusal)
    return pem(leaf) + pem(issuing)


# ---------------------------------------------------------------- what a person asks
def status(places: Places) -> dict[str, object]:
    """For operators: the CA's domain and expiry, whether its key is usable, whether the root key is still on this host."""
    root = load(places.root_certificate)
    issuing, key = issuing_pair(places)
    if isinstance(key, HsmKey):
        key.prove()
    return {
        "domain": permitted(root)[0][0],
        "root": {"sha256": fingerprint(root), "not_after": root.not_valid_after_utc.isoformat()},
        "issuing": {"sha256": fingerprint(issuing), "not_after": issuing.not_valid_after_utc.isoformat()},
        "key_source": "hsm" if isinstance(key, HsmKey) else "file",
        "issued": len(places.issued.read_bytes().splitlines()) if places.issued.exists() else 0,
        "record_broken_at_line": broken_at(places.issued),
        "revocations_broken_at_line": broken_at(places.revoked),
        "revoked": sorted(revoked_names(places)),
        "root_key_still_here": str(places.root_key) if places.root_key.exists() else None,
    }


# ---------------------------------------------------------------- command line
def as_command(verb: Callable[[argparse.Namespace], str | bytes]) -> Callable[[argparse.Namespace], int]:
    """Make a verb print what it returns, and turn an unreadable file into a PkiError."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            answer = verb(arguments)
        except OSError as error:
            raise PkiError(
                f"{error.filename or 'a file'}: {error.strerror}: check the path and its permissions"
            ) from error
        sys.stdout.buffer.write(answer if isinstance(answer, bytes) else answer.encode() + b"\n")
        return 0

    return run


def _sign(arguments: argparse.Namespace) -> bytes:
    csr = sys.stdin.buffer.read() if arguments.csr == "-" else Path(arguments.csr).read_bytes()
    names = [name for name in arguments.names.split(",") if name]
    return sign(arguments.places, csr, names, arguments.host, arguments.days, arguments.hsm)


def _status(arguments: argparse.Namespace) -> str:
    state = status(arguments.places)
    return (
        json.dumps(state)
        if arguments.json
        else "\n".join(f"{name}: {value}" for name, value in state.items())
    )


def register(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """`llmkeep pki init | sign | chain | status`. Exit codes: 0 done, 1 refused, with the reason.

    Returns the verbs, to which `llmkeep.revoke` adds its own.
    """
    parser = subparsers.add_parser(
        "pki", help="manage the estate's certificate authority on the control node"
    )
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("init", help="create root and issuing CA if there are none (called by bootstrap)")
    verb.add_argument(
        "--domain", default=DOMAIN, help="the estate's domain, base_domain in the inventory (%(default)s)"
    )
    verb.add_argument(
        "--escrow", type=Path, required=True, help="certificate of the escrow key, from the bundle"
    )
    verb.add_argument(
        "--network",
        action="append",
        help="network whose addresses the CA may certify (default: all private ones)",
    )
    verb.set_defaults(
        run=as_command(
            lambda arguments: init(
                arguments.places, arguments.domain, arguments.escrow, arguments.network or list(NETWORKS)
            )
        )
    )
    verb = verbs.add_parser("sign", help="sign a host's request; prints the certificate and its chain")
    verb.add_argument("--csr", required=True, help="file with the request, - for standard input")
    verb.add_argument(
        "--names", required=True, help="comma-separated names that the inventory allows the host"
    )
    verb.add_argument("--host", required=True, help="the host's name in the inventory")
    verb.add_argument(
        "--days", type=int, default=LEAF_DAYS, help="days until it expires (%(default)s, the maximum)"
    )
    verb.add_argument("--hsm", action="store_true", help="the key is in an HSM, and outlives the host")
    verb.set_defaults(run=as_command(_sign))
    verb = verbs.add_parser("chain", help="print issuing and root certificate")
    verb.set_defaults(
        run=as_command(
            lambda arguments: (
                pem(load(arguments.places.issuing_certificate)) + pem(load(arguments.places.root_certificate))
            )
        )
    )
    verb = verbs.add_parser("status", help="print domain, expiry, and presence of the root key")
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(run=as_command(_status))
    return verbs
