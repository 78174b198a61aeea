"""Throw-away certificates of a test's Kubernetes cluster."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAMES = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]


def _name(common: str, groups: list[str]) -> x509.Name:
    """Kubernetes reads a user's groups as organizations."""
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in groups]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _written(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    path.touch(0o600)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return path


class ClusterKeys:
    """An authority and what it has issued, as files of a folder."""

    def __init__(self, folder: Path, addresses: list[str]) -> None:
        """ADDRESSES: of the servers."""
        self.folder, self.addresses = folder, addresses
        self.ca = folder / "ca.crt"
        self._key = ec.generate_private_key(ec.SECP256R1())
        authority = self._builder(_name("test", []), self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False)
        usage |= {"key_agreement": False, "encipher_only": False, "decipher_only": False}
        usage |= {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
        authority = authority.add_extension(x509.KeyUsage(**usage), critical=True)
        self._sign(authority, self.ca)

    def issued(self, name: str, groups: list[str] | None = None, server: bool = False) -> tuple[Path, Path]:
        """Certificate and key, made once; SERVER: for a listener at the addresses, too."""
        stem = name.replace(":", "-")
        certificate, key_file = self.folder / f"{stem}.crt", self.folder / f"{stem}.key"
        if certificate.exists():
            return certificate, key_file
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._builder(_name(name, groups or []), key)
        if server:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in self.addresses]
            names = [x509.DNSName(each) for each in NAMES]
            builder = builder.add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
        self._sign(builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False), certificate)
        return certificate, _written(key_file, key)

    def of_service_accounts(self) -> tuple[Path, Path]:
        """The key that signs their tokens and its public part, made once."""
        private, public = self.folder / "service-accounts.key", self.folder / "service-accounts.pub"
        if not private.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            public.write_bytes(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
            _written(private, key)
        return private, public

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name("test", []))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )

    def _sign(self, builder: x509.CertificateBuilder, path: Path) -> None:
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
