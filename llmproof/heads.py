"""Signed heads: a commitment to the whole record at one moment, in about 200 bytes that can be stored elsewhere.

A head is the Merkle root (RFC 6962, section 2.1; a leaf is a record's line without its newline) over the first
`size` records, as a checkpoint (c2sp.org/tlog-checkpoint) in a note signed with Ed25519 (c2sp.org/signed-note). Its
time is the checkpoint's one extension line; heads of earlier versions have none.
The file `heads` has one after the other, each followed by an empty line.
"""

import base64
import binascii
import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NAME = "heads"
TIPS = "tips"  # of a witness: heads that it saw and that had no signature yet, each followed by an empty line
ED25519 = b"\x01"  # the signature's type, as the note's format numbers them
SEED_BYTES = 32
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


class HeadError(Exception):
    """A head, a key, or a file of heads is invalid. The message says why."""


@dataclass
class Tree:
    """A Merkle tree that grows by one leaf at a time and keeps only its perfect subtrees, the largest first."""

    size: int = 0
    peaks: list[bytes] = field(default_factory=list)

    def add(self, leaf: bytes) -> None:
        """Add a record."""
        self.add_hash(hashlib.sha256(b"\0" + leaf).digest())

    def add_hash(self, node: bytes) -> None:
        """Add a record of which the leaf's hash is known."""
        merged = self.size
        while merged & 1:
            node = hashlib.sha256(b"\1" + self.peaks.pop() + node).digest()
            merged >>= 1
        self.peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        """The tree's root hash, 32 bytes."""
        if not self.peaks:
            return hashlib.sha256().digest()
        node = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            node = hashlib.sha256(b"\1" + peak + node).digest()
        return node


@dataclass(frozen=True)
class Head:
    """The hash of the first `size` records. `time`: of its signature, UTC; empty in heads of earlier versions."""

    size: int
    root: bytes
    time: str = field(default="", compare=False)

    def text(self, name: str) -> bytes:
        """The lines that are signed."""
        lines = [
            name,
            str(self.size),
            base64.b64encode(self.root).decode(),
            *([self.time] if self.time else []),
        ]
        return "".join(f"{line}\n" for line in lines).encode()


class Verifier:
    """A trusted key's name and public half, written as `name+8 hex digits+base64`."""

    def __init__(self, text: str) -> None:
        """Raises HeadError if `text` is no verifier key of an Ed25519 key."""
        match = re.fullmatch(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})", text.strip())
        public = base64.b64decode(match[3]) if match else b""
        if not match or public[:1] != ED25519 or _key_hash(match[1], public) != bytes.fromhex(match[2]):
            raise HeadError(f"{text.strip()[:120]!r} is not a verifier key (name+hash+key): give the one that was noted "
                "when the record began")  # fmt: skip
        self.text, self.name, self.public = match[0], match[1], public[1:]
        self.key_hash = _key_hash(self.name, public)
        self._key = Ed25519PublicKey.from_public_bytes(self.public)

    def scoped(self, purpose: str) -> "Verifier":
        """The same key for another PURPOSE: its signatures for one purpose are not accepted for the other."""
        name, public = f"{self.name}/{purpose}", ED25519 + self.public
        return Verifier(f"{name}+{_key_hash(name, public).hex()}+{base64.b64encode(public).decode()}")

    def open(self, note: bytes) -> Head:
        """The head in a note; HeadError unless it is signed by this key and in canonical form."""
        text, _, signed = note.partition(b"\n\n")
        try:
            name, head = stated(text + b"\n")
            mark, signer, signature = signed.decode().removesuffix("\n").split(" ")
            raw = base64.b64decode(signature, validate=True)
        except (ValueError, binascii.Error) as error:
            raise HeadError(f"it is not a signed head ({error})") from error
        if (mark, signer, raw[:4], name) != ("—", self.name, self.key_hash, self.name):
            raise HeadError(f"it is signed by {signer} about {name}, not by {self.text}")
        try:
            self._key.verify(raw[4:], text + b"\n")
        except InvalidSignature as error:
            raise HeadError(f"the signature does not match: it was not written by {self.name}") from error
        # base64 and numbers can be written in several ways; only the signer's counts.
        if note != _note(self.name, head, raw):
            raise HeadError("its content is right, but it is not in canonical form")
        return head


class Signer:
    """The record's signer: a name, as `llm-audit/llm1`, and the 32-byte seed of an Ed25519 key."""

    def __init__(self, name: str, seed: bytes) -> None:
        """Raises HeadError for a name that a note cannot carry, or a seed of another length."""
        if not re.fullmatch(r"[^\s+]+", name) or len(seed) != SEED_BYTES:
            raise HeadError(f"the name {name!r} must have no space and no plus, and the seed, of {len(seed)} bytes,"
                            f" must have {SEED_BYTES}: correct the wrong one")  # fmt: skip
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        public = ED25519 + self._key.public_key().public_bytes_raw()
        key_hash = _key_hash(name, public)
        self.verifier = Verifier(f"{name}+{key_hash.hex()}+{base64.b64encode(public).decode()}")

    def sign(self, head: Head) -> bytes:
        """The signed note."""
        signature = self._key.sign(head.text(self.verifier.name))
        return _note(self.verifier.name, head, self.verifier.key_hash + signature)


def seed_of(text: str) -> bytes:
    """A key's seed from its 64 hex digits; HeadError, without the value, for anything else."""
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip()):
        raise HeadError("the signing key's seed is not 64 hex digits: make one with `openssl rand -hex 32`")
    return bytes.fromhex(text.strip())


def stated(text: bytes) -> tuple[str, Head]:
    """A name and its head, from the lines that `Head.text` made; ValueError for any other."""
    name, size, root, *times, end = text.decode().split("\n")
    head = Head(int(size), base64.b64decode(root, validate=True), *times[:1])
    if end or head.text(name) != text or (times and not re.fullmatch(TIME, times[0])):
        raise ValueError(f"it does not have the format of a head: {text[:200]!r}")
    return name, head


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The complete notes of a file of heads, and the bytes of a torn one."""
    parts = data.split(b"\n\n")
    whole = (len(parts) - 1) // 2
    notes = [parts[2 * n] + b"\n\n" + parts[2 * n + 1] + b"\n" for n in range(whole)]
    return notes, data[sum(len(note) + 1 for note in notes) :]


def tips(path: Path) -> list[Head]:
    """The complete tips of a file; none if there is no file."""
    heads = []
    for text in path.read_bytes().split(b"\n\n")[:-1] if path.exists() else []:
        with suppress(ValueError):
            heads.append(stated(text + b"\n")[1])
    return heads


def read(path: Path) -> tuple[list[bytes], bytes]:
    """`split` of the file; empty if there is none."""
    return split(path.read_bytes()) if path.exists() else ([], b"")


def _key_hash(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + public).digest()[:4]


def _note(name: str, head: Head, signature: bytes) -> bytes:
    return head.text(name) + f"\n— {name} {base64.b64encode(signature).decode()}\n".encode()
