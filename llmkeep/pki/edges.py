"""An edge's certificate from another CA, such as the organization's, for the names that its clients use.

The host makes the key and the request, the operator takes the request to that CA, and the resulting certificate is
checked here before `site` installs it on the host.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from llmkeep.durable import FORMAT, require_format, write
from llmkeep.errors import printable
from llmkeep.pki.authority import PkiError, fingerprint, pem, requested_key
from llmkeep.pki.revocations import key_digest
from llmkeep.places import Places

LEAST_LEFT = timedelta(days=7)
LARGEST_REQUEST, LARGEST_CHAIN = 16 << 10, 64 << 10  # bytes
MOST_CERTIFICATES = 10
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+")
APPROVED = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True)
class Certified:
    """A checked certificate. `chain`: PEM, leaf first, without the root; `key`: SHA-256 of the leaf's public key."""

    names: list[str]
    chain: str
    root: str
    key: str


@dataclass(frozen=True)
class Edge:
    """The control node's data on an edge's public names. `key`: the request's; `retired`: keys that no request may have."""

    names: list[str]
    request: str
    key: str
    hsm: bool = False
    retired: list[str] = field(default_factory=list)
    certificate: Certified | None = None

    @classmethod
    def read(cls, places: Places, host: str) -> Self | None:
        """Read a host's data; None if it has sent no request. PkiError for an invalid host name or document."""
        if not HOST.fullmatch(host):
            raise PkiError(f"--host is {printable(host)!r}: give the host's name in the inventory")
        path = places.edge(host)
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise PkiError(
                f"{path} cannot be read ({error}): restore it from a backup of this host"
            ) from error
        require_format(path, document)
        document.pop("format")
        certificate = document.pop("certificate")
        return cls(**document, certificate=Certified(**certificate) if certificate else None)

    def write(self, places: Places, host: str) -> None:
        """Store it for the next `site`."""
        document = {"format": FORMAT, **asdict(self)}
        write(places.edge(host), json.dumps(document, indent=1).encode() + b"\n", 0o444)


def _standing(places: Places, host: str) -> Edge:
    """The data of a host that has sent its request; PkiError for any other."""
    if edge := Edge.read(places, host):
        return edge
    others = sorted(path.stem for path in places.edge(host).parent.glob("*.json"))
    raise PkiError(f"{host} has sent no request for public names; nothing was changed. Set edge_public_names for it and run "
        f"`llmkeep site`, which creates one. Hosts with a request: {', '.join(others) or 'none'}")  # fmt: skip


# ---------------------------------------------------------------- request
def accept(places: Places, host: str, names: list[str], csr_pem: bytes, in_hsm: bool = False) -> str:
    """Store HOST's request for exactly NAMES, and hand it out; returns a message.

    A certificate for another key is dropped unless that key was retired: the host has lost its key and cannot serve it.
    """
    if len(csr_pem) > LARGEST_REQUEST:
        raise PkiError(
            f"the request from {host} has {len(csr_pem)} bytes, more than {LARGEST_REQUEST}: it is not a valid request"
        )
    if bad := [name for name in names if not NAME.fullmatch(name)]:
        raise PkiError(
            f"{host} asks for {bad}: edge_public_names must be lowercase DNS names without wildcards"
        )
    digest = key_digest(requested_key(csr_pem, names, host))
    before = Edge.read(places, host)
    edge = replace(
        before or Edge(names, "", ""), names=names, request=csr_pem.decode(), key=digest, hsm=in_hsm
    )
    if digest in edge.retired:
        raise PkiError(f"{host} sent the key {digest}, which `--new-key` retired: remove "
                       "/etc/llmkeep/pki/public.key there and run `llmkeep site`")  # fmt: skip
    lost = edge.certificate and edge.certificate.key not in (digest, *edge.retired)
    if lost:
        edge = replace(edge, certificate=None)
    edge.write(places, host)
    loss = f"; {host} has lost the key of the certificate that was installed" if lost else ""
    return f"{hand_out(places, host)}{loss}"


def hand_out(places: Places, host: str) -> str:
    """Write the request to the place where the operator collects it; returns that place."""
    edge, path = _standing(places, host), places.edge_request(host)
    write(path, edge.request.encode(), 0o444)
    return f"the request of {host} for {', '.join(edge.names)} is in {path}"


