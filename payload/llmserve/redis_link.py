"""The one connection to Redis, for the cache and for quotas: with a deadline, and left alone after a failure."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from llmserve.settings import Redis

log = logging.getLogger("llmserve.redis")
REST_SECONDS = (
    0.25,
    0.5,
    1.0,
    2.0,
)  # after failures in a row Redis is left alone for so long; the last one repeats

TELL_SECONDS = 60.0


class RedisAway(Exception):
    """Redis did not answer in time, rests after it did not, or refused the command."""


class RedisLink:
    """Redis being slow, full or gone raises RedisAway.

    After a deadline it rests, and who asks meanwhile is told at once; then one question goes first, and the others still
    are told at once until it is answered. So a Redis that is slow costs a few deadlines, not one a request.
    """

    def __init__(self, settings: Redis, password: str | None) -> None:
        """Connects at the first question."""
        self.deadline = settings.deadline_ms / 1000
        self.failures = 0
        self.rest_until = 0.0
        self.probing = False
        self.told: dict[str, float] = {}
        self.client = redis_client.Redis.from_url(
            settings.url,
            username=settings.user,
            password=password,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )

    async def ask[T](self, command: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """What a method of `client` or of a pipeline answers; raises RedisAway."""
        if self.failures and (self.probing or time.monotonic() < self.rest_until):
            raise RedisAway
        probe = self.probing = self.failures > 0
        try:
            async with asyncio.timeout(self.deadline):
                answer = await command(*arguments, **options)
        except (
            ResponseError
        ) as error:  # full, or a replica that takes no writes: it is there, and reading goes on
            self.complain(error, 0)
            self.failures = 0
            raise RedisAway from None
        except (RedisError, OSError, TimeoutError) as error:
            rest = REST_SECONDS[min(self.failures, len(REST_SECONDS) - 1)]
            self.failures += 1
            self.rest_until = time.monotonic() + rest
            self.complain(error, rest)
            # Connections that may hold half an answer are dropped.
            await self.client.connection_pool.disconnect(inuse_connections=False)
            raise RedisAway from None
        finally:
            if probe:
                self.probing = False
        self.failures = 0
        return answer

    def complain(self, error: Exception, rest: float) -> None:
        """Once a minute for each kind of trouble: a Redis that is full refuses every write."""
        kind, now = type(error).__name__, time.monotonic()
        if now - self.told.get(kind, -TELL_SECONDS) >= TELL_SECONDS:
            self.told[kind] = now
            fields: dict[str, Any] = {"error.type": kind, "rest_seconds": rest}
            log.warning("Redis does not do as asked: going on without it", extra={"fields": fields})

    async def close(self) -> None:
        """Hang up."""
        await self.client.aclose()
