"""API keys: records in a file that the gateway watches. The secrets themselves are kept nowhere.

A key reads `llmk_<id>_<secret>`. Its record holds HMAC-SHA256(pepper, key) and who it stands for.
"""

import asyncio
import fcntl
import hmac
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llmserve.errors import unauthenticated, unavailable

log = logging.getLogger("llmserve.keys")
PEPPER_BYTES = 16  # at least
POLL_SECONDS = 0.5


class KeyFileError(Exception):
    """Keys or pepper that cannot be used; the message says what to do."""


class Record(BaseModel):
    """One key. Times are UTC; `expires` None means never, `revoked` None means not."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    hash: str
    subject: str
    tenant: str
    roles: tuple[str, ...]
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None


class KeyFile(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    keys: list[Record] = []


def key_hash(pepper: bytes, key: str) -> str:
    """What a record keeps of a key."""
    return hmac.digest(pepper, key.encode(), "sha256").hex()


def check_pepper(pepper: bytes, source: str) -> bytes:
    """The pepper, if it is long enough to be one."""
    if len(pepper) < PEPPER_BYTES:
        raise KeyFileError(
            f"the pepper from {source} has {len(pepper)} bytes: want at least {PEPPER_BYTES} random ones"
        )
    return pepper


def read_keys(path: Path) -> list[Record]:
    """All records; no file means no keys. Raises KeyFileError if the file is not what we wrote."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        kind = (
            error.strerror if isinstance(error, OSError) else f"{error.error_count()} mistakes in its content"
        )
        raise KeyFileError(
            f"cannot use the keys file {path} ({kind}): restore it, or move it away and add keys"
        ) from None


@contextmanager
def edited(path: Path) -> Iterator[list[Record]]:
    """Change the records in the block; the file is then replaced in one step. Editors wait for each other."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = read_keys(path)
        yield records
        write_keys(path, records)
        os.fsync(folder)
    finally:
        os.close(folder)


def write_keys(path: Path, records: list[Record]) -> None:
    """Replace the file: 0640, group as the old file's or the folder's gateway group."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(KeyFile(keys=records).model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fchmod(file.fileno(), 0o640)
            if os.geteuid() == 0:
                give_to_gateway(path, name)
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def give_to_gateway(path: Path, name: str) -> None:
    """root writes, the gateway's group reads."""
    try:
        shutil.chown(name, user="root", group="llm-gateway")
    except LookupError:  # a machine without the gateway's user: whoever owns the folder reads
        owner = path.parent.stat()
        os.chown(name, owner.st_uid, owner.st_gid)


def new_key(
    pepper: bytes, subject: str, tenant: str, roles: list[str], lifetime: timedelta | None
) -> tuple[str, Record]:
    """A fresh key and its record."""
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


class KeyTable:
    """The gateway's view of the file, at most POLL_SECONDS old. An unreadable file admits nobody."""

    def __init__(self, path: Path, pepper: bytes) -> None:
        """Read the file once."""
        self.path = path
        self.pepper = pepper
        self.records: dict[str, Record] | None = None
        self.seen: tuple[int, int, int] | None = None
        self.reload()

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever the file is replaced or rewritten."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def reload(self) -> None:
        """Take the file as it is now."""
        self.seen = self.stamp()
        try:
            self.records = {record.id: record for record in read_keys(self.path)}
        except KeyFileError as error:
            self.records = None
            log.error(str(error))
        else:
            log.info("keys read", extra={"fields": {"keys": len(self.records)}})

    async def watch(self, changed: Callable[[], None]) -> None:
        """Reload whenever the file changes, then call `changed`; runs until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self.stamp() != self.seen:
                self.reload()
                changed()

    def identify(self, authorization: bytes | None) -> Record:
        """Whose key this is; raises ApiError 401, or 503 while the keys cannot be read."""
        if authorization is None:
            raise unauthenticated("missing_key", "no API key: send the header 'Authorization: Bearer llmk_…'")
        scheme, _, token = authorization.partition(b" ")
        key = token.strip().decode("latin-1")
        parts = key.split("_")
        if scheme.lower() != b"bearer" or len(parts) != 3 or parts[0] != "llmk":
            raise unauthenticated(
                "malformed_key",
                "the Authorization header is not 'Bearer llmk_<id>_<secret>': send a whole API key",
            )
        if self.records is None:
            raise unavailable(
                "keys_unreadable", "API keys cannot be checked now: ask again later", retry_after=5
            )
        if parts[1] not in self.records and self.stamp() != self.seen:
            self.reload()  # it may have been made a moment ago
        record = (self.records or {}).get(parts[1])
        digest = key_hash(self.pepper, key)
        if not hmac.compare_digest(digest, record.hash if record else "0" * 64) or record is None:
            raise unauthenticated("invalid_key", "the API key is wrong: check it, or ask for a new one")
        if record.revoked is not None:
            raise unauthenticated("revoked_key", f"the API key {record.id} was revoked: ask for a new one")
        if record.expires is not None and record.expires <= datetime.now(UTC):
            when = record.expires.isoformat()
            raise unauthenticated(
                "expired_key", f"the API key {record.id} expired at {when}: ask for a new one"
            )
        return record

    def is_live(self, number: str) -> bool:
        """Whether the key of this id may still be answered."""
        record = (self.records or {}).get(number)
        if record is None or record.revoked is not None:
            return False
        return record.expires is None or record.expires > datetime.now(UTC)
