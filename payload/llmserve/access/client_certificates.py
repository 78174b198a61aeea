"""Client certificates: the edge verifies the issuer, a record names the holder."""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256


@dataclass(frozen=True, slots=True)
class Certificate:
    """SHA-256 of the DER in hexadecimal, and the end of validity in UTC."""

    fingerprint: str
    not_after: datetime


def read_certificate(pem: bytes) -> Certificate:
    """The first certificate in `pem`; raises ValueError if there is none."""
    try:
        first = x509.load_pem_x509_certificate(pem)
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None
    return Certificate(first.fingerprint(SHA256()).hex(), first.not_valid_after_utc)


@lru_cache(maxsize=256)
def presented(escaped: bytes) -> Certificate:
    """Parse nginx's $ssl_client_escaped_cert (PEM, URL-encoded); raises ValueError."""
    return read_certificate(unquote_to_bytes(escaped))
