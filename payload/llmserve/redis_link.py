"""The one connection to Redis, for the cache and for quotas: with a deadline, and left alone after a failure."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from llmserve.settings import Redis

log = logging.getLogger("llmserve.redis")
REST_SECONDS = 1.0  # after a failure Redis is left alone for so long


class RedisAway(Exception):
    """Redis did not answer in time, or rests after it did not."""


class RedisLink:
    """Redis being slow, full or gone raises RedisAway, at most one deadline later, and at once for a while then."""

    def __init__(self, settings: Redis, password: str | None) -> None:
        """Connects at the first question."""
        self.deadline = settings.deadline_ms / 1000
        self.rest_until = 0.0
        self.client = redis_client.Redis.from_url(
            settings.url,
            username=settings.user,
            password=password,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )

    async def ask[T](self, command: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """What a method of `client` or of a pipeline answers; raises RedisAway."""
        if time.monotonic() < self.rest_until:
            raise RedisAway
        try:
            async with asyncio.timeout(self.deadline):
                return await command(*arguments, **options)
        except (RedisError, OSError, TimeoutError) as error:
            self.rest_until = time.monotonic() + REST_SECONDS
            fields: dict[str, Any] = {"error.type": type(error).__name__, "rest_seconds": REST_SECONDS}
            log.warning("Redis does not answer: going on without it", extra={"fields": fields})
            # Connections that may hold half an answer are dropped.
            await self.client.connection_pool.disconnect(inuse_connections=False)
            raise RedisAway from None

    async def close(self) -> None:
        """Hang up."""
        await self.client.aclose()
