"""The exact cache: the answer to a question that was asked before, of the same model, by the same tenant.

Only greedy answers are kept. Redis being slow, full or gone is a miss, never an error.
"""

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import asdict

import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from llmserve.metrics import Metrics
from llmserve.protocol import Done, Generate, Hello
from llmserve.settings import Redis

log = logging.getLogger("llmserve.cache")
REST_SECONDS = 1.0  # after a failure Redis is left alone for so long


def key_material(tenant: str, hello: Hello, request: Generate) -> str:
    """Everything that the answer depends on, as canonical JSON."""
    asked = asdict(request)
    del asked["id"], asked["stream"]
    material = {
        "tenant": tenant,
        "model": hello.model,
        "revision": hello.revision,
        "driver": hello.driver,
        **asked,
    }
    return json.dumps(material, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class ExactCache:
    """Answers in Redis under `llm:exact:<sha256 of the key material>`, beside the material itself."""

    def __init__(self, settings: Redis, password: str | None, metrics: Metrics) -> None:
        """Connects at the first question."""
        self.deadline = settings.deadline_ms / 1000
        self.ttl = settings.ttl_seconds
        self.metrics = metrics
        self.rest_until = 0.0
        self.client = redis_client.Redis.from_url(
            settings.url,
            username=settings.user,
            password=password,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )

    async def get(self, material: str) -> Done | None:
        """The kept answer, or None."""
        if time.monotonic() < self.rest_until:
            self.metrics.cache.labels("error").inc()
            return None
        try:
            async with asyncio.timeout(self.deadline):
                value = await self.client.get(self.name(material))
        except (RedisError, OSError, TimeoutError) as error:
            await self.rest(error)
            return None
        if value is not None:
            kept = json.loads(value)
            if kept.pop("material") == material:
                self.metrics.cache.labels("hit").inc()
                return Done(id=0, **kept)
        self.metrics.cache.labels("miss").inc()
        return None

    async def put(self, material: str, done: Done) -> None:
        """Keep an answer; failing to is no error."""
        if time.monotonic() < self.rest_until:
            return
        kept = asdict(done)
        del kept["id"]
        value = json.dumps({"material": material, **kept})
        try:
            async with asyncio.timeout(self.deadline):
                await self.client.set(self.name(material), value, ex=self.ttl)
        except (RedisError, OSError, TimeoutError) as error:
            await self.rest(error)

    async def rest(self, error: Exception) -> None:
        """Leave Redis alone for a while, and drop connections that may hold half an answer."""
        self.metrics.cache.labels("error").inc()
        self.rest_until = time.monotonic() + REST_SECONDS
        fields = {"error.type": type(error).__name__, "rest_seconds": REST_SECONDS}
        log.warning("Redis does not answer: asking the model instead", extra={"fields": fields})
        await self.client.connection_pool.disconnect(inuse_connections=False)

    def name(self, material: str) -> str:
        """The key in Redis."""
        return "llm:exact:" + hashlib.sha256(material.encode()).hexdigest()

    async def close(self) -> None:
        """Hang up."""
        await self.client.aclose()
