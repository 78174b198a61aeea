"""Authentication by API key, token of an identity provider, or client certificate.

A request is authenticated by one of them. If it has an Authorization header, only that counts: a valid certificate
does not make up for an invalid header.
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
    """The caller, as seen by policy, quotas and audit. `id`: of the key, certificate or token. `token`: the OIDC
    token, if any. `roles`: of the record; `groups`: of the token, to which the policy gives roles.
    """

    kind: Literal["api_key", "certificate", "oidc"]
    id: str
    subject: str
    tenant: str
    roles: tuple[str, ...]
    token: Token | None = field(default=None, repr=False)
    groups: tuple[str, ...] = ()


def of_record(record: Record) -> Identity:
    """The identity that a record stands for."""
    return Identity(record.kind, record.id, record.subject, record.tenant, record.roles)


def of_token(token: Token) -> Identity:
    """The identity that a verified token stands for."""
    return Identity("oidc", token.id, token.subject, token.tenant, (), token, token.groups)


def refuse_other_sites(headers: Headers) -> None:
    """Raises ApiError 403 for a request that a browser sends for another site; machines send neither header.

    `Sec-Fetch-Site` comes first: `Origin` is "null" for forms of our own pages, whose referrer policy is no-referrer.
    """

    def values(header: bytes) -> set[bytes]:
        return {value for name, value in headers if name == header}

    if values(b"sec-fetch-site") == {b"same-origin"}:
        return
    own = {"Sec-Fetch-Site": {b"none"}, "Origin": {b"https://" + host for host in values(b"host")}}
    for name, accepted in own.items():
        for value in values(name.lower().encode()) - accepted:
            raise ApiError(
                403,
                "cross_site",
                f"{name} is {value[:100].decode('latin-1')!r}: another site cannot use this browser's client "
                f"certificate; send the request from this site, or {SEND_A_KEY}",
            )


class Authenticator:
    """Authenticates requests, and detects identities that have ended."""

    def __init__(
        self, keys: KeyTable, certificate_header: str | None = None, issuer: Issuer | None = None
    ) -> None:
        """`certificate_header`: the header in which the edge passes on certificates; no other process can set it."""
        self.keys = keys
        self.certificate_header = certificate_header.lower().encode() if certificate_header else None
        self.issuer = issuer
        self.last_used = LastUsed(last_used_file(keys.path))

    def identify(self, headers: Headers) -> Identity:
        """Authenticate by headers; raises ApiError 401, 503 while keys or tokens cannot be checked, or 403 for a
        certificate that a browser attached to another site's request.
        """
        authorization = [value for name, value in headers if name == b"authorization"]
        if len(authorization) > 1:
            raise unauthenticated("malformed_key", "there are two Authorization headers: send one")
        if authorization:
            return self.bearer(authorization[0])
        certificates = [value for name, value in headers if name == self.certificate_header]
        if certificates:
            refuse_other_sites(headers)
            return self.certificate(certificates)
        raise unauthenticated("missing_key", f"no API key: {SEND_A_KEY}")

    def bearer(self, authorization: bytes) -> Identity:
        scheme, _, rest = authorization.partition(b" ")
        token = rest.strip().decode("latin-1")
        if scheme.lower() == b"bearer" and token.startswith("llmk_"):
            return self.used(self.keys.holder(token))
        if scheme.lower() == b"bearer" and self.issuer and token.count(".") == 2:
            return self.token(self.issuer, token)
        forms = "'Bearer llmk_<id>_<secret>'" + (" or 'Bearer <token>'" if self.issuer else "")
        raise unauthenticated(
            "malformed_key", f"the Authorization header is not {forms}: send a complete API key"
        )

    def token(self, issuer: Issuer, text: str) -> Identity:
        return self.valid(of_token(issuer.token(text)))

    def valid(self, identity: Identity) -> Identity:
        """Raises ApiError if it has ended."""
        if refusal := self.ended(identity):
            raise refusal
        return identity

    def certificate(self, values: Sequence[bytes]) -> Identity:
        try:
            [value] = values
            fingerprint = presented(value).fingerprint
        except ValueError:
            raise unauthenticated(
                "invalid_certificate", "the edge did not pass on a valid certificate: tell the operator"
            ) from None
        return self.used(self.keys.certificate_holder(fingerprint))

    def used(self, record: Record) -> Identity:
        """The identity of a record; also notes that the record was used."""
        self.last_used.touch(record.id)
        return of_record(record)

    def ended(self, identity: Identity) -> ApiError | None:
        """Why this identity is no longer valid; None while it is."""
        token = identity.token
        if token is None or self.issuer is None:
            return self.keys.ended(identity.id)
        if self.keys.records is None:
            return unavailable("keys_unreadable", "the API keys cannot be read: retry later", 5)
        # The provider's clock may be ahead by the leeway, so a token issued before the block may carry a later time.
        blocked = self.keys.blocked.get(token.subject)
        if blocked and token.issued <= blocked.timestamp() + self.issuer.config.leeway_seconds:
            return unauthenticated(
                "revoked_token", "tokens issued before this subject was blocked are revoked: log in again"
            )
        return self.issuer.ended(token)

    async def watch(self, changed: Callable[[], None] = lambda: None) -> None:
        """Reload changed files, then call `changed`; runs until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            fresh = [each.refresh() for each in (self.keys, self.issuer) if each]
            if any(fresh):
                changed()
            if self.keys.records is not None:
                self.last_used.flush_if_due(self.keys.records)

    def close(self) -> None:
        """Write last-used times that are not written yet."""
        if self.keys.records is not None and self.last_used.unwritten:
            self.last_used.flush(self.keys.records)
