"""The issuing CA's move into an HSM: `llmkeep issuing request | certify | adopt | root-list`.

The key is generated in the token on the control node. Its request goes to the machine with the escrow key and comes
back as a certificate issued by the same root, so the root key never enters the estate. The same three commands renew
the issuing certificate before it expires, with the same key or a new one.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmkeep import escrow
from llmkeep.durable import FORMAT, write
from llmkeep.pki.authority import ISSUING_DAYS, PkiError, as_command, authority, load, pem, root_list
from llmkeep.pki.issuing_key import PIN, HsmKey
from llmkeep.pki.revocations import key_digest
from llmkeep.places import Places


def _next(places: Places) -> Path:
    """Path of the settings of a requested key that has not been adopted."""
    return places.issuing_hsm.with_name("issuing-hsm.next.json")


def digest(key: object) -> str:
    """The fingerprint by which two people check that a request arrived unchanged."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise PkiError(f"a key of type {type(key).__name__} cannot be an issuing key: it must be EC P-384")
    return key_digest(key)


def request(places: Places, settings: dict[str, Any]) -> bytes:
    """The request for a key in the HSM, which is generated if the token has none with that label."""
    subject = load(places.issuing_certificate).subject
    key = HsmKey.made(settings)
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    write(_next(places), json.dumps({"format": FORMAT, **settings}, indent=1).encode() + b"\n", 0o444)
    return csr.public_bytes(serialization.Encoding.PEM)


def opened_root_key(
    root: x509.Certificate, root_key: Path, escrow_key: Path, passphrase_file: Path | None
) -> ec.EllipticCurvePrivateKey:
    """The root's private key, which the escrow key decrypts in memory."""
    opened = escrow.decrypt(root_key, escrow_key, passphrase_file)
    key = serialization.load_pem_private_key(opened, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        raise PkiError(
            f"{root_key} holds the key of another root than {root.subject.rfc4514_string()}: use this estate's root key"
        )
    return key


def certify(
    csr_pem: bytes, root_pem: bytes, root_key: Path, escrow_key: Path, passphrase_file: Path | None = None
) -> bytes:
    """Issue the certificate for a request with the root key, which the escrow key decrypts in memory."""
    try:
        csr, root = x509.load_pem_x509_csr(csr_pem), x509.load_pem_x509_certificate(root_pem)
    except ValueError as error:
        raise PkiError(f"request or root certificate cannot be read ({error})") from error
    key, name = csr.public_key(), root.subject.rfc4514_string().removeprefix("CN=")
    expected = f"{name.removesuffix(' root')} issuing"
    digest(key)
    if not csr.is_signature_valid or csr.subject.rfc4514_string() != f"CN={expected}":
        raise PkiError(f"the request is for {csr.subject.rfc4514_string()!r}, but must be for 'CN={expected}', signed by "
            "the key in it: use the one from `llmkeep issuing request`")  # fmt: skip
    private = opened_root_key(root, root_key, escrow_key, passphrase_file)
    limits = root.extensions.get_extension_for_class(x509.NameConstraints).value
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 digest() has refused all others
    return pem(authority(expected, key, root.subject, private, limits, ISSUING_DAYS))


def adopt(places: Places, certificate_pem: bytes) -> str:
    """Sign with the key in the HSM from now on. Idempotent. The sealed key is deleted last."""
    root, before = load(places.root_certificate), load(places.issuing_certificate)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        certificate.verify_directly_issued_by(root)
    except Exception as error:
        raise PkiError(f"this certificate was not issued by {places.root_certificate} ({error}); nothing was changed: use "
            "the output of `llmkeep issuing certify` for this estate") from error  # fmt: skip
    extensions = certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints).value
    limits = extensions.get_extension_for_class(x509.NameConstraints).value
    now = datetime.now(UTC)
    if (
        (basic.ca, basic.path_length) != (True, 0)
        or certificate.subject != before.subject
        or limits != root.extensions.get_extension_for_class(x509.NameConstraints).value
        or not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc
    ):
        raise PkiError(f"the certificate of {certificate.subject.rfc4514_string()!r}, {certificate.not_valid_before_utc} "
                       f"to {certificate.not_valid_after_utc}, is not a valid issuing certificate of this estate at present "
                       f"({now}); nothing was changed: make it with `llmkeep issuing certify`, and check "
                       "both clocks")  # fmt: skip
    coming = _next(places) if _next(places).exists() else places.issuing_hsm
    if not coming.exists():
        raise PkiError(
            f"{coming} does not exist, so no key was requested: start with `llmkeep issuing request`"
        )
    key = certificate.public_key()
    digest(key)
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 as in certify
    HsmKey.standing(coming, key).prove()
    write(places.issuing_hsm, coming.read_bytes(), 0o444)
    write(places.issuing_certificate, pem(certificate), 0o444)
    places.issuing_key.unlink(missing_ok=True)
    _next(places).unlink(missing_ok=True)
    return (
        "the issuing key is in the HSM. Set pki_key_source: hsm in the inventory and run site.yml: each host gets a new\n"
        f"certificate. The previous issuing certificate is not revoked: it expires on {before.not_valid_after_utc:%Y-%m-%d}."
    )


