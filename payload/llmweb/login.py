"""Sign-in at the identity provider: authorization code with PKCE (RFC 6749, 7636), as a public client.

The access token is the one that API clients would send, and is verified in the same way. The session's cookie contains it,
sealed.
"""

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import re
import secrets
import socket
import ssl
import time
from urllib.parse import urlencode, urlsplit

from llmserve.access.oidc import Issuer
from llmserve.api.errors import ApiError, unauthenticated, unavailable
from llmweb.settings import Login

BEGUN_SECONDS = 600
COOKIE = re.compile(r"(?P<state>[\w-]{43})\.(?P<verifier>[\w-]{64})\.(?P<time>\d{1,12})", re.ASCII)
ANSWER_BYTES = 256 * 1024
ASK_SECONDS = 10.0


class Logins:
    """Sign-ins. Their state is in the browser: any client may start some, and the page may restart meanwhile."""

    def __init__(self, config: Login, issuer: Issuer) -> None:
        """`issuer` verifies the tokens."""
        self.config = config
        self.issuer = issuer

    def begin(self) -> tuple[str, str]:
        """The browser's cookie (state, verifier and time), and the address where its user signs in."""
        state, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
        query = {
            "response_type": "code",
            "client_id": self.config.client,
            "redirect_uri": self.config.redirect,
            "scope": self.config.scope,
            "state": state,
            "code_challenge": challenge.decode(),
            "code_challenge_method": "S256",
        }
        return f"{state}.{verifier}.{int(time.time())}", f"{self.config.authorize}?{urlencode(query)}"

    async def finish(self, cookie: str, state: str, code: str) -> str:
        """The access token. `cookie`: the browser's, of `begin`. Raises ApiError 401 or 503."""
        begun = COOKIE.fullmatch(cookie)
        if (
            begun is None
            or not code
            or not hmac.compare_digest(begun["state"].encode(), state.encode())
            or not 0 <= time.time() - int(begun["time"]) <= BEGUN_SECONDS
        ):
            raise unauthenticated(
                "login_failed", "this sign-in was started elsewhere or has expired: start it again"
            )
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.config.redirect,
            "client_id": self.config.client,
            "code_verifier": begun["verifier"],
        }
        try:
            status, answer = await asyncio.to_thread(self.ask, urlencode(form))
        except (OSError, http.client.HTTPException):
            raise unavailable(
                "provider_unavailable",
                "the identity provider is not responding: use an API key, or try again later",
                5,
            ) from None
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str) or not token.isascii():
            raise unauthenticated(
                "login_failed", "the identity provider rejected this sign-in: start it again"
            )
        return token

    def ask(self, form: str) -> tuple[int, dict[str, object]]:
        """In a thread: status and JSON of the token endpoint. Raises OSError or HTTPException."""
        parts = urlsplit(self.config.token)
        host, port = parts.hostname or "", parts.port or 443
        context = ssl.create_default_context(cafile=str(self.config.ca))
        connection = http.client.HTTPSConnection(host, port, timeout=ASK_SECONDS)
        plain = socket.create_connection((self.config.address or host, port), ASK_SECONDS)
        try:
            connection.sock = context.wrap_socket(plain, server_hostname=host)
            headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
            connection.request("POST", parts.path, form, headers)
            response = connection.getresponse()
            body = response.read(ANSWER_BYTES)
        finally:
            connection.close()
            plain.close()
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        return response.status, answer if isinstance(answer, dict) else {}


def refused(error: str) -> ApiError:
    """The error that the identity provider sent in place of a code; its text is never shown."""
    code = "login_denied" if error == "access_denied" else "login_failed"
    return unauthenticated(code, "the identity provider did not sign you in: start again, or use an API key")
