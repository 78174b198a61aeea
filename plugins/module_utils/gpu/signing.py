"""The key in the HSM that signs kernel modules: how OpenSSL reaches it, and its certificate."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins

SECONDS = 60
# Neither shim nor the kernel looks at the date, and a new certificate has to be enrolled at the console.
DAYS = 3650
# The second is shim's for modules alone: it boots nothing that such a certificate signed.
USE = "codeSigning,1.3.6.1.4.1.2312.16.1.2"


class Failed(Exception):
    """The certificate cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Signing:
    """The certificate (DER) and how OpenSSL reaches its key: a configuration, p11-kit's server, the sealed PIN."""

    certificate: Path
    config: str
    address: str
    pin: str


@contextlib.contextmanager
def shown_pin(signing: Signing | None) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Environment and descriptors by which a program reaches the key. The PIN is in a memory file, which no folder has."""
    if signing is None:
        yield {}, ()
        return
    with pins.shown(signing.pin) as pin:
        descriptor = os.memfd_create("pin")
        try:
            os.write(descriptor, pin)
            variables = {"OPENSSL_CONF": signing.config, "LLMKEEP_MODULE_PIN": f"/proc/self/fd/{descriptor}"}
            if signing.address:
                variables["P11_KIT_SERVER_ADDRESS"] = signing.address
            yield variables, (descriptor,)
        finally:
            os.close(descriptor)


def openssl(
    words: list[str], environment: dict[str, str] | None = None, passed: tuple[int, ...] = ()
) -> bytes:
    """Output of an openssl command; Failed with its words if it fails."""
    done = subprocess.run(
        ["openssl", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | (environment or {}),
        pass_fds=passed,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip()
        raise Failed(
            f"openssl {words[0]} ended with {done.returncode}: {complaint}. See that the HSM is reachable"
        )
    return done.stdout


def certifies(certificate: Path, public_pem: str) -> bool:
    """Whether the certificate is there and about this key."""
    if not certificate.exists():
        return False
    shown = openssl(["x509", "-inform", "DER", "-in", str(certificate), "-noout", "-pubkey"]).decode()
    return shown.split() == public_pem.split()


def certify(signing: Signing, key: str, name: str) -> None:
    """Write a self-signed certificate for signing code. KEY: PKCS#11 URI; NAME: its common name."""
    kind = ["-sha256", "-days", str(DAYS), "-subj", f"/CN={name}", "-outform", "DER"]
    use = ["-addext", "keyUsage=critical,digitalSignature", "-addext", f"extendedKeyUsage={USE}"]
    with shown_pin(signing) as (environment, passed):
        made = openssl(["req", "-new", "-x509", "-key", key, *kind, *use], environment, passed)
    atomic.write_file(signing.certificate, made, os.geteuid(), os.getegid(), 0o644)
