"""Sessions of browsers: random ids in a cookie, everything else in this process, which a restart therefore ends."""

import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from llmserve.access.identity import Identity
from llmserve.access.oidc import Token

LIFETIME_SECONDS = 8 * 3600.0
IDLE_SECONDS = 30 * 60.0
MOST = 1000
MOST_OF_A_HOLDER = 8

Holder = tuple[str, str]


@dataclass(slots=True)
class Session:
    """`holder`: kind, tenant and subject. `key`: id of the API key's record, or of the token, without which the session ends.
    `token`: what the identity provider's token said. Times of time.monotonic().
    """

    holder: Holder
    key: str
    opened: float
    used: float
    token: Token | None = None


class Sessions:
    """By the SHA-256 of their ids, the least recently used first."""

    def __init__(self) -> None:
        self.open_ones: OrderedDict[bytes, Session] = OrderedDict()

    def open(self, identity: Identity) -> str:
        """The id of a new session. Where its holder, or this process, has too many, the least recently used one ends."""
        self.sweep()
        holder = holder_of(identity)
        theirs = [name for name, each in self.open_ones.items() if each.holder == holder]
        if len(theirs) >= MOST_OF_A_HOLDER:
            del self.open_ones[theirs[0]]
        elif len(self.open_ones) >= MOST:
            self.open_ones.popitem(last=False)
        identifier, now = secrets.token_urlsafe(32), time.monotonic()
        self.open_ones[hashed(identifier)] = Session(holder, identity.id, now, now, identity.token)
        return identifier

    def key_of(self, identifier: str) -> str | None:
        """The key of a session that is still valid, which counts as use."""
        session = self.find(identifier)
        return session.key if session else None

    def find(self, identifier: str) -> Session | None:
        """A session that is still valid, which counts as use."""
        session = self.open_ones.get(hashed(identifier))
        if session is None:
            return None
        if ended(session):
            self.close(identifier)
            return None
        session.used = time.monotonic()
        self.open_ones.move_to_end(hashed(identifier))
        return session

    def close(self, identifier: str) -> None:
        self.open_ones.pop(hashed(identifier), None)

    def sweep(self) -> None:
        """Forget those that are over."""
        for name in [name for name, each in self.open_ones.items() if ended(each)]:
            del self.open_ones[name]


def holder_of(identity: Identity) -> Holder:
    """Whose sessions are counted together, however it signs in."""
    return identity.tenant, identity.subject


def ended(session: Session) -> bool:
    now = time.monotonic()
    return now - session.opened > LIFETIME_SECONDS or now - session.used > IDLE_SECONDS


def hashed(identifier: str) -> bytes:
    return hashlib.sha256(identifier.encode()).digest()
