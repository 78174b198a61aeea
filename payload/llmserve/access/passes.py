"""Passes: by which the page asks gateways in the name of a session, since it keeps no API key.

A pass is a JWT (RFC 7519, HS256) with the id of a key's record, or with what an identity provider's token said, and valid for
seconds. Page and gateways derive its key from the pepper; clients never get one.
"""

import hmac
import time
from dataclasses import asdict

import jwt

from llmserve.access.oidc import Token
from llmserve.api.errors import unauthenticated

PREFIX = "llmp_"
PASS_SECONDS = 30  # until a request begins, however long its answer takes


class Passes:
    """Issues and verifies passes; every process with the same pepper verifies those of the others."""

    def __init__(self, pepper: bytes) -> None:
        self.key = hmac.digest(pepper, b"llmkeep pass", "sha256")

    def issue(self, holder: str | Token) -> str:
        """A pass for the holder of the record with this id, or of this token."""
        said = {"sub": holder} if isinstance(holder, str) else {"token": asdict(holder)}
        claims = said | {"exp": int(time.time()) + PASS_SECONDS}
        return PREFIX + jwt.encode(claims, self.key, "HS256")

    def holder(self, text: str) -> str | Token:
        """The id of the record, or the token; raises ApiError 401."""
        try:
            claims = jwt.decode(text.removeprefix(PREFIX), self.key, ["HS256"], options={"require": ["exp"]})
            token = claims.get("token")
            return Token(**token | {"groups": tuple(token["groups"])}) if token else str(claims["sub"])
        except (jwt.PyJWTError, KeyError, TypeError):  # such a token is of a page of another release
            raise unauthenticated(
                "invalid_pass", "the pass is not one of this estate's page, or too old: send an API key"
            ) from None
