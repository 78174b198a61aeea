"""An identity provider for tests: real keys, real tokens, and the JWKS file that an operator would install."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from llmserve.settings import Oidc

ISSUER, AUDIENCE = "https://login.corp.example", "llm"
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Provider:
    """Keys by kid, each with its algorithm; the first one signs by default."""

    def __init__(self, jwks_file: Path) -> None:
        """Creates an EC and an RSA key, and publishes them."""
        self.jwks_file = jwks_file
        self.keys: dict[str, tuple[PrivateKey, str]] = {
            "ec1": (ec.generate_private_key(ec.SECP256R1()), "ES256"),
            "rsa1": (rsa.generate_private_key(65537, 2048), "RS256"),
        }
        self.publish()

    def jwk(self, kid: str) -> dict[str, Any]:
        private, algorithm = self.keys[kid]
        public: Any = private.public_key()
        family: Any = {"EC": ECAlgorithm, "RS": RSAAlgorithm, "Ed": OKPAlgorithm, "ES": ECAlgorithm}[
            algorithm[:2]
        ]
        described: dict[str, Any] = {**family.to_jwk(public, as_dict=True), "kid": kid, "use": "sig"}
        return described | {"alg": algorithm}

    def publish(self, *more: Any) -> None:
        """Replace the JWKS file atomically; `more` are additional entries."""
        keys = [*(self.jwk(kid) for kid in self.keys), *more]
        aside = self.jwks_file.with_suffix(".new")
        aside.write_text(json.dumps({"keys": keys}))
        aside.replace(self.jwks_file)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of a valid token, with `changes`; None removes a claim."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "iat": now,
            "exp": now + 300,
            "sub": "lea@corp",
            "tenant": "corp",
            "realm": {"groups": ["developers"]},
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, kid: str = "ec1", headers: dict[str, Any] | None = None, **changes: Any) -> str:
        private, algorithm = self.keys[kid]
        return jwt.encode(self.claims(**changes), private, algorithm, headers={"kid": kid, **(headers or {})})

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The section `identity.oidc` of the gateway's configuration."""
        return {
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks_file": str(self.jwks_file),
            "tenant_claim": "tenant",
            "groups_claim": "realm.groups",
            **changes,
        }

    def oidc(self, **changes: Any) -> Oidc:
        """The settings as parsed by the gateway."""
        return Oidc.model_validate(self.settings(**changes))
