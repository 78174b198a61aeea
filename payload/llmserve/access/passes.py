"""Passes: by which the page asks gateways in the name of a session, since it keeps no API key.

A pass is a JWT (RFC 7519, HS256) with the id of a key's record, and valid for seconds. Page and gateways derive its key from the
pepper; clients never get one.
"""

import hmac
import time

import jwt

from llmserve.api.errors import unauthenticated

PREFIX = "llmp_"
PASS_SECONDS = 30  # until a request begins, however long its answer takes


class Passes:
    """Issues and verifies passes; every process with the same pepper verifies those of the others."""

    def __init__(self, pepper: bytes) -> None:
        self.key = hmac.digest(pepper, b"llmkeep pass", "sha256")

    def issue(self, record: str) -> str:
        """A pass for the holder of the record with this id."""
        return PREFIX + jwt.encode({"sub": record, "exp": int(time.time()) + PASS_SECONDS}, self.key, "HS256")

    def record(self, text: str) -> str:
        """The id of the record; raises ApiError 401."""
        try:
            claims = jwt.decode(
                text.removeprefix(PREFIX), self.key, ["HS256"], options={"require": ["sub", "exp"]}
            )
        except jwt.PyJWTError:
            raise unauthenticated(
                "invalid_pass", "the pass is not one of this estate's page, or too old: send an API key"
            ) from None
        return str(claims["sub"])