def retire(places: Places, host: str) -> Edge:
    """The data with which the next `site` makes a new key and request; PkiError if that is impossible.

    Nothing is written. The present certificate is served until the one for the new key is installed.
    """
    edge = _standing(places, host)
    if edge.hsm:
        raise PkiError(f"the key of {host} is in an HSM and serves all its names; nothing was changed. Generate a new one "
            "in the HSM (docs/operate/hsm.md), then run `llmkeep site`")  # fmt: skip
    return edge if edge.key in edge.retired else replace(edge, retired=[*edge.retired, edge.key])


# ---------------------------------------------------------------- install
def certificates(data: bytes, name: str) -> list[x509.Certificate]:
    """The certificates in a PEM file called NAME; PkiError for any other file."""
    if len(data) > LARGEST_CHAIN:
        raise PkiError(
            f"{name} has {len(data)} bytes, more than {LARGEST_CHAIN}: give only the leaf and its chain"
        )
    if b"PRIVATE KEY-----" in data:
        raise PkiError(f"{name} contains a private key, which no CA needs or issues: remove it, and if it is the edge's "
            "own, make a new one with `llmkeep pki request --new-key`")  # fmt: skip
    try:
        chain = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        hint = (
            ": it is DER or PKCS #7; convert it with openssl x509 or openssl pkcs7 -print_certs"
            if data[:1] == b"0"
            else ""
        )
        raise PkiError(
            f"{name} holds no certificates in PEM ({error}){hint or ': give the file that the CA sent'}"
        ) from error
    if len(chain) > MOST_CERTIFICATES:
        raise PkiError(f"{name} has {len(chain)} certificates, more than {MOST_CERTIFICATES}: give only the leaf "
            "and its chain")  # fmt: skip
    return chain


def install(places: Places, host: str, chain: bytes, root: bytes | None, now: datetime) -> Edge:
    """HOST's new data with this certificate; PkiError if it is unsuitable.

    Nothing is written. CHAIN: PEM, in any order; ROOT: PEM, else the self-signed certificate in CHAIN, else the root
    of the previous certificate.
    """
    edge = _standing(places, host)
    candidates = certificates(chain, "CHAIN")
    anchor = _anchor(edge, candidates, root)
    leaf = _leaf(edge, host, candidates)
    _check_leaf(leaf, now)
    others = [each for each in candidates if each not in (leaf, anchor)]
    path = _path(leaf, others, anchor)
    for each in path[:-1]:
        algorithm = each.signature_hash_algorithm
        if algorithm is not None and not isinstance(algorithm, APPROVED):
            raise PkiError(
                f"{_title(each)} is signed with {algorithm.name}: have the CA sign with SHA-256 or better"
            )
    _verify(edge.names, leaf, path[1:-1], anchor, now)
    certified = Certified(
        names=edge.names,
        chain="".join(pem(each).decode() for each in path[:-1]),
        root=pem(anchor).decode(),
        key=edge.key,
    )
    return replace(edge, certificate=certified)


def described(edge: Edge) -> dict[str, object]:
    """Description of an installed certificate for the audit record."""
    assert edge.certificate  # noqa: S101 of `install`
    leaf = x509.load_pem_x509_certificate(edge.certificate.chain.encode())
    return {
        "llmkeep.certificate.names": edge.certificate.names,
        "llmkeep.certificate.sha256": fingerprint(leaf),
        "llmkeep.certificate.issuer": leaf.issuer.rfc4514_string(),
        "llmkeep.certificate.not_after": leaf.not_valid_after_utc.isoformat(),
    }


def _title(certificate: x509.Certificate) -> str:
    return f"the certificate of {printable(certificate.subject.rfc4514_string())!r}"


def _anchor(edge: Edge, chain: Sequence[x509.Certificate], root: bytes | None) -> x509.Certificate:
    if root is not None:
        roots = certificates(root, "--root")
        if len(roots) != 1:
            raise PkiError(f"--root has {len(roots)} certificates: give only the root")
        return roots[0]
    if own := [each for each in chain if each.subject == each.issuer]:
        return own[-1]
    if edge.certificate:
        return x509.load_pem_x509_certificate(edge.certificate.root.encode())
    raise PkiError(f"CHAIN has no root, its last certificate was issued by {printable(chain[-1].issuer.rfc4514_string())!r}: "
                   "give the root of that CA with --root")  # fmt: skip


