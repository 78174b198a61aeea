"""Answer ids, with which only the subject that received an answer can rate it.

An id is the exchange's transaction, the second it was issued in, a mark of the host that answered, and a truncated HMAC of
these and of tenant and subject. It reveals nothing about model or experiment: the answer and its model are looked up by the
transaction in our own records.
"""

import base64
import binascii
import hmac
import time
from dataclasses import dataclass

from llmserve.access.estate_keys import Ring, derived
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError

TRANSACTION, TIME, HOST, TAG = 8, 4, 3, 15  # bytes; 30 together are 40 letters without padding
WHAT = TRANSACTION + TIME + HOST
LETTERS = (WHAT + TAG) * 4 // 3
PREFIXES = ("chatcmpl-", "cmpl-", "resp_")  # of OpenAI's ids
AHEAD_SECONDS = 60  # by which the clock of another gateway may be ahead
DAY = 86_400


@dataclass(frozen=True, slots=True)
class Answered:
    """The content of an id. `transaction`: of the exchange, as in the audit record. `issued`: seconds since the epoch. `host`:
    the host that answered; "" if no known host has this mark.
    """

    transaction: str
    issued: int
    host: str


class ResponseIds:
    """Issues ids and verifies them; the gateways of an estate verify each other's."""

    def __init__(self, keys: Ring, days: int = 30, host: str = "local", others: tuple[str, ...] = ()) -> None:
        """`days`: how long an answer may be rated. `others`: hosts that accept ratings of their answers from this one."""
        self.keys = derived(keys, "response id")
        self.days = days
        self.host, self.others = host, others
        # By an HMAC, so that only the estate can tell which host it is.
        marking = derived(keys, "host of a response id")
        self.hosts = {marked(key, name): name for key in marking for name in (*others, host)}
        self.mark = marked(marking[0], host)

    def tags(self, what: bytes, identity: Identity) -> list[bytes]:
        """One HMAC for each key. The length of the tenant keeps `ab` and `c` apart from `a` and `bc`."""
        tenant, subject = identity.tenant.encode(), identity.subject.encode()
        bound = b"%b%d %b%b" % (what, len(tenant), tenant, subject)
        return [hmac.digest(key, bound, "sha256")[:TAG] for key in self.keys]

    def issue(self, transaction: str, identity: Identity) -> str:
        """The id of an answer to `identity`; `transaction`: 16 hexadecimal digits."""
        what = bytes.fromhex(transaction) + int(time.time()).to_bytes(TIME) + self.mark
        return base64.urlsafe_b64encode(what + self.tags(what, identity)[0]).decode()

    def verify(self, text: str, identity: Identity) -> Answered:
        """Raises ApiError 404 if the id was not given to `identity`, and 410 if it is too old."""
        answered = self.opened(text, identity)
        age = time.time() - answered.issued
        if not -AHEAD_SECONDS <= age <= self.days * DAY:
            days = f"{age / DAY:.0f} days old" if age > 0 else "from the future"
            raise ApiError(
                410, "response_expired", f"the answer is {days}: rate answers within {self.days} days", "id"
            )
        return answered

    def opened(self, text: str, identity: Identity) -> Answered:
        """Parse an id of any age; raises ApiError 404."""
        for prefix in PREFIXES:
            text = text.removeprefix(prefix)
        try:
            content = base64.b64decode(text, altchars=b"-_", validate=True) if len(text) == LETTERS else b""
        except (binascii.Error, ValueError):  # letters beyond ASCII
            content = b""
        what, tag = content[:WHAT], content[WHAT:]
        if not any(hmac.compare_digest(tag, each) for each in self.tags(what, identity)):
            raise ApiError(
                404,
                "response_not_found",
                f"'id' is {text[:60]!r}, which is not the id of an answer to you: send the answer's header "
                "X-LLM-Response-Id, with the identity that sent the request",
                "id",
            )
        issued = int.from_bytes(what[TRANSACTION:-HOST])
        return Answered(what[:TRANSACTION].hex(), issued, self.hosts.get(what[-HOST:], ""))


def marked(key: bytes, host: str) -> bytes:
    return hmac.digest(key, host.encode(), "sha256")[:HOST]
