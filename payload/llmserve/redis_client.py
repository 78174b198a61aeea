"""The one connection to Redis, for the cache and for quotas: with a deadline, and left alone after a failure."""

import asyncio
import logging
import time
from typing import Any, NamedTuple

import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from llmserve.settings import Redis

log = logging.getLogger("llmserve.redis")
REST_SECONDS = (
    0.25,
    0.5,
    1.0,
    2.0,
)  # after failures in a row Redis is left alone for so long; the last one repeats

REPORT_SECONDS = 60.0


class RedisUnavailable(Exception):
    """Redis did not answer in time, rests after it did not, or refused the command."""


Command = tuple[str | bytes | int, ...]


class PendingCommands(NamedTuple):
    """Commands of one who asks; `answers` is done by the time of the event loop that `ends` says."""

    commands: tuple[Command, ...]
    answers: asyncio.Future[list[Any]]
    ends: float


class RedisClient:
    """Redis being slow, full or gone raises RedisAway.

    All questions share one connection: who asks while others wait for their answers goes with the next write. A connection
    of redis-py's pool for each would cost this process five times as much.
    After a deadline it rests, and who asks meanwhile is told at once; then one question goes first, and the others still
    are told at once until it is answered. So a Redis that is slow costs a few deadlines, not one a request.
    """

    def __init__(self, settings: Redis, password: str | None) -> None:
        """Connects at the first question."""
        self.deadline = settings.deadline_ms / 1000
        self.failures = 0
        self.rest_until = 0.0
        self.probing = False
        self.reported: dict[str, float] = {}
        self.waiting: list[PendingCommands] = []
        self.asking: asyncio.Task[None] | None = None
        pool: Any = redis_client.ConnectionPool.from_url(
            settings.url,
            username=settings.user,
            password=password,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )
        self.connection: redis_client.Connection = pool.make_connection()

    async def execute(self, *commands: Command) -> list[Any]:
        """What Redis answers to each of `commands`; raises RedisAway, also where it refuses one of them."""
        if self.failures and (self.probing or time.monotonic() < self.rest_until):
            raise RedisUnavailable
        self.probing = self.failures > 0
        loop = asyncio.get_running_loop()
        pending = PendingCommands(commands, loop.create_future(), loop.time() + self.deadline)
        self.waiting.append(pending)
        if self.asking is None:  # a task of its own: whoever asks may leave, without harm to the others
            self.asking = loop.create_task(self.execute_all())
        return await pending.answers

    async def execute_all(self) -> None:
        """Until nobody waits any more: ask what all who wait want to know, and tell them."""
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
                    await self.connection.disconnect(nowait=True)  # it may hold half an answer
                self.probing = False
        finally:
            self.refuse(batch)
            self.asking = None

    def refuse(self, batch: list[PendingCommands]) -> None:
        """Tell those who have no answer yet, and those who wait behind them."""
        for pending in (*batch, *self.waiting):
            if not pending.answers.done():
                pending.answers.set_exception(RedisUnavailable())
        self.waiting.clear()

    async def exchange(self, batch: list[PendingCommands]) -> None:
        """One write, and each its answers; raises RedisError or OSError."""
        connection = self.connection
        # What can be read before anything is asked is the end: Redis has hung up meanwhile.
        if connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)
        commands = [command for pending in batch for command in pending.commands]
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        for pending in batch:
            answers: list[Any] = []
            refusal = None
            for _ in pending.commands:
                try:
                    answers.append(await connection.read_response())
                except ResponseError as error:  # full, or a replica that takes no writes: reading goes on
                    refusal = error
            if refusal:
                self.report(refusal, 0)
            if pending.answers.done():
                continue
            if refusal:
                pending.answers.set_exception(RedisUnavailable())
            else:
                pending.answers.set_result(answers)

    def rest(self, error: Exception) -> None:
        """Leave it alone for a while, for longer each time."""
        rest = REST_SECONDS[min(self.failures, len(REST_SECONDS) - 1)]
        self.failures += 1
        self.rest_until = time.monotonic() + rest
        self.report(error, rest)

    def report(self, error: Exception, rest: float) -> None:
        """Once a minute for each kind of trouble: a Redis that is full refuses every write."""
        kind, now = type(error).__name__, time.monotonic()
        if now - self.reported.get(kind, -REPORT_SECONDS) >= REPORT_SECONDS:
            self.reported[kind] = now
            fields: dict[str, Any] = {"error.type": kind, "rest_seconds": rest}
            log.warning("Redis does not do as asked: going on without it", extra={"fields": fields})

    async def close(self) -> None:
        """Hang up."""
        if self.asking:
            self.asking.cancel()
        await self.connection.disconnect()
