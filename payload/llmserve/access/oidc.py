"""Tokens of an OpenID Connect identity provider (RFC 7519), verified offline with its keys from a file (JWKS, RFC
7517).

The provider is never contacted: the operator supplies its public keys, and a new file takes effect at once.
"""

import json
import logging
import re
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import AllowedPublicKeys
from jwt.utils import base64url_decode

from llmcore.config import ConfigError
from llmcore.files import Stamp, stamp
from llmserve.access.api_keys import NAME, SUBJECT
from llmserve.api.errors import ApiError, unauthenticated, unavailable
from llmserve.settings import Oidc

log = logging.getLogger("llmserve.oidc")
TOKEN_BYTES = 8 * 1024
JWKS_BYTES = 1024 * 1024
RSA_BITS = 2048  # minimum
MEMORY_SECONDS = 60.0  # how long a verified token is trusted without verifying it again
MEMORY_TOKENS = 4096
LOOK_SECONDS = 1.0  # minimum time between two reloads for an unknown key id
GROUPS, GROUP_LETTERS = 256, 256  # maximum of a token, of a name
TOKEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Key type and curve of each algorithm (RFC 7518, 3.1; RFC 8037); algorithms that are not listed are never accepted.
KEY_KINDS: dict[str, tuple[str, str | None]] = {
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
    **{f"{family}{bits}": ("RSA", None) for family in ("RS", "PS") for bits in (256, 384, 512)},
}
THUMBPRINT = {"EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x"), "RSA": ("e", "kty", "n")}
# Exceptions of PyJWT, checked in this order; any other means a malformed token.
REFUSALS: list[tuple[type[jwt.PyJWTError], str, str]] = [
    (jwt.InvalidSignatureError, "invalid_token", "the token's signature is wrong"),
    (jwt.ExpiredSignatureError, "expired_token", "the token has expired"),
    (jwt.ImmatureSignatureError, "immature_token", "the token is not valid yet: check the clocks"),
    (jwt.InvalidIssuerError, "wrong_issuer", "the token is from another issuer"),
    (jwt.MissingRequiredClaimError, "incomplete_token", "the token needs the claims exp, iat, aud and iss"),
    (jwt.InvalidAudienceError, "wrong_audience", "the token is for another audience (aud)"),
]


@dataclass(frozen=True, slots=True)
class Token:
    """The content of a verified token. Times in seconds since the epoch; `signer`: thumbprint of the key."""

    id: str
    subject: str
    tenant: str
    groups: tuple[str, ...]
    issued: float
    expires: float
    signer: str


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key of the provider, and the algorithms it may be used with."""

    kid: str
    algorithms: frozenset[str]
    public: AllowedPublicKeys
    thumbprint: str


def refused(code: str, what: str) -> ApiError:
    """A 401 whose message quotes nothing from the token."""
    return unauthenticated(code, f"{what}: get a new one from your identity provider")


def read_jwks(path: Path) -> list[SigningKey]:
    """The keys that can verify tokens; raises ConfigError if there is none, or a private key."""
    try:
        content = path.read_bytes()
        document = json.loads(content) if len(content) <= JWKS_BYTES else None
    except OSError as error:
        raise ConfigError(f"cannot read the identity provider's keys {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        document = None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f'{path} is not a JWKS: it needs {{"keys": […]}} of at most {JWKS_BYTES} bytes')
    if any(isinstance(entry, dict) and "d" in entry for entry in entries):
        raise ConfigError(
            f"{path} contains a private key: generate a new key pair, and supply only the public key"
        )
    keys = [key for entry in entries if (key := signing_key(entry))]
    if not keys:
        raise ConfigError(
            f"{path} contains {len(entries)} keys, but none that can verify tokens: supply RSA keys of at least {RSA_BITS} bits, "
            "EC or Ed25519 keys, each with a kid"
        )
    return keys


def signing_key(entry: Any) -> SigningKey | None:
    """A JWK as a verification key; None for any other, including symmetric keys."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or entry.get("use") == "enc":
        return None
    kind = entry.get("kty")
    algorithms = {
        name for name, (kty, crv) in KEY_KINDS.items() if kty == kind and crv in (None, entry.get("crv"))
    }
    if "alg" in entry:
        algorithms &= {str(entry["alg"])}
    if not algorithms:
        return None
    try:
        public = jwt.PyJWK(entry, min(algorithms)).key
    except jwt.PyJWTError:
        return None
    if isinstance(public, RSAPublicKey) and public.key_size < RSA_BITS:
        return None
    members = {name: entry[name] for name in THUMBPRINT[entry["kty"]]}
    return SigningKey(entry["kid"], frozenset(algorithms), public, sha256(canonical(members)).hexdigest())


