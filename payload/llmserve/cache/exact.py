"""The exact cache: the answer to a question that was asked before, of the same model, by the same tenant.

Answers are kept if they are greedy, or if the client asks for it by `cache-control: max-age`. Redis being slow, full or
gone is a miss, never an error.
"""

import hashlib
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

from pydantic_core import from_json, to_json

from llmserve.metrics import Metrics
from llmserve.protocol import FIELDS, Done, FinishReason, Generate, Hello
from llmserve.redis_client import RedisClient, RedisUnavailable

FORMAT = 3  # of what is kept; an older release's entries are other questions
# How a question is asked does not change its answer; the adapter is the model, and stands there.
NOT_ASKED = {"id", "stream", "deadline", "traceparent", "adapter"}
ASKED = [name for name in FIELDS[Generate] if name not in NOT_ASKED]
DIRECTIVE = re.compile(r'\s*([a-z-]+)\s*(?:=\s*"?([^",]*)"?\s*)?')


@dataclass(frozen=True, slots=True)
class CacheWish:
    """What a request's `cache-control` asks for (RFC 9111, 5.2.1): `max_age` in seconds."""

    read: bool = True
    write: bool = True
    max_age: int | None = None


DEFAULT_WISH = CacheWish()


def cache_wish(header: bytes | None) -> CacheWish:
    """The wish in a header; what is not known is ignored, as the RFC says, and no number is 0."""
    if header is None:
        return DEFAULT_WISH
    read = write = True
    max_age = None
    for part in header.decode("latin-1").lower().split(","):
        match = DIRECTIVE.fullmatch(part)
        name, value = match.groups() if match else ("", None)
        if name == "no-store":
            read = write = False
        elif name == "no-cache":
            read = False
        elif name == "max-age":
            max_age = int(value) if value and re.fullmatch("[0-9]{1,10}", value) else 0
    return CacheWish(read and max_age != 0, write, max_age)


def key_material(tenant: str, policy_revision: int, hello: Hello, request: Generate) -> str:
    """Everything that the answer depends on, and whose it is, as JSON whose order is this code's and not the client's."""
    material = {
        "format": FORMAT,
        "tenant": tenant,
        "policy": policy_revision,
        "model": hello.model,
        "revision": hello.revision,
        "template": hello.template,
        "driver": hello.driver,
        "asked": {name: getattr(request, name) for name in ASKED},
    }
    return to_json(material).decode()


class CacheKey(NamedTuple):
    """`name` in Redis, which is a hash of `material`."""

    name: str
    material: str


def cache_key(tenant: str, policy_revision: int, hello: Hello, request: Generate) -> CacheKey:
    """Where the answer to `request` is kept."""
    material = key_material(tenant, policy_revision, hello, request)
    return CacheKey("llm:exact:" + hashlib.sha256(material.encode()).hexdigest(), material)


@dataclass(slots=True)
class Kept:
    """An answer in the pieces in which the engine gave it. `stored` in seconds since the epoch."""

    pieces: list[str]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stored: float

    @property
    def done(self) -> Done:
        """As the engine would have said it at once."""
        tokens = self.prompt_tokens, self.completion_tokens
        return Done(0, "".join(self.pieces), self.finish_reason, *tokens)

    def age(self) -> int:
        """Seconds; 0 where the clock went back meanwhile."""
        return max(0, int(time.time() - self.stored))


class ExactCache:
    """Answers in Redis under `llm:exact:<sha256 of the key material>`, beside the material itself."""

    def __init__(self, redis: RedisClient, ttl_seconds: int, metrics: Metrics) -> None:
        """Nothing is asked yet."""
        self.redis = redis
        self.ttl = ttl_seconds
        self.metrics = metrics

    async def get(self, key: CacheKey, max_age: int | None) -> Kept | None:
        """The kept answer, if it is not older than `max_age` seconds."""
        try:
            [value] = await self.redis.execute(("GET", key.name))
            if value is not None:
                content = from_json(value)
                if content.pop("material") == key.material:
                    kept = Kept(**content)
                    if max_age is None or kept.age() <= max_age:
                        return kept
        except (RedisUnavailable, ValueError, LookupError, TypeError, AttributeError):
            self.metrics.cache_by["error"].inc()
        return None

    async def put(self, key: CacheKey, pieces: list[str], done: Done) -> None:
        """Keep an answer; failing to is no error."""
        content = {
            "material": key.material,
            "pieces": pieces,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "stored": time.time(),
        }
        value = to_json(content)
        try:
            await self.redis.execute(("SET", key.name, value, "EX", self.ttl))
        except RedisUnavailable:
            self.metrics.cache_by["error"].inc()
