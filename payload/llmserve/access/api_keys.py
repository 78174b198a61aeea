"""API keys and client certificates: records in a file that the gateway watches. Secrets are never stored.

A key has the form `llmk_<id>_<secret>`. Its record holds HMAC-SHA256(pepper, key); a certificate's record holds the SHA-256 of
its DER. Both name the holder.
"""

import fcntl
import grp
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llmcore.files import Stamp, stamp
from llmserve.access.client_certificates import Certificate
from llmserve.api.errors import ApiError, unauthenticated, unavailable

log = logging.getLogger("llmserve.keys")
PEPPER_BYTES = 16  # minimum
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # of a tenant, a role, or a local subject
SUBJECT = re.compile(r"[!-~]{1,255}")  # also of subjects of an identity provider


class KeyFileError(Exception):
    """Unusable keys or pepper; the message says what to do."""


class Record(BaseModel):
    """One key or certificate. Times are UTC; `expires` None means never, `revoked` None means not revoked.

    `replaces`: id of the key that this one succeeds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    kind: Literal["api_key", "certificate"] = "api_key"
    hash: str | None = None
    fingerprint: str | None = None
    subject: str
    tenant: str
    roles: tuple[str, ...]
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    replaces: str | None = None

    @model_validator(mode="after")
    def has_its_proof(self) -> "Record":
        """A key has a hash and a certificate a fingerprint; no record has both."""
        is_key, is_certificate = self.hash is not None, self.fingerprint is not None
        if (is_key, is_certificate) != (self.kind == "api_key", self.kind == "certificate"):
            raise ValueError(f"the record {self.id} of kind {self.kind} has the wrong proof")
        return self


class Blocked(BaseModel):
    """A subject whose tokens are accepted only if they were issued after `since`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    subject: str
    since: datetime


class KeyFile(BaseModel):
    """Content of the keys file."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    keys: list[Record] = []
    blocked: list[Blocked] = []


def key_hash(pepper: bytes, key: str) -> str:
    """The hash of a key in its record."""
    return hmac.digest(pepper, key.encode(), "sha256").hex()


def check_pepper(pepper: bytes, source: str) -> bytes:
    """The pepper; raises KeyFileError if it is too short."""
    if len(pepper) < PEPPER_BYTES:
        raise KeyFileError(
            f"the pepper from {source} has {len(pepper)} bytes: it needs at least {PEPPER_BYTES} random ones"
        )
    return pepper


def absent(path: Path) -> KeyFile:
    """An empty file if there never was one. Raises KeyFileError if the file existed and is gone."""
    if marker(path).exists():
        raise missing_file(path) from None
    return KeyFile()


def read_keys(path: Path) -> KeyFile:
    """All records; a file that never existed is empty. Raises KeyFileError for an invalid file, and for one that is gone."""
    try:
        with path.open("rb") as file:
            return parse(path, file)
    except FileNotFoundError:
        return absent(path)
    except OSError as error:
        raise unusable(path, str(error.strerror)) from None


def parse(path: Path, file: BinaryIO) -> KeyFile:
    """The records in `file`; raises KeyFileError."""
    try:
        return KeyFile.model_validate_json(file.read())
    except ValidationError as error:
        raise unusable(path, f"{error.error_count()} errors in its content") from None


def unusable(path: Path, reason: str) -> KeyFileError:
    return KeyFileError(f"cannot use the keys file {path} ({reason}): restore it from a backup")


def marker(path: Path) -> Path:
    """An empty file beside the keys file. It marks that a keys file existed: a missing keys file would revoke nothing."""
    return path.with_name(f".{path.name}.existed")


def missing_file(path: Path) -> KeyFileError:
    return KeyFileError(
        f"the keys file {path} existed and is gone: restore it from a backup. To start over, which makes every revoked identity "
        f"provider token valid again, remove {marker(path)}, too"
    )


@contextmanager
def edited_file(path: Path) -> Iterator[KeyFile]:
    """Change the content in the block; the file is then replaced atomically. Concurrent editors wait for each other.

    Root edits a file in the gateway's directory, and the gateway could put a link in its place at any moment. So the file is
    opened and replaced through the directory's descriptor, and links are never followed.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        content = read_in(folder, path)
        yield content
        write_in(folder, path, content)
        os.fsync(folder)
    finally:
        os.close(folder)


