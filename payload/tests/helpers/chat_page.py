"""The chat page as an estate runs it: gateway, audit writer and policy are real, and nginx has the configuration of role edge."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from edge import Edge, in_front_of, issue
from oidc_provider import OidcProvider
from operator_page import BROWSER, configured, start
from provider_login import ProviderLogin
from service import PEPPER, Process, Service, running

from llmserve.access.api_keys import edited, new_key

# The second one says a word in a second.
MODELS: dict[str, dict[str, Any]] = {
    "echo": {"driver": "echo"},
    "slow": {"driver": "echo", "token_seconds": 1.0},
}


@dataclass
class ChatPage:
    """A running page. `gateway`: the service that it asks."""

    gateway: Service
    edge: Edge
    config: Path
    process: Process

    def key(self, role: str = "developer", subject: str = "ada", tenant: str = "research") -> tuple[str, str]:
        """A new key, and its id."""
        with edited(self.gateway.folder / "keys.json") as records:
            key, record = new_key(PEPPER, subject, tenant, [role], None)
            records.append(record)
        return key, record.id

    def certificate(self, subject: str) -> Path:
        """A new client certificate, registered for a developer of the tenant research."""
        certificate = issue(self.edge.clients, subject)
        self.gateway.add_key(subject, "research", "--certificate", str(certificate))
        return certificate

    @contextmanager
    def signed_in(self, key: str = "", **who: str) -> Iterator[httpx.Client]:
        """A client with a session, that sends what the page's script does."""
        with self.edge.client(None, **BROWSER) as client:
            answer = client.post("/page/sign-in", data={"key": key or self.key(**who)[0]})
            assert answer.status_code == 303, answer.text
            client.headers["x-csrf-token"] = token(client)
            yield client


def token(client: httpx.Client) -> str:
    """The token in the page of this client's session."""
    [found] = re.findall(r'data-token="([0-9a-f]{64})"', client.get("/").text)
    return str(found)


@contextmanager
def served(
    folder: Path,
    models: dict[str, dict[str, Any]] | None = None,
    login: "ProviderLogin | OidcProvider | None" = None,
    page: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[ChatPage]:
    """The page, and the gateway and engines behind it; `page` is more of web.yaml, `options` are the service's."""
    kept = folder / "feedback"
    kept.mkdir()
    identity: dict[str, Any] = {"certificate_header": "X-Client-Certificate"}
    options = {
        "feedback": {"folder": str(kept), "hold": str(folder / "hold")},
        "identity": identity | ({"oidc": login.oidc} if login else {}),
        "tenants": {"research": {"keep_prompts": True}},
        **options,
    }
    variables: dict[str, Any] = {"__edge_operator_socket": str(folder / "web.sock"), "__edge_chat_page": True}
    variables["__edge_uploads"] = "documents" in options
    with (
        running(folder, models or MODELS, **options) as service,
        in_front_of(folder / "http.sock", folder / "nginx", **variables) as edge,
    ):
        more = login.settings(f"https://localhost:{edge.port}/page/signed-in") if login else {}
        more |= page or {}
        gateways = [str(folder / "gone.sock"), str(folder / "http.sock")]
        config, _ = configured(service, gateways=gateways, **more)
        process = start(service, config)
        try:
            yield ChatPage(service, edge, config, process)
        finally:
            process.stop()


def ask(opened: Any, question: str, model: str = "echo") -> Any:
    """Ask in a tab; the answer, once it is whole."""
    before = opened.locator("article.answer").count()
    opened.locator("#model").select_option(model)
    opened.locator("#question").fill(question)
    opened.keyboard.press("Enter")
    answer = opened.locator("article.answer").nth(before)
    opened.locator("#send:enabled").wait_for()
    return answer
