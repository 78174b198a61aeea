"""A CA that is not the estate's: the organization's, which issues an edge's certificate."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(UTC)
type Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Authority:
    """A CA's name and key, and its certificate."""

    name: x509.Name
    key: Key
    certificate: x509.Certificate

    @classmethod
    def of(cls, subject: str, key: Key) -> Self:
        """A root."""
        name = x509.Name.from_rfc4514_string(subject)
        return cls(name, key, _certificate(name, key, name, key, ca=True))

    def below(self, common_name: str, key: Key | None = None) -> "Authority":
        """A CA that this one has certified."""
        name, key = (
            x509.Name.from_rfc4514_string(f"CN={common_name}"),
            key or ec.generate_private_key(ec.SECP256R1()),
        )
        return Authority(name, key, _certificate(name, key, self.name, self.key, ca=True))


def _certificate(name: x509.Name, key: Key, issuer: x509.Name, issuer_key: Key, ca: bool) -> x509.Certificate:
    return _extended(
        name, key.public_key(), issuer, issuer_key, ca, NOW - timedelta(days=1), NOW + timedelta(days=900)
    ).sign(issuer_key, hashes.SHA256())


def _extended(
    name: x509.Name,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    issuer: x509.Name,
    issuer_key: Key,
    ca: bool,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )


def root_of(organization: str) -> Authority:
    """The root of an organization's CA."""
    return Authority.of(f"CN={organization} root", ec.generate_private_key(ec.SECP384R1()))


def leaf_of(
    issuer: Authority,
    key: ec.EllipticCurvePublicKey,
    names: list[str],
    *,
    begin: datetime = NOW - timedelta(days=2),
    end: datetime = NOW + timedelta(days=365),
    ca: bool = False,
    usages: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH,),
    subject: x509.Name | None = None,
) -> x509.Certificate:
    """A certificate for a TLS server, or one that is not."""
    name = subject or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")])
    made = _extended(name, key, issuer.name, issuer.key, ca, begin, end)
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(dns_names(names)), critical=False)
    if usages:
        made = made.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return made.sign(issuer.key, hashes.SHA256())


def dns_names(names: list[str]) -> list[x509.GeneralName]:
    """As a request and a certificate have them."""
    return [x509.DNSName(name) for name in names]


def request_for(names: list[str], key: Key | None = None) -> bytes:
    """What a host sends, as PEM."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]))
        .add_extension(x509.SubjectAlternativeName(dns_names(names)), critical=False)
        .sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
