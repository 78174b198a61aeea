"""Who asks. An API key, a token of the company's identity provider, or a client certificate says so.

A request shows one of them. An Authorization header is judged alone: where it is wrong, a certificate does not help.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmserve.access.api_keys import KeyTable, Record
from llmserve.access.client_certificates import presented
from llmserve.access.last_used import LastUsed, last_used_file
from llmserve.access.oidc import Issuer, Token
from llmserve.api.errors import ApiError, unauthenticated, unavailable

POLL_SECONDS = 0.5
SEND_A_KEY = "send the header 'Authorization: Bearer llmk_…'"
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as policy, limits and audit see it. `id` names the key, certificate or token; `token` is what OIDC gave."""

    kind: Literal["api_key", "certificate", "oidc"]
    id: str
    subject: str
    tenant: str
    roles: tuple[str, ...]
    token: Token | None = field(default=None, repr=False)


def of_record(record: Record) -> Identity:
    """Whom a record stands for."""
    return Identity(record.kind, record.id, record.subject, record.tenant, record.roles)


class Authenticator:
    """Gives each request its identity, and knows when an identity has ended."""

    def __init__(
        self, keys: KeyTable, certificate_header: str | None = None, issuer: Issuer | None = None
    ) -> None:
        """`certificate_header` names the header in which the edge, and nobody else, hands certificates over."""
        self.keys = keys
        self.certificate_header = certificate_header.lower().encode() if certificate_header else None
        self.issuer = issuer
        self.last_used = LastUsed(last_used_file(keys.path))

    def identify(self, headers: Headers) -> Identity:
        """Who sent these headers; raises ApiError 401, or 503 while that cannot be known."""
        authorization = [value for name, value in headers if name == b"authorization"]
        if len(authorization) > 1:
            raise unauthenticated("malformed_key", "there are two Authorization headers: send one")
        if authorization:
            return self.bearer(authorization[0])
        certificates = [value for name, value in headers if name == self.certificate_header]
        if certificates:
            return self.certificate(certificates)
        raise unauthenticated("missing_key", f"no API key: {SEND_A_KEY}")

    def bearer(self, authorization: bytes) -> Identity:
        """The identity of an Authorization header."""
        scheme, _, rest = authorization.partition(b" ")
        token = rest.strip().decode("latin-1")
        if scheme.lower() == b"bearer" and token.startswith("llmk_"):
            return self.used(self.keys.holder(token))
        if scheme.lower() == b"bearer" and self.issuer and token.count(".") == 2:
            return self.token(self.issuer, token)
        wanted = "'Bearer llmk_<id>_<secret>'" + (" or 'Bearer <token>'" if self.issuer else "")
        raise unauthenticated(
            "malformed_key", f"the Authorization header is not {wanted}: send a whole API key"
        )

    def token(self, issuer: Issuer, text: str) -> Identity:
        """The identity of a token."""
        token = issuer.token(text)
        identity = Identity("oidc", token.id, token.subject, token.tenant, token.roles, token)
        if refusal := self.ended(identity):
            raise refusal
        return identity

    def certificate(self, values: Sequence[bytes]) -> Identity:
        """The identity of what the edge says about the client's certificate."""
        try:
            [value] = values
            fingerprint = presented(value).fingerprint
        except ValueError:
            raise unauthenticated(
                "invalid_certificate", "what the edge says about your certificate is none: tell the operator"
            ) from None
        return self.used(self.keys.certificate_holder(fingerprint))

    def used(self, record: Record) -> Identity:
        """The identity of a record that has just been shown."""
        self.last_used.touch(record.id)
        return of_record(record)

    def ended(self, identity: Identity) -> ApiError | None:
        """Why this identity is no longer good; None while it is."""
        token = identity.token
        if token is None or self.issuer is None:
            return self.keys.ended(identity.id)
        if self.keys.records is None:
            return unavailable("keys_unreadable", "who may ask cannot be read now: ask again later", 5)
        # The provider's clock may be ahead by the leeway: what it issued before the block may bear a later time.
        blocked = self.keys.blocked.get(token.subject)
        if blocked and token.issued <= blocked.timestamp() + self.issuer.config.leeway_seconds:
            return unauthenticated("revoked_token", "tokens of this age were revoked: log in again")
        return self.issuer.ended(token)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Reload what has changed on disk, then call `changed`; runs until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            fresh = [each.refresh() for each in (self.keys, self.issuer) if each]
            if any(fresh):
                changed()
            if self.keys.records is not None:
                self.last_used.flush_if_due(self.keys.records)

    def close(self) -> None:
        """Write down what is not written yet."""
        if self.keys.records is not None and self.last_used.unwritten:
            self.last_used.flush(self.keys.records)
