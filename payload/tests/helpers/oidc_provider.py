"""A real identity provider: the npm package oidc-provider in a process of Node.js, with its own form for names and consent."""

import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2 as httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from edge import authority, issue
from service import PATIENCE, eventually

PROGRAM = Path(__file__).resolve().parents[1] / "oidc_provider"
ABSENT = not (shutil.which("node") and (PROGRAM / "node_modules/oidc-provider").is_dir())
CLIENT = "llmkeep-chat"


class OidcProvider:
    """`keys`: private ones by kid, the first of which signs. `groups`: the claim of each account, by its name."""

    def __init__(self, folder: Path) -> None:
        """Start it in a new folder; it answers once `configure` has run."""
        folder.mkdir()
        self.folder, self.jwks_file = folder, folder / "jwks.json"
        self.ca = authority(folder, "ca")
        issue(self.ca, "provider")
        self.keys = {"one": ec.generate_private_key(ec.SECP256R1())}
        self.groups: dict[str, Any] = {}
        self.redirect = "https://localhost/page/signed-in"
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["node", str(PROGRAM / "server.mjs"), str(folder)], stdout=output, stderr=output
            )
        [self.issuer] = eventually("it listens", lambda: self.lines("https:"), 60)

    def lines(self, start: str) -> list[str]:
        """What it has printed that begins so."""
        return [line for line in self.output.read_text().splitlines() if line.startswith(start)]

    @property
    def oidc(self) -> dict[str, Any]:
        """`identity.oidc` of the gateway."""
        claims = {"tenant_claim": "tenant", "groups_claim": "groups"}
        return {"issuer": self.issuer, "audience": "llm", "jwks_file": str(self.jwks_file), **claims}

    def settings(self, redirect: str) -> dict[str, Any]:
        """`oidc` and `login` of web.yaml; the provider then knows this redirect."""
        self.redirect = redirect
        self.configure()
        self.bring_keys()
        login = {
            "authorize": f"{self.issuer}/auth",
            "token": f"{self.issuer}/token",
            "client": CLIENT,
            "redirect": redirect,
            "ca": str(self.ca),
            "address": "127.0.0.1",
        }
        return {"oidc": self.oidc, "login": login}

    def configure(self) -> None:
        """Let it use what is set here now."""
        keys = [
            {**jwt.algorithms.ECAlgorithm.to_jwk(key, as_dict=True), "kid": kid, "use": "sig", "alg": "ES256"}
            for kid, key in self.keys.items()
        ]
        settings = {"client": CLIENT, "redirect": self.redirect, "keys": keys, "groups": self.groups}
        (self.folder / "settings.json").write_text(json.dumps(settings))
        before = len(self.lines("configured"))
        self.process.send_signal(signal.SIGHUP)
        eventually("it is configured", lambda: len(self.lines("configured")) > before)

    def client(self) -> httpx.Client:
        """A browser there."""
        context = ssl.create_default_context(cafile=str(self.ca))
        return httpx.Client(base_url=self.issuer, verify=context, timeout=PATIENCE)

    def bring_keys(self) -> None:
        """Its public keys into the file that gateways read, as an operator does."""
        with self.client() as client:
            address = client.get("/.well-known/openid-configuration").json()["jwks_uri"]
            aside = self.jwks_file.with_suffix(".new")
            aside.write_bytes(client.get(address).content)
            aside.replace(self.jwks_file)

    def sign_in(self, address: str, account: str) -> str:
        """Where a browser is sent that opens `address`, signs in as `account`, and consents."""
        with self.client() as browser:
            answer = browser.get(address)
            for _ in range(12):
                if answer.is_redirect:
                    address = urljoin(str(answer.url), answer.headers["location"])
                    if address.startswith(self.redirect):
                        return address
                    answer = browser.get(address)
                else:
                    [action] = re.findall(r'<form[^>]* action="([^"]+)"', answer.text)
                    [prompt] = re.findall(r'name="prompt" value="(\w+)"', answer.text)
                    form = {"prompt": prompt, "login": account, "password": "any"}
                    answer = browser.post(action, data=form)
        raise AssertionError(f"the provider did not redirect: {answer.text}")


@contextmanager
def oidc_provider(folder: Path) -> Iterator[OidcProvider]:
    """Running within the block."""
    provider = OidcProvider(folder)
    try:
        yield provider
    finally:
        provider.process.kill()
        provider.process.wait()
