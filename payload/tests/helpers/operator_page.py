"""`llm-web` as an estate runs it: a real audit writer and policy, and before it nginx with the configuration of role edge."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import yaml
from authority import PUBLIC_KEY
from edge import Edge, in_front_of
from service import PEPPER, Process, Service, patched
from watched_estate import OBJECTIVES, WatchedEstate

from llmcore.ratings import ANSWERED, FIELD, RATED
from llmserve.access.api_keys import edited, new_key
from llmserve.feedback.journal import append

BROWSER = {"sec-fetch-site": "same-origin"}
OTHER_SITE = {"sec-fetch-site": "cross-site"}
# Of the policy: whose answers experts of `operations` review, and what product owners see.
TENANTS: dict[str, dict[str, object]] = {
    "research": {"keep_prompts": True, "reviewed_by": ["operations"]},
    "secret": {"keep_prompts": True, "reviewed_by": ["secret"]},
    "silent": {"keep_prompts": True},
}
EXPERIMENTS: dict[str, dict[str, object]] = {
    "support-12": {
        "model": "support",
        "control": "deepseek-chat",
        "candidate": "embed-small",
        "unit": "subject",
        "tenants": ["research"],
        "percent": 5,
        "salt": "0123456789abcdef",
        "shadow": 0,
        "guardrails": {"refusals": []},
    }
}
KEPT_SECONDS = 2.0  # of answers, so that a test need not wait for ten


@dataclass
class OperatorPage:
    """A running page. `gateway`: the service whose keys, policy and audit writer it has, behind the same edge."""

    gateway: Service
    edge: Edge
    monitors: int  # port of nginx before Prometheus and Alertmanager
    config: Path
    process: Process

    def key(self, role: str = "operator", subject: str = "olga") -> tuple[str, str]:
        """A new key, and its id."""
        with edited(self.gateway.folder / "keys.json") as records:
            key, record = new_key(PEPPER, subject, "operations", [role], None)
            records.append(record)
        return key, record.id

    def client(self, certificate: Path | None = None, **headers: str) -> httpx.Client:
        return self.edge.client(certificate, **headers)

    @contextmanager
    def signed_in(self, key: str = "") -> Iterator[httpx.Client]:
        """A client with a session."""
        with self.client() as client:
            answer = client.post("/operator/sign-in", data={"key": key or self.key()[0]}, headers=BROWSER)
            assert answer.status_code == 303, answer.text
            yield client

    @property
    def journal(self) -> Path:
        return self.gateway.folder / "feedback"

    def rated(self, number: int, tenant: str = "research", text: str = "", **said: object) -> str:
        """Put a rated answer into the journal, by default a bad one; its transaction."""
        transaction = f"{number:016x}"
        who = {"transaction.id": transaction, "user.id": "ada", "organization.id": tenant}
        head = {"@timestamp": f"2026-11-27T08:00:{number % 60:02d}.000+00:00"} | who
        answer = {
            "event.action": "POST /v1/chat/completions",
            "llm.model": "deepseek-chat",
            FIELD + "prompt": [{"role": "user", "content": f"question {number} {text}"}],
            FIELD + "answer": f"answer {number} {text}",
        }
        rating = {FIELD + name: value for name, value in (said or {"thumb": "down"}).items()}
        append(self.journal, [(RATED, head | rating), (ANSWERED, head | answer)])
        return transaction

    def records(self) -> list[dict[str, Any]]:
        """The audit record's events of the page."""
        return [
            event for event in self.gateway.records() if "/operator/" in str(event.get("event.action", ""))
        ]


def start(service: Service, config: Path) -> Process:
    environment = {
        "CREDENTIALS_DIRECTORY": str(service.folder / "credentials"),
        **patched(
            service.folder,
            llmweb__monitors__KEPT_SECONDS=KEPT_SECONDS,
            llmweb__experiments__COUNTED_SECONDS=0.0,
        ),
    }
    arguments = ["serve", "--config", str(config)]
    return Process(service.folder, "web", arguments, environment, module="llmweb").await_ready()


def configured(service: Service, **changes: Any) -> tuple[Path, Path]:
    """web.yaml beside the gateway `service`, with `changes`, and the socket in it."""
    socket = service.folder / "web.sock"
    (service.folder / "policy.pem").write_bytes(PUBLIC_KEY)
    policy = {
        **service.embedded(),
        "key": str(service.folder / "policy.pem"),
        "seen": str(service.folder / "web-revision"),
    }
    content: dict[str, Any] = {
        "listen": {"socket": str(socket)},
        "keys_file": str(service.folder / "keys.json"),
        "policy": policy,
        "audit": {"socket": str(service.folder / "audit.sock")},
        "certificate_header": "X-Client-Certificate",
        **changes,
    }
    config = service.folder / "web.yaml"
    config.write_text(yaml.safe_dump(content))
    return config, socket


@contextmanager
def serving(service: Service, estate: WatchedEstate, **changes: Any) -> Iterator[OperatorPage]:
    """The page beside the gateway `service`, which watches `estate` as from another host. `changes`: of its configuration."""
    with estate.shown() as port:
        asked = f"https://localhost:{port}"
        monitors = [{name: f"{asked}/{name}" for name in ("prometheus", "alertmanager")}]
        with serving_before(service, estate, port, {"monitors": monitors, **changes}) as page:
            yield page


@contextmanager
def serving_before(
    service: Service, estate: WatchedEstate, port: int, changes: dict[str, Any]
) -> Iterator[OperatorPage]:
    page = {"tls": estate.tls, "objectives": OBJECTIVES, **changes}
    config, socket = configured(service, **page)
    process = start(service, config)
    try:
        variables = {"__edge_operator_socket": str(socket)}
        with in_front_of(service.folder / "http.sock", service.folder / "nginx", **variables) as edge:
            yield OperatorPage(service, edge, port, config, process)
    finally:
        process.stop()
