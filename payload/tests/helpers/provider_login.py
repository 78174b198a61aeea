"""Stand-in for an identity provider's sign-in, over TLS: no password, and a token of `Provider` for each code."""

import base64
import hashlib
import json
import secrets
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from edge import authority, issue
from provider import Provider

CLIENT = "llmkeep-chat"


class ProviderLogin:
    """`codes`: what was asked for by each code that was not used yet."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.provider = Provider(folder / "jwks.json")
        self.ca = authority(folder, "provider-ca")
        self.certificate = issue(self.ca, "provider")
        self.codes: dict[str, dict[str, str]] = {}
        self.claims: dict[str, Any] = {}  # changes of the tokens'
        self.address = ""

    @property
    def oidc(self) -> dict[str, Any]:
        """`identity.oidc` of the gateway."""
        return self.provider.settings(leeway_seconds=0)

    def settings(self, redirect: str) -> dict[str, Any]:
        """`oidc` and `login` of web.yaml."""
        login = {
            "authorize": f"{self.address}/authorize",
            "token": f"{self.address}/token",
            "client": CLIENT,
            "redirect": redirect,
            "ca": str(self.ca),
            "address": "127.0.0.1",
        }
        return {"oidc": self.oidc, "login": login}

    def authorize(self, asked: dict[str, str]) -> str:
        """Where the browser is sent with a code."""
        assert (asked["response_type"], asked["client_id"]) == ("code", CLIENT)
        assert asked["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(8)
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def token(self, form: dict[str, str]) -> dict[str, Any] | None:
        """Once, to the holder of the verifier (RFC 7636, 4.6)."""
        asked = self.codes.pop(form["code"], None)
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if (
            asked is None
            or asked["code_challenge"] != challenge
            or asked["redirect_uri"] != form["redirect_uri"]
        ):
            return None
        return {"access_token": self.provider.token(**self.claims), "token_type": "Bearer"}


@contextmanager
def provider_login(folder: Path) -> Iterator[ProviderLogin]:
    """Running within the block."""
    login = ProviderLogin(folder)

    def once(text: str) -> dict[str, str]:
        return {name: value for name, [value] in parse_qs(text).items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("location", login.authorize(once(urlsplit(self.path).query)))
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            form = once(self.rfile.read(int(self.headers["content-length"])).decode())
            answer = login.token(form)
            body = json.dumps(answer or {"error": "invalid_grant"}).encode()
            self.send_response(200 if answer else 400)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(login.certificate, login.certificate.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    login.address = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield login
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
