"""`llm-serve` with some layers bypassed, to measure their cost. The product has no such switch.

First argument: the layers' names, with commas between; the others are llm-serve's own.
"""

import sys
from typing import Any

from llmserve.access.decision import Decision, Rate
from llmserve.access.identity import Authenticator, Headers, Identity
from llmserve.access.policy import Policy
from llmserve.access.quotas import Account, Quotas, Reservation
from llmserve.asgi import Exchange
from llmserve.audit.recorder import Recorder
from llmserve.cli import main

ANYBODY = Identity("api_key", "bench", "bench", "bench", ("developer",))
RATE = Rate("bench", 10**6, 10**9, 10**12)  # as signed_policy: all gateways of one run count in one Redis
ALLOWED = Decision(True, "a benchmark", "bench", 1, None, 2048, RATE)
NOTHING = Reservation(Account("bench"), RATE, (), 0)  # type: ignore[arg-type]


def identify(authenticator: Authenticator, headers: Headers) -> Identity:
    """Anybody."""
    return ANYBODY


def ended(authenticator: Authenticator, identity: Identity) -> None:
    """Never."""


async def decide(policy: Policy, identity: Identity, action: str) -> Decision:
    """Yes."""
    return ALLOWED


async def request(quotas: Quotas, tenant: str, subject: str, decision: Decision) -> None:
    """Not counted."""


async def reserve(
    quotas: Quotas,
    tenant: str,
    subject: str,
    decision: Decision,
    prompt: int,
    longest: int = 0,
    answers: int = 1,
) -> Reservation:
    """Not set aside."""
    return NOTHING


async def intent(
    recorder: Recorder, exchange: Exchange, model: str | None = None, content: object = None, proof: str = ""
) -> None:
    """Not recorded."""


def close(recorder: Recorder, exchange: Exchange, nanoseconds: int) -> None:
    """Not recorded."""


LAYERS: dict[str, list[tuple[type, Any]]] = {
    "authentication": [(Authenticator, identify), (Authenticator, ended)],
    "policy": [(Policy, decide)],
    "quotas": [(Quotas, request), (Quotas, reserve)],
    "audit": [(Recorder, intent), (Recorder, close)],
}
for layer in sys.argv[1].split(","):
    for owner, replacement in LAYERS[layer]:
        if replacement.__name__ not in vars(owner):
            raise SystemExit(f"{owner.__name__} has no {replacement.__name__} any more: mend this benchmark")
        setattr(owner, replacement.__name__, replacement)
sys.exit(main(sys.argv[2:]))