def read_in(folder: int, path: Path) -> KeyFile:
    """`read_keys` of the regular file of that name in the directory `folder`."""
    try:
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return absent(path)
    except OSError as error:
        raise unusable(path, str(error.strerror)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)  # a directory is none that fdopen() takes
        raise unusable(path, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        return parse(path, file)


@contextmanager
def edited(path: Path) -> Iterator[list[Record]]:
    """`edited_file`, for changes of records only."""
    with edited_file(path) as content:
        yield content.keys


def write_in(folder: int, path: Path, content: KeyFile) -> None:
    """Replace the file in the directory `folder`: mode 0640, owned by root and the gateway's group."""
    name = f".{path.name}.{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fchmod(descriptor, 0o640)
            if os.geteuid() == 0:
                os.fchown(descriptor, *gateway_ids(folder))
            os.fsync(descriptor)
        os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        # After the file, so that a power cut leaves no marker without one.
        marked = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        os.close(os.open(marker(path).name, marked, 0o644, dir_fd=folder))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        raise


def gateway_ids(folder: int) -> tuple[int, int]:
    """Root and the gateway's group: the file is writable by root and readable by the gateway."""
    try:
        return 0, grp.getgrnam("llm-gateway").gr_gid
    except KeyError:  # no such group on this machine: use the owner of the folder
        owner = os.fstat(folder)
        return owner.st_uid, owner.st_gid


def new_key(
    pepper: bytes, subject: str, tenant: str, roles: list[str], lifetime: timedelta | None
) -> tuple[str, Record]:
    """A new key and its record."""
    number = secrets.token_hex(6)
    key = f"llmk_{number}_{secrets.token_hex(24)}"
    now = datetime.now(UTC).replace(microsecond=0)
    expires = now + lifetime if lifetime else None
    return key, Record(
        id=number,
        hash=key_hash(pepper, key),
        subject=subject,
        tenant=tenant,
        roles=tuple(roles),
        created=now,
        expires=expires,
    )


def new_certificate(
    certificate: Certificate, subject: str, tenant: str, roles: list[str], lifetime: timedelta | None
) -> Record:
    """Record of a certificate; it expires with the certificate at the latest."""
    now = datetime.now(UTC).replace(microsecond=0)
    expires = min(certificate.not_after, now + lifetime) if lifetime else certificate.not_after
    return Record(
        id=secrets.token_hex(6),
        kind="certificate",
        fingerprint=certificate.fingerprint,
        subject=subject,
        tenant=tenant,
        roles=tuple(roles),
        created=now,
        expires=expires,
    )


def ended(record: Record) -> ApiError | None:
    """Why this record is no longer valid; None while it is."""
    word, name = ("key", "API key") if record.kind == "api_key" else ("certificate", "client certificate")
    if record.revoked is not None:
        return unauthenticated(f"revoked_{word}", f"the {name} {record.id} was revoked: request a new one")
    if record.expires is not None and record.expires <= datetime.now(UTC):
        when = record.expires.isoformat()
        return unauthenticated(
            f"expired_{word}", f"the {name} {record.id} expired at {when}: request a new one"
        )
    return None


def replacement(
    pepper: bytes, old: Record, overlap: timedelta, lifetime: timedelta | None
) -> tuple[str, Record, Record]:
    """A new key for the same holder, its record, and the old record, which now expires after `overlap`.

    Without `lifetime`, the new key has that of the old one.
    """
    old_lifetime = old.expires - old.created if old.expires else None
    key, record = new_key(pepper, old.subject, old.tenant, list(old.roles), lifetime or old_lifetime)
    ends = record.created + overlap
    ends = min(old.expires, ends) if old.expires else ends
    return key, record.model_copy(update={"replaces": old.id}), old.model_copy(update={"expires": ends})


def end_subject(content: KeyFile, subject: str) -> tuple[list[Record], Blocked]:
    """Revoke everything that `subject` holds, and block its tokens issued so far; returns the revoked records and the
    block.
    """
    block = Blocked(subject=subject, since=datetime.now(UTC).replace(microsecond=0))
    content.blocked = [each for each in content.blocked if each.subject != subject] + [block]
    revoked = []
    for index, record in enumerate(content.keys):
        if record.subject == subject and record.revoked is None:
            content.keys[index] = record.model_copy(update={"revoked": block.since})
            revoked.append(content.keys[index])
    return revoked, block


class KeyTable:
    """The gateway's view of the file as of the last refresh. While the file is unreadable, every key is rejected."""

    def __init__(self, path: Path, pepper: bytes) -> None:
        """Reads the file."""
        self.path = path
        self.pepper = pepper
        self.records: dict[str, Record] | None = None
        self.certificates: dict[str, Record] = {}  # by fingerprint
        self.blocked: dict[str, datetime] = {}
        self.file_stamp: Stamp | None = None
        self.existed = False
        self.reload()

    def reload(self) -> None:
        """Read the file again."""
        self.file_stamp = stamp(self.path)
        try:
            content = read_keys(self.path)
            if self.file_stamp is None and self.existed:
                raise missing_file(self.path)
            self.existed = self.file_stamp is not None
        except KeyFileError as error:
            self.records = None
            log.error(str(error))
        else:
            self.records = {record.id: record for record in content.keys}
            self.certificates = {each.fingerprint: each for each in content.keys if each.fingerprint}
            self.blocked = {each.subject: each.since for each in content.blocked}
            log.info("keys read", extra={"fields": {"keys": len(self.records)}})

    def refresh(self) -> bool:
        """Reload the file if it has changed; returns whether it had."""
        if stamp(self.path) == self.file_stamp:
            return False
        self.reload()
        return True

    def readable(self) -> dict[str, Record]:
        """The records; raises ApiError 503 while the file is unreadable."""
        if self.records is None:
            raise unavailable("keys_unreadable", "the API keys cannot be read: retry later", retry_after=5)
        return self.records

    def holder(self, key: str) -> Record:
        """The record of an API key; raises ApiError 401, or 503 while the file is unreadable."""
        parts = key.split("_")
        if len(parts) != 3:
            raise unauthenticated(
                "malformed_key",
                "the API key does not have the form 'llmk_<id>_<secret>': send the complete key",
            )
        if parts[1] not in self.readable():
            self.refresh()  # it may be new
        record = self.readable().get(parts[1])
        expected = record.hash if record and record.hash else "0" * 64
        if not hmac.compare_digest(key_hash(self.pepper, key), expected) or record is None:
            raise unauthenticated("invalid_key", "the API key is wrong: check it, or request a new one")
        if refusal := ended(record):
            raise refusal
        return record

    def certificate_holder(self, fingerprint: str) -> Record:
        """The record of a client certificate; raises ApiError 401, or 503 while the file is unreadable."""
        self.readable()
        if fingerprint not in self.certificates:
            self.refresh()
        self.readable()
        record = self.certificates.get(fingerprint)
        if record is None:
            raise unauthenticated(
                "unknown_certificate",
                f"the client certificate with the SHA-256 {fingerprint} is not registered: have it added",
            )
        if refusal := ended(record):
            raise refusal
        return record

    def ended(self, number: str) -> ApiError | None:
        """Why the record `number` is no longer valid; None while it is."""
        record = (self.records or {}).get(number)
        if record is None:
            return unauthenticated("revoked_key", f"{number} is no longer registered: request a new key")
        return ended(record)