def _leaf(edge: Edge, host: str, chain: Sequence[x509.Certificate]) -> x509.Certificate:
    """The certificate for the request's key."""

    def digest(certificate: x509.Certificate) -> str:
        key = certificate.public_key()
        return key_digest(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""

    for each in chain:
        if digest(each) == edge.key:
            return each
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    hash_of_key = hashes.Hash(hashes.SHA256())
    hash_of_key.update(chain[0].public_key().public_bytes(*form))
    raise PkiError(f"no certificate in CHAIN is for the key of the request, sha256 {edge.key}: {_title(chain[0])}, the first, "
                   f"is for {hash_of_key.finalize().hex()}. Have the CA sign the request that `llmkeep pki request --host "
                   f"{host}` hands out")  # fmt: skip


def _check_leaf(leaf: x509.Certificate, now: datetime) -> None:
    """Check validity and permitted usages of the certificate."""
    if leaf.subject == leaf.issuer:
        raise PkiError(f"{_title(leaf)} is self-signed: have a CA sign the request")
    begin, end, clock = (
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
        f"this host's clock says {now:%Y-%m-%d %H:%M} UTC",
    )
    if begin > now:
        raise PkiError(
            f"{_title(leaf)} is valid from {begin:%Y-%m-%d %H:%M} UTC, {clock}: wait, or set the clock"
        )
    if end < now + LEAST_LEFT:
        raise PkiError(f"{_title(leaf)} ends at {end:%Y-%m-%d %H:%M} UTC, {clock}, but must be valid for at least "
            f"{LEAST_LEFT.days} more days: have the CA renew it, or set the clock")  # fmt: skip
    try:
        if leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise PkiError(f"{_title(leaf)} is a CA certificate: have the CA issue one for a TLS server")
    except x509.ExtensionNotFound:
        pass
    try:
        usages = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usages = []
    if ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        names = ", ".join(each.dotted_string for each in usages) or "none"
        raise PkiError(f"{_title(leaf)} has the extended key usages {names}: have the CA issue it with serverAuth "
                       f"({ExtendedKeyUsageOID.SERVER_AUTH.dotted_string})")  # fmt: skip


def _path(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], root: x509.Certificate
) -> list[x509.Certificate]:
    """The path from leaf to root by issuer names, whatever the order in the file; PkiError names a missing certificate."""
    path = [leaf]
    while path[-1].issuer != root.subject:
        issuers = [each for each in others if each.subject == path[-1].issuer and each not in path]
        if not issuers:
            missing, root_name = path[-1].issuer.rfc4514_string(), root.subject.rfc4514_string()
            raise PkiError(f"the certificate of {printable(missing)!r} is missing in CHAIN: it issued {_title(path[-1])}, and "
                           f"the root is {printable(root_name)!r}. Add it, or give the correct root "
                           "with --root")  # fmt: skip
        path.append(issuers[0])
    return [*path, root]


def _verify(
    names: list[str],
    leaf: x509.Certificate,
    intermediates: list[x509.Certificate],
    root: x509.Certificate,
    now: datetime,
) -> None:
    """Verify the chain for each name as a browser does: signatures, validity, constraints, strength of keys."""
    missing = []
    for name in names:
        verifier = PolicyBuilder().store(Store([root])).time(now).build_server_verifier(x509.DNSName(name))
        try:
            verifier.verify(leaf, intermediates)
        except VerificationError as error:
            if "subjectAltName" not in str(error):
                raise PkiError(f"the chain of {_title(leaf)} does not verify against {_title(root)}: {error}. Compare the "
                    "root with the CA's own, and have the CA correct the certificate") from error  # fmt: skip
            missing.append(name)
    if missing:
        try:
            alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            has = ", ".join(alternatives.get_values_for_type(x509.DNSName))
        except x509.ExtensionNotFound:
            has = ""
        raise PkiError(f"{_title(leaf)} is not for {', '.join(missing)}: it names {printable(has) or 'nothing'}. Have the "
            "CA use the names in the request, or correct edge_public_names")  # fmt: skip