def canonical(members: dict[str, str]) -> bytes:
    """The hash input of a key's thumbprint (RFC 7638)."""
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def claim(claims: dict[str, Any], name: str) -> Any:
    """The claim `name`; if there is none, `name` is a path separated by dots (realm_access.roles)."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_group(value: object) -> bool:
    """Whether it is a single line of text: group names contain spaces, slashes and letters of all scripts."""
    return isinstance(value, str) and 0 < len(value) <= GROUP_LETTERS and value.isprintable()


class Issuer:
    """The identity provider whose tokens are accepted."""

    def __init__(self, config: Oidc) -> None:
        """Reads its keys. Without keys, every token is answered with 503."""
        self.config = config
        self.keys: list[SigningKey] | None = None
        self.verified: dict[bytes, tuple[Token, float]] = {}  # by SHA-256, with expiry as time.monotonic()
        self.next_look = 0.0
        self.file_stamp: Stamp | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again, and forget tokens verified with older keys."""
        self.file_stamp = stamp(self.config.jwks_file)
        self.verified.clear()
        try:
            self.keys = read_jwks(self.config.jwks_file)
        except ConfigError as error:
            self.keys = None
            log.error(str(error))
        else:
            log.info("identity provider's keys read", extra={"fields": {"keys": len(self.keys)}})

    def refresh(self) -> bool:
        """Reload the file if it has changed; returns whether it had."""
        if stamp(self.config.jwks_file) == self.file_stamp:
            return False
        self.reload()
        return True

    def token(self, text: str) -> Token:
        """Verify a token; raises ApiError 401, or 503 without the provider's keys."""
        if len(text) > TOKEN_BYTES:
            raise refused("token_too_long", f"the token has {len(text)} bytes, the limit is {TOKEN_BYTES}")
        digest = sha256(text.encode("latin-1")).digest()
        token, until = self.verified.get(digest, (None, 0.0))
        if token is None or until < time.monotonic():
            token = self.verify(text, digest.hex())
            self.verified.pop(digest, None)
            if len(self.verified) >= MEMORY_TOKENS:
                self.verified.pop(next(iter(self.verified)))
            self.verified[digest] = token, time.monotonic() + MEMORY_SECONDS
        if refusal := self.ended(token):
            raise refusal
        return token

    def ended(self, token: Token) -> ApiError | None:
        """Why a verified token is no longer valid; None while it is."""
        if self.keys is None:
            return unavailable(
                "identity_unavailable",
                "tokens cannot be verified at present: use an API key, or retry later",
                retry_after=5,
            )
        if token.expires + self.config.leeway_seconds <= time.time():
            return refused("expired_token", "the token has expired")
        if all(key.thumbprint != token.signer for key in self.keys):
            return refused("revoked_token", "the key that signed the token has been withdrawn")
        return None

    def verify(self, text: str, digest: str) -> Token:
        """Check header, key, signature and claims, in this order; raises ApiError."""
        key, algorithm = self.key_of(text)
        try:
            claims = jwt.decode(
                text,
                key.public,
                algorithms=[algorithm],
                audience=self.config.audience,
                issuer=self.config.issuer,
                leeway=self.config.leeway_seconds,
                options={"require": ["exp", "iat", "aud", "iss"]},
            )
        except jwt.PyJWTError as error:
            for kind, code, what in REFUSALS:
                if isinstance(error, kind):
                    raise refused(code, what) from None
            raise refused("malformed_token", "the token cannot be parsed") from None
        return self.read_claims(claims, digest, key.thumbprint)

    def key_of(self, text: str) -> tuple[SigningKey, str]:
        """The key that the token names, and its algorithm. Both must be ours: the token can only select, not supply
        them.
        """
        try:
            head = json.loads(base64url_decode(text.split(".", 1)[0]))
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            raise refused("malformed_token", "the token cannot be parsed")
        algorithm = head.get("alg")
        if algorithm not in self.config.algorithms:
            allowed = ", ".join(self.config.algorithms)
            raise refused("token_algorithm", f"the token is not signed by one of {allowed}")
        if "crit" in head:
            raise refused("token_critical_header", "the token has unsupported extensions (crit)")
        matches = self.keys_by_id(head.get("kid"))
        if not matches and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LOOK_SECONDS
            self.refresh()  # the provider may have a new key
            matches = self.keys_by_id(head.get("kid"))
        if not matches:
            raise refused(
                "unknown_token_key", "the token's key (kid) is not one of the identity provider's keys"
            )
        for key in matches:
            if algorithm in key.algorithms:
                return key, algorithm
        raise refused("token_key_mismatch", "the token's key is for another algorithm")

    def keys_by_id(self, kid: object) -> list[SigningKey]:
        """Keys with this kid; raises ApiError 503 if there are no keys at all."""
        if self.keys is None:
            raise unavailable(
                "identity_unavailable",
                "tokens cannot be verified at present: use an API key, or retry later",
                retry_after=5,
            )
        return [key for key in self.keys if key.kid == kid]

    def read_claims(self, claims: dict[str, Any], digest: str, signer: str) -> Token:
        """The token's content; raises ApiError 401 if a claim is missing or invalid."""
        config, issued = self.config, int(claims["iat"])
        if time.time() - issued > config.max_age_seconds + config.leeway_seconds:
            raise refused("token_too_old", f"the token was issued more than {config.max_age_seconds} s ago")
        subject, tenant = claim(claims, config.subject_claim), claim(claims, config.tenant_claim)
        groups = claim(claims, config.groups_claim)
        if not isinstance(subject, str) or not SUBJECT.fullmatch(subject):
            raise refused("incomplete_token", f"the token has no valid subject in '{config.subject_claim}'")
        if not isinstance(tenant, str) or not NAME.fullmatch(tenant):
            raise refused("incomplete_token", f"the token has no valid tenant in '{config.tenant_claim}'")
        if not isinstance(groups, list) or not all(map(is_group, groups)):
            raise refused("incomplete_token", f"the token has no list of names in '{config.groups_claim}'")
        if len(groups) > GROUPS:
            excess = f"the token has {len(groups)} groups in '{config.groups_claim}', the limit is {GROUPS}"
            raise refused(
                "too_many_groups", f"{excess}: have the provider send only the groups of this service"
            )
        number = str(claims.get("jti", ""))
        number = number if TOKEN_ID.fullmatch(number) else digest[:16]
        return Token(number, subject, tenant, tuple(groups), issued, int(claims["exp"]), signer)
