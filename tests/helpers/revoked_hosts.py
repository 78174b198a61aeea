"""A certificate authority of an estate with certificates of its hosts, one of which can be revoked."""

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llmkeep.pki import authority as pki
from llmkeep.pki import revoking
from llmkeep.places import Places

DOMAIN = "estate.internal"


class Estate:
    """Certificates in a folder: NAME.pem with its chain, NAME.key, root.pem, crl.pem."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pki, "seal", lambda secret, _: secret)
        monkeypatch.setattr(pki, "unseal", lambda sealed, _: sealed)
        monkeypatch.setattr(pki, "encrypt_to", lambda *_: b"")
        self.folder, self.places = folder, Places(folder / "control")
        pki.init(self.places, DOMAIN, Path("escrow.pem"), list(pki.NETWORKS))
        (folder / "root.pem").write_bytes(self.places.root_certificate.read_bytes())
        self.publish()

    @property
    def list(self) -> Path:
        return self.folder / "crl.pem"

    def publish(self) -> None:
        """Sign a list if it has to be, and copy it as the role pki does."""
        revoking.publish(self.places)
        self.list.write_bytes(self.places.revocation_list.read_bytes())

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = ec.generate_private_key(ec.SECP256R1())
        path = self.folder / f"{name}.key"
        path.write_bytes(pki.private(key))
        path.chmod(0o600)
        return key

    def certificate(self, name: str, key: ec.EllipticCurvePrivateKey | None = None) -> Path:
        """A new certificate of a host; raises PkiError if there is none for it."""
        names = [f"{name}.{DOMAIN}", "localhost", "127.0.0.1"]
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .add_extension(x509.SubjectAlternativeName(pki.general_names(names)), critical=False)
            .sign(key or self.key(name), hashes.SHA256())
        )
        chain = pki.sign(self.places, csr.public_bytes(serialization.Encoding.PEM), names, name)
        (self.folder / f"{name}.pem").write_bytes(chain)
        return self.folder / f"{name}.pem"

    def revoke(self, name: str) -> None:
        revoking.revoke(self.places, name, "stolen", "ada")
        self.publish()

    def verdict(self, name: str, *more: str) -> str:
        """What `openssl verify` says of a certificate, with the list."""
        chain = str(self.folder / f"{name}.pem")
        argv = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CRLfile", str(self.list), *more]
        argv += ["-CAfile", str(self.folder / "root.pem"), "-untrusted", chain, chain]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return "accepted" if done.returncode == 0 else done.stderr

    def handshake(self, port: int, name: str, *more: str) -> str:
        """All that `openssl s_client` says of a connection with a host's certificate; it ends after the server's answer."""
        given = ["-cert", str(self.folder / f"{name}.pem"), "-key", str(self.folder / f"{name}.key")]
        argv = [
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{port}",
            "-CAfile",
            str(self.folder / "root.pem"),
        ]
        question = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
        argv += ["-cert_chain", str(self.folder / f"{name}.pem"), "-tls1_3", "-ign_eof", *given, *more]
        done = subprocess.run(argv, input=question, capture_output=True, timeout=60, check=False)
        return (done.stdout + done.stderr).decode(errors="replace")