def _request(arguments: argparse.Namespace) -> bytes:
    pin = str(arguments.places.sealed(PIN))
    csr = request(arguments.places, {
        "module": arguments.module, "token": arguments.token, "label": arguments.label, "user": arguments.user,
        "address": "", "seconds": arguments.seconds, "pin": pin, "pin_name": PIN,
    })  # fmt: skip
    print(f"sha256 of its public key: {digest(x509.load_pem_x509_csr(csr).public_key())}", file=sys.stderr)
    return csr


def _certify(arguments: argparse.Namespace) -> bytes:
    certificate = certify(
        arguments.csr.read_bytes(),
        arguments.root.read_bytes(),
        arguments.root_key,
        arguments.escrow_key,
        arguments.passphrase_file,
    )
    key = x509.load_pem_x509_certificate(certificate).public_key()
    print(f"sha256 of its public key: {digest(key)}; compare it with the request's", file=sys.stderr)
    return certificate


def _root_list(arguments: argparse.Namespace) -> bytes:
    root = load(arguments.root)
    return root_list(
        root, opened_root_key(root, arguments.root_key, arguments.escrow_key, arguments.passphrase_file)
    )


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep issuing request | certify | adopt | root-list`. Exit codes: 0 done; 1 refused; 9 wrong passphrase."""
    parser = subparsers.add_parser(
        "issuing", help="move the issuing CA's key into an HSM, or renew its certificate"
    )
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("request", help="control node: generate the key in the HSM and print its request")
    verb.add_argument("--module", required=True, help="path of the HSM's PKCS#11 module")
    verb.add_argument("--token", required=True, help="label of a token that holds no other key")
    verb.add_argument("--label", default="llmkeep issuing", help="the key's label (%(default)s)")
    verb.add_argument("--user", default="", help="account that may use the module (default: the current one)")
    verb.add_argument(
        "--seconds", type=int, default=20, help="time limit for the HSM in seconds (default: %(default)s)"
    )
    verb.set_defaults(run=as_command(_request))
    verb = verbs.add_parser(
        "certify", help="on the machine with the escrow key: print the certificate for the request"
    )
    verb.add_argument("--csr", type=Path, required=True, help="the request")
    verb.add_argument("--root", type=Path, required=True, help="root.pem of the estate")
    verb.add_argument("--root-key", type=Path, required=True, help="root-key.cms")
    verb.add_argument("--escrow-key", type=Path, required=True, help="escrow.key")
    verb.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with its passphrase (default: ask, if it has one)"
    )
    verb.set_defaults(run=as_command(_certify))
    verb = verbs.add_parser(
        "root-list", help="on the machine with the escrow key: print the root's revocation list"
    )
    verb.add_argument("--root", type=Path, required=True, help="root.pem of the estate")
    verb.add_argument("--root-key", type=Path, required=True, help="root-key.cms")
    verb.add_argument("--escrow-key", type=Path, required=True, help="escrow.key")
    verb.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with its passphrase (default: ask, if it has one)"
    )
    verb.set_defaults(run=as_command(_root_list))
    verb = verbs.add_parser("adopt", help="control node: sign with the key in the HSM from now on")
    verb.add_argument("--certificate", type=Path, required=True, help="output of certify")
    verb.set_defaults(
        run=as_command(lambda arguments: adopt(arguments.places, arguments.certificate.read_bytes()))
    )
