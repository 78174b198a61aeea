"""The connection to Redis for cache and quotas: with a deadline, and a pause after each failure."""

import asyncio
import logging
import time
from typing import Any, NamedTuple

from llmserve.client_tls import ClientContext
from llmserve.settings import Redis

log = logging.getLogger("llmserve.redis")
REST_SECONDS = (0.25, 0.5, 1.0, 2.0)  # pauses after consecutive failures; the last one repeats
CONNECT_SECONDS = 2.0  # TLS handshake and login; callers wait for them no longer than their deadline
REPORT_SECONDS = 60.0  # between two log lines for the same kind of failure


class RedisUnavailable(Exception):
    """Redis did not answer in time, is pausing after a failure, or rejected the command."""


Command = tuple[str | bytes | int, ...]


class PendingCommands(NamedTuple):
    """Commands of one caller, and the future for their results; `ends` is their deadline in event loop time."""

    commands: tuple[Command, ...]
    answers: asyncio.Future[list[Any]]
    ends: float


class RedisClient:
    """Raises RedisUnavailable when Redis is slow, full or down.

    All callers share one connection: commands that arrive while others wait for their results go out with the next
    write. A connection per caller from redis-py's pool would cost this process five times as much. After a missed
    deadline the client pauses, and calls fail at once; then a single call probes Redis, and the others still fail at
    once until it succeeds. So a slow Redis costs a few deadlines, not one per request.
    """

    def __init__(self, settings: Redis, password: str | None) -> None:
        """Connects on first use."""
        # A gateway without Redis starts a sixth sooner without this import.
        import redis.asyncio as redis_client
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import ResponseError

        self.rejection = ResponseError
        self.host, self.others = settings.host, settings.others
        self.deadline = settings.deadline_ms / 1000
        self.failures = 0
        self.rest_until = 0.0
        self.probing = False
        self.reported: dict[str, float] = {}
        self.waiting: list[PendingCommands] = []
        self.asking: asyncio.Task[None] | None = None
        self.connecting: asyncio.Task[None] | None = None
        pool: Any = redis_client.ConnectionPool.from_url(
            settings.url,
            username=settings.user,
            password=password,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,  # a timer for each write and read, where `execute_all` has one for both
            driver_info=None,
        )
        self.connection: Any = pool.make_connection()  # redis-py types its `connect` not at all
        if settings.tls:  # its own context keeps the first certificate, and knows no revocation lists
            self.connection.ssl_context = ClientContext(settings.tls, settings.url)

    def key(self, name: str, host: str = "") -> str:
        """A key of this host, or of another host that shares this Redis, whose keys may only be read."""
        return f"llm:{host or self.host}:{name}"

    async def execute(self, *commands: Command) -> list[Any]:
        """Results of `commands`; raises RedisUnavailable, also if Redis rejects one of them."""
        if self.failures and (self.probing or time.monotonic() < self.rest_until):
            raise RedisUnavailable
        self.probing = self.failures > 0
        loop = asyncio.get_running_loop()
        pending = PendingCommands(commands, loop.create_future(), loop.time() + self.deadline)
        self.waiting.append(pending)
        if self.asking is None:  # a task of its own, so that a cancelled caller does not affect the others
            self.asking = loop.create_task(self.execute_all())
        return await pending.answers

    async def execute_all(self) -> None:
        """Send everything that is waiting, until nothing is."""
        batch: list[PendingCommands] = []
        try:
            while self.waiting:
                batch, self.waiting = self.waiting, []
                try:
                    async with asyncio.timeout_at(batch[0].ends):
                        await self.exchange(batch)
                    self.failures = 0
                except Exception as error:
                    self.rest(error)
                    self.refuse(batch)
                    if self.connecting is None:
                        await self.connection.disconnect(nowait=True)  # it may hold half a response
                self.probing = False
        finally:
            self.refuse(batch)
            self.asking = None

    def refuse(self, batch: list[PendingCommands]) -> None:
        """Fail the batch's commands that have no result yet, and those that wait behind them."""
        for pending in (*batch, *self.waiting):
            if not pending.answers.done():
                pending.answers.set_exception(RedisUnavailable())
        self.waiting.clear()

    async def exchange(self, batch: list[PendingCommands]) -> None:
        """Send the batch in one write, and read the results; raises RedisError or OSError."""
        connection = self.connection
        # Readable before anything was sent means that Redis has closed the connection.
        if self.connecting is None and connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)
        if self.connecting or not connection.is_connected:
            await self.connect()
        commands = [command for pending in batch for command in pending.commands]
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        for pending in batch:
            answers: list[Any] = []
            refusal = None
            for _ in pending.commands:
                try:
                    answers.append(await connection.read_response())
                # Full, or a read-only replica: keep reading the other results.
                except self.rejection as error:
                    refusal = error
            if refusal:
                self.report(refusal, 0)
            if pending.answers.done():
                continue
            if refusal:
                pending.answers.set_exception(RedisUnavailable())
            else:
                pending.answers.set_result(answers)

    async def connect(self) -> None:
        """Connect and log in. This continues beyond a missed deadline, so that a later call finds the connection ready."""
        if self.connecting is None:
            self.connecting = asyncio.create_task(
                asyncio.wait_for(self.connection.connect(), CONNECT_SECONDS)
            )
        try:
            await asyncio.shield(self.connecting)
        finally:
            if self.connecting.done():
                self.connecting = None

    def rest(self, error: Exception) -> None:
        """Pause after a failure, longer each time."""
        rest = REST_SECONDS[min(self.failures, len(REST_SECONDS) - 1)]
        self.failures += 1
        self.rest_until = time.monotonic() + rest
        self.report(error, rest)

    def report(self, error: Exception, rest: float) -> None:
        """Log each kind of failure at most once per REPORT_SECONDS: a full Redis rejects every write."""
        kind, now = type(error).__name__, time.monotonic()
        if now - self.reported.get(kind, -REPORT_SECONDS) >= REPORT_SECONDS:
            self.reported[kind] = now
            fields: dict[str, Any] = {"error.type": kind, "rest_seconds": rest}
            log.warning("Redis failed: continuing without it", extra={"fields": fields})

    async def close(self) -> None:
        for task in filter(None, (self.asking, self.connecting)):
            task.cancel()
        await self.connection.disconnect()
