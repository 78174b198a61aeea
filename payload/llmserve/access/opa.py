"""The policy engine: OPA behind a UNIX socket, or embedded in this process, on the same signed bundle."""

import asyncio
import logging
from pathlib import Path
from typing import Any, Protocol

from opa_bindings import OpaEngine, OpaError

from llmcore.files import Stamp, stamp
from llmproof.policy_bundle import PolicyRefused, judged
from llmserve.access.decision import PolicyUnavailable
from llmserve.fast_json import parse, serialize
from llmserve.http_client import BadAnswer, HttpClient, Lost, TooLong

log = logging.getLogger("llmserve.policy")
DECISION = "/v1/data/llm/authz/decision"
ANSWER_BYTES = 256 * 1024  # a decision is never longer


class PolicyEngine(Protocol):
    """Evaluates `data.llm.authz.decision`."""

    async def evaluate(self, query: dict[str, Any]) -> object:
        """The decision document for an input; raises PolicyUnavailable."""

    def close(self) -> None:
        """Release connections or the embedded engine."""


class OpaServer:
    """OPA's data API. A request fails if it exceeds the deadline, or if a new connection is closed."""

    def __init__(self, path: Path, deadline_ms: int) -> None:
        """Connects on first use."""
        self.path = path
        self.deadline = deadline_ms / 1000
        self.http = HttpClient(path, None, None)

    async def evaluate(self, query: dict[str, Any]) -> object:
        try:
            async with (
                asyncio.timeout(self.deadline),
                self.http.request("POST", DECISION, serialize({"input": query})) as response,
            ):
                body = await response.whole(ANSWER_BYTES)
        except TimeoutError:
            raise PolicyUnavailable(f"no decision within {self.deadline * 1000:.0f} ms") from None
        except TooLong:
            message = f"the policy engine answered with more than {ANSWER_BYTES} bytes"
            raise PolicyUnavailable(message) from None
        except (OSError, Lost, BadAnswer) as error:
            raise PolicyUnavailable(f"{self.path}: {type(error.__cause__ or error).__name__}") from None
        if response.status != 200:
            raise PolicyUnavailable(f"the policy engine returned {response.status}")
        try:
            return parse(body)["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PolicyUnavailable("the policy engine returned 200 without a result") from None

    def close(self) -> None:
        self.http.close()


class OpaEmbedded:
    """OPA as a library, on the signed bundle. If a new bundle is rejected, that is logged and the previous one
    remains active.
    """

    def __init__(self, bundle: Path, public_key: bytes) -> None:
        """`public_key`: the policy's, PEM. The bundle is read on first use."""
        self.bundle = bundle
        self.public_key = public_key
        self.file_stamp: Stamp | None = None
        self.revision = 0
        self.opa: OpaEngine | None = None
        self.trouble = f"{bundle} does not exist"

    async def evaluate(self, query: dict[str, Any]) -> object:
        self.reload()
        if self.opa is None:
            raise PolicyUnavailable(self.trouble)
        try:
            return self.opa.eval_document("llm.authz.decision", query)
        except OpaError as error:
            raise PolicyUnavailable(f"the embedded engine failed: {error.code}") from None

    def reload(self) -> None:
        """Load the bundle if it has changed."""
        now = stamp(self.bundle)
        if now is None or now == self.file_stamp:
            return
        self.file_stamp = now
        try:
            bundle = judged(self.bundle.read_bytes(), self.public_key, self.revision)
            opa = OpaEngine()
            for name, source in bundle.modules.items():
                opa.add_policy(name, source)
            opa.add_data(bundle.data)
        except (PolicyRefused, OpaError, OSError) as error:
            self.trouble = str(error)
            fields = {"reason": str(error), "active_revision": self.revision}
            log.error("a policy bundle was rejected", extra={"fields": fields})
            return
        self.close()
        self.opa, self.revision = opa, bundle.revision
        log.info("policy bundle", extra={"fields": {"revision": bundle.revision}})

    def close(self) -> None:
        if self.opa is not None:
            self.opa.close()
