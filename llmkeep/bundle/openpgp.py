"""OpenPGP packets (RFC 4880, RFC 6637) around signatures that a PKCS#11 token makes, which `sq` cannot use.

Version 4, ECDSA on P-384 with SHA-384: `sqv` and apt verify these like signatures by `sq`. Nothing is parsed here.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

PUBLIC_KEY, USER_ID, SIGNATURE = 6, 13, 2  # packets
BINARY, TEXT, CERTIFICATION, REVOCATION = 0x00, 0x01, 0x13, 0x20  # kinds of signatures
CREATED, KEY_EXPIRES, ISSUER, KEY_FLAGS, REASON, FINGERPRINT = 2, 9, 16, 27, 29, 33  # subpackets
ECDSA, SHA384 = 19, 9
P384 = bytes.fromhex("2b81040022")
YEARS_10 = 3652 * 86400


@dataclass(frozen=True)
class Key:
    """A key that certifies and signs. `point`: 04, x, y. `created`: seconds since 1970. `sign`: r and s of a SHA-384 digest."""

    point: bytes
    created: int
    sign: Callable[[bytes], tuple[int, int]]

    @property
    def body(self) -> bytes:
        head = b"\4" + self.created.to_bytes(4) + bytes([ECDSA, len(P384)])
        return head + P384 + _integer(int.from_bytes(self.point))

    @property
    def hashed(self) -> bytes:
        """The bytes hashed for the key's fingerprint and for signatures about the key (RFC 4880, section 5.2.4)."""
        return b"\x99" + len(self.body).to_bytes(2) + self.body

    @property
    def fingerprint(self) -> bytes:
        return hashlib.sha1(self.hashed, usedforsecurity=False).digest()


def certificate(key: Key, name: str) -> bytes:
    """The public key with its name and validity, self-signed."""
    who = name.encode()
    subject = key.hashed + b"\xb4" + len(who).to_bytes(4) + who
    uses = _subpacket(KEY_FLAGS, b"\3") + _subpacket(KEY_EXPIRES, YEARS_10.to_bytes(4))
    signed = _signature(key, CERTIFICATION, subject, key.created, uses)
    return _packet(PUBLIC_KEY, key.body) + _packet(USER_ID, who) + signed


def revocation(key: Key) -> bytes:
    """A revocation, which invalidates the certificate once added to it. It gives no reason."""
    return _signature(key, REVOCATION, key.hashed, key.created, _subpacket(REASON, b"\0"))


def detached(key: Key, content: bytes, moment: int) -> bytes:
    """A detached signature of CONTENT."""
    return _signature(key, BINARY, content, moment)


def cleartext(key: Key, text: str, moment: int) -> str:
    """TEXT in the cleartext signature framework (RFC 4880, section 7)."""
    lines = [line.rstrip(" \t") for line in text.removesuffix("\n").split("\n")]
    shown = "\n".join(f"- {line}" if line.startswith("-") else line for line in lines)
    signed = base64.encodebytes(_signature(key, TEXT, "\r\n".join(lines).encode(), moment)).decode()
    return (
        f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA384\n\n{shown}\n"
        f"-----BEGIN PGP SIGNATURE-----\n\n{signed}-----END PGP SIGNATURE-----\n"
    )


def _signature(key: Key, kind: int, content: bytes, moment: int, more: bytes = b"") -> bytes:
    times = _subpacket(CREATED, moment.to_bytes(4)) + _subpacket(FINGERPRINT, b"\4" + key.fingerprint) + more
    head = bytes([4, kind, ECDSA, SHA384]) + len(times).to_bytes(2) + times
    digest = hashlib.sha384(content + head + b"\4\xff" + len(head).to_bytes(4)).digest()
    issuer = _subpacket(ISSUER, key.fingerprint[-8:])
    r, s = key.sign(digest)
    return _packet(
        SIGNATURE, head + len(issuer).to_bytes(2) + issuer + digest[:2] + _integer(r) + _integer(s)
    )


def _packet(tag: int, body: bytes) -> bytes:
    return bytes([0xC0 | tag, 0xFF]) + len(body).to_bytes(4) + body


def _subpacket(kind: int, body: bytes) -> bytes:
    return bytes([len(body) + 1, kind]) + body


def _integer(number: int) -> bytes:
    return number.bit_length().to_bytes(2) + number.to_bytes((number.bit_length() + 7) // 8)
