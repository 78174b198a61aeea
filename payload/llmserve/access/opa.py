"""The policy engine: OPA behind a UNIX socket, or embedded in this process, on the same signed bundle."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any, Protocol, cast

import httptools
from opa_bindings import OpaEngine, OpaError

from llmcore.files import Stamp, stamp
from llmproof.policy_bundle import PolicyRefused, judged
from llmserve.access.decision import PolicyUnavailable

log = logging.getLogger("llmserve.policy")
PATH = b"/v1/data/llm/authz/decision"
ANSWER_BYTES = 256 * 1024  # a decision is never longer
IDLE_CONNECTIONS = 16


class PolicyEngine(Protocol):
    """Evaluates `data.llm.authz.decision`."""

    async def evaluate(self, query: dict[str, Any]) -> object:
        """The decision document for an input; raises PolicyUnavailable."""

    def close(self) -> None:
        """Release connections or the embedded engine."""


class Connection(asyncio.Protocol):
    """One connection to OPA, with one request at a time; httptools parses the response and calls the on_… methods."""

    transport: asyncio.Transport
    parser: httptools.HttpResponseParser
    answer: asyncio.Future[bytes] | None = None
    reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; raises OSError, EOFError, HttpParserError or PolicyUnavailable, and then closes the
        connection.
        """
        if self.transport.is_closing():
            raise EOFError
        self.body = b""
        self.parser = httptools.HttpResponseParser(self)
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            body = await self.answer
        except BaseException:
            self.transport.abort()
            raise
        return self.parser.get_status_code(), body

    def data_received(self, data: bytes) -> None:
        """Parse the response; data that was not requested closes the connection."""
        if self.answer is None or self.answer.done():
            self.transport.abort()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or EOFError())

    def fail(self, error: Exception) -> None:
        """Fail the pending request, if any."""
        if self.answer and not self.answer.done():
            self.answer.set_exception(error)

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > ANSWER_BYTES:
            self.fail(PolicyUnavailable(f"the policy engine answered with more than {ANSWER_BYTES} bytes"))

    def on_message_complete(self) -> None:
        self.reusable = self.parser.should_keep_alive()  # not available from the parser later
        if self.answer and not self.answer.done():
            self.answer.set_result(self.body)


class OpaServer:
    """OPA's data API. A request fails if it exceeds the deadline, or if a new connection is closed."""

    def __init__(self, path: Path, deadline_ms: int) -> None:
        """Connects on first use."""
        self.path = path
        self.deadline = deadline_ms / 1000
        self.idle: list[Connection] = []

    async def evaluate(self, query: dict[str, Any]) -> object:
        body = json.dumps({"input": query}).encode()
        head = (
            b"POST %b HTTP/1.1\r\nhost: opa\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        try:
            async with asyncio.timeout(self.deadline):
                return await self.exchange(head % (PATH, len(body)) + body)
        except TimeoutError:
            raise PolicyUnavailable(f"no decision within {self.deadline * 1000:.0f} ms") from None
        except (OSError, EOFError, httptools.HttpParserError) as error:
            raise PolicyUnavailable(f"{self.path}: {type(error).__name__}") from None

    async def exchange(self, request: bytes) -> object:
        """Send the request on an idle connection; one that OPA has closed meanwhile is replaced."""
        while self.idle:
            try:
                return await self.ask(self.idle.pop(), request)
            except (OSError, EOFError):
                continue
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(Connection, str(self.path))
        return await self.ask(connection, request)

    async def ask(self, connection: Connection, request: bytes) -> object:
        """Send the request, and return the result; the connection is reused only after a complete response."""
        status, body = await connection.ask(request)
        if connection.reusable and len(self.idle) < IDLE_CONNECTIONS:
            self.idle.append(connection)
        else:
            connection.transport.close()
        if status != 200:
            raise PolicyUnavailable(f"the policy engine returned {status}")
        try:
            return json.loads(body)["result"]
        except (ValueError, KeyError, TypeError):
            raise PolicyUnavailable("the policy engine returned 200 without a result") from None

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.close()
        self.idle.clear()


class OpaEmbedded:
    """OPA as a library, on the signed bundle. If a new bundle is rejected, that is logged and the previous one
    remains active.
    """

    def __init__(self, bundle: Path, public_key: bytes) -> None:
        """`public_key`: the policy's, PEM. The bundle is read on first use."""
        self.bundle = bundle
        self.public_key = public_key
        self.seen: Stamp | None = None
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
        if now is None or now == self.seen:
            return
        self.seen = now
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
