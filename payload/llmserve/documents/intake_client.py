"""The gateway's client of the unit that takes in documents. The gateway passes bytes on and never looks into a file."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import ValidationError

from llmserve.api.errors import ApiError, unavailable
from llmserve.documents.intake_protocol import BODY_SECONDS, LINE_BYTES, Order, Outcome

log = logging.getLogger("llmserve.documents")
ANSWER_SECONDS = 60.0  # more than the unit takes to say that a file goes on


def away() -> ApiError:
    return unavailable(
        "documents_unavailable", "documents cannot be added, listed or removed now: retry later", 5
    )


class IntakeClient:
    """Opens a connection for each order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def ask(self, order: Order, body: AsyncIterator[bytes] | None = None) -> Outcome:
        """The outcome of the order. `body`: the file to add, read once the unit has room for it. Raises ApiError 503, and what
        `body` raises; the unit then forgets the file.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self.path, limit=LINE_BYTES)
        except OSError as error:
            log.error(
                "the unit for documents is not running", extra={"fields": {"error": type(error).__name__}}
            )
            raise away() from None
        try:
            await self.send(writer, order.model_dump_json().encode() + b"\n")
            outcome = await self.outcome(reader)
            if outcome.status != "go" or body is None:
                return outcome
            return await self.exchanged(reader, writer, body)
        finally:
            writer.transport.abort()

    async def exchanged(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: AsyncIterator[bytes]
    ) -> Outcome:
        """The outcome of a file; it may come before the end of the file if that does not arrive."""

        async def passed_on() -> None:
            async for piece in body:
                await self.send(writer, piece)

        outcome = asyncio.create_task(self.outcome(reader, BODY_SECONDS))
        passing = asyncio.create_task(passed_on())
        try:
            await asyncio.wait({outcome, passing}, return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                await passing
            return await outcome
        finally:
            for task in (outcome, passing):
                task.cancel()
            await asyncio.gather(outcome, passing, return_exceptions=True)

    async def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Raises ApiError 503."""
        try:
            writer.write(data)
            await writer.drain()
        except OSError:
            raise away() from None

    async def outcome(self, reader: asyncio.StreamReader, more_seconds: float = 0.0) -> Outcome:
        """The next outcome; raises ApiError 503."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS + more_seconds):
                return Outcome.model_validate_json(await reader.readuntil(b"\n"))
        except (
            OSError,
            TimeoutError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValidationError,
        ) as error:
            log.error(
                "the unit for documents gave no answer", extra={"fields": {"error": type(error).__name__}}
            )
            raise away() from None
