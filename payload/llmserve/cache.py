"""The exact cache: the answer to a question that was asked before, of the same model, by the same tenant.

Only greedy answers are kept. Redis being slow, full or gone is a miss, never an error.
"""

import hashlib
import json
from dataclasses import asdict

from llmserve.metrics import Metrics
from llmserve.protocol import Done, Generate, Hello
from llmserve.redis_link import RedisAway, RedisLink


def key_material(tenant: str, policy_revision: int, hello: Hello, request: Generate) -> str:
    """Everything that the answer depends on, and whose it is, as canonical JSON."""
    asked = asdict(request)
    del asked["id"], asked["stream"]
    material = {
        "tenant": tenant,
        "policy": policy_revision,
        "model": hello.model,
        "revision": hello.revision,
        "driver": hello.driver,
        **asked,
    }
    return json.dumps(material, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class ExactCache:
    """Answers in Redis under `llm:exact:<sha256 of the key material>`, beside the material itself."""

    def __init__(self, link: RedisLink, ttl_seconds: int, metrics: Metrics) -> None:
        """Nothing is asked yet."""
        self.link = link
        self.ttl = ttl_seconds
        self.metrics = metrics

    async def get(self, material: str) -> Done | None:
        """The kept answer, or None."""
        try:
            value = await self.link.ask(self.link.client.get, self.name(material))
        except RedisAway:
            self.metrics.cache.labels("error").inc()
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
        kept = asdict(done)
        del kept["id"]
        value = json.dumps({"material": material, **kept})
        try:
            await self.link.ask(self.link.client.set, self.name(material), value, ex=self.ttl)
        except RedisAway:
            self.metrics.cache.labels("error").inc()

    def name(self, material: str) -> str:
        """The key in Redis."""
        return "llm:exact:" + hashlib.sha256(material.encode()).hexdigest()
