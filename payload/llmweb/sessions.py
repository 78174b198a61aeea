"""Sessions of browsers: a cookie with the credential that opened the session, sealed by the estate's keys.

Every page of the estate can open the cookie and verifies the credential again, so a session is not bound to a host, and without a
valid credential the keys are useless.
"""

import base64
import json
import secrets
import time
import zlib
from dataclasses import astuple, dataclass, field

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from llmserve.access.estate_keys import Ring, derived
from llmserve.api.errors import ApiError

LIFETIME_SECONDS = 8 * 3600
IDLE_SECONDS = 30 * 60
RENEWAL_SECONDS = 60  # between two notes of use
COOKIE_BYTES = 4000  # browsers keep 4096 of name and value
MOST_ENDED = 10_000  # a client that signs in and out without end fills no more memory


@dataclass(frozen=True, slots=True)
class Session:
    """`opened`: seconds since the epoch. `credential`: API key or access token; "" for a client certificate, which each request
    must then present. `certificate`: the id of its record, or "".
    """

    id: str
    opened: int
    credential: str = field(repr=False)
    certificate: str


class Sessions:
    """Seals sessions and opens them. A cookie's time of sealing is the session's last use, as Fernet has it; a cookie from more
    than 60 s ahead of this host's clock is refused.
    """

    def __init__(self, keys: Ring) -> None:
        purpose = derived(keys, "page session")
        self.ring = MultiFernet(Fernet(base64.urlsafe_b64encode(key)) for key in purpose)
        self.ended: dict[str, None] = {}  # ids of those that were closed here, the oldest first

    def open(self, credential: str, certificate: str = "") -> str:
        """The cookie of a new session; raises ApiError 400 if the credential does not fit."""
        session = Session(secrets.token_urlsafe(16), int(time.time()), credential, certificate)
        cookie = self.sealed(session)
        if len(cookie) > COOKIE_BYTES:
            raise ApiError(
                400,
                "token_does_not_fit",
                f"the token has {len(credential)} bytes, and {len(cookie)} as a cookie, but browsers only keep {COOKIE_BYTES}: "
                f"have the identity provider put fewer groups or claims into it, or use an API key",
            )
        return cookie

    def find(self, cookie: str) -> Session | None:
        """The session in a cookie, unless it is over; its credential has not been verified."""
        try:
            content = self.ring.decrypt(cookie, IDLE_SECONDS)
        except (InvalidToken, ValueError):  # letters beyond ASCII
            return None
        session = Session(*json.loads(zlib.decompress(content)))
        over = time.time() - session.opened > LIFETIME_SECONDS or session.id in self.ended
        return None if over else session

    def renewed(self, cookie: str) -> str | None:
        """The cookie with this time of use; None without a session, or if its last use was noted less than a minute ago."""
        session = self.find(cookie)
        if session is None or time.time() - self.ring.extract_timestamp(cookie) < RENEWAL_SECONDS:
            return None
        return self.sealed(session)

    def close(self, cookie: str) -> None:
        """End a session at this page; other pages do not learn of it."""
        if session := self.find(cookie):
            self.ended[session.id] = None
            if len(self.ended) > MOST_ENDED:
                del self.ended[next(iter(self.ended))]

    def sealed(self, session: Session) -> str:
        return self.ring.encrypt(zlib.compress(json.dumps(astuple(session)).encode(), 9)).decode()
