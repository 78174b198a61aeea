"""The exact cache: answers to identical requests by the same tenant for the same model.

Greedy answers are cached, and sampled ones if the client permits it by `cache-control: max-age`. If Redis is slow, full or down,
that is a miss, never an error.
"""

import hmac
import re
import time
from dataclasses import dataclass

from pydantic_core import from_json, to_json

from llmserve.metrics import Metrics
from llmserve.protocol import FIELDS, Done, FinishReason, Generate, Hello
from llmserve.redis_client import RedisClient, RedisUnavailable

FORMAT = 5  # version of the entries; those of older releases never match
# These do not change the answer; the adapter is part of the model, which is in the key material.
NOT_IN_KEY = {"id", "stream", "deadline", "traceparent", "adapter", "length_field"}
TAG_BYTES = 32
IN_KEY = [name for name in FIELDS[Generate] if name not in NOT_IN_KEY]
DIRECTIVE = re.compile(r'\s*([a-z-]+)\s*(?:=\s*"?([^",]*)"?\s*)?')


@dataclass(frozen=True, slots=True)
class CacheWish:
    """The request's `cache-control` directives (RFC 9111, 5.2.1); `max_age` in seconds."""

    read: bool = True
    write: bool = True
    max_age: int | None = None


DEFAULT_WISH = CacheWish()


def cache_wish(header: bytes | None) -> CacheWish:
    """Parse the header; unknown directives are ignored, as the RFC requires, and a malformed max-age counts as 0."""
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
    """Everything that the answer depends on, and its tenant, as JSON in an order that the client cannot influence."""
    material = {
        "format": FORMAT,
        "tenant": tenant,
        "policy": policy_revision,
        "model": hello.model,
        "revision": hello.revision,
        "template": hello.template,
        "driver": hello.driver,
        "asked": {name: getattr(request, name) for name in IN_KEY},
    }
    return to_json(material).decode()


def cache_key(secret: bytes, tenant: str, policy_revision: int, hello: Hello, request: Generate) -> str:
    """The cache key of the answer to `request`. Without `secret`, a guessed prompt cannot be compared with it."""
    material = key_material(tenant, policy_revision, hello, request)
    return "exact:" + hmac.digest(secret, material.encode(), "sha256").hex()


@dataclass(slots=True)
class Kept:
    """A cached answer in the pieces that the engine produced. `stored`: seconds since the epoch."""

    pieces: list[str]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stored: float

    @property
    def frame(self) -> Done:
        """The frame of an answer that is not streamed."""
        tokens = self.prompt_tokens, self.completion_tokens
        return Done(0, "".join(self.pieces), self.finish_reason, *tokens)

    def age(self) -> int:
        """Age in seconds; 0 if the clock was set back meanwhile."""
        return max(0, int(time.time() - self.stored))


class ExactCache:
    """Answers of this host's gateways in Redis, under `exact:<HMAC of the key material>`, without the prompt. An HMAC over name
    and answer precedes it: neither Redis nor another host that shares it can forge an answer.
    """

    def __init__(self, redis: RedisClient, ttl_seconds: int, secret: bytes, metrics: Metrics) -> None:
        self.redis = redis
        self.ttl = ttl_seconds
        self.secret = secret
        self.metrics = metrics

    def tag(self, key: str, content: bytes) -> bytes:
        return hmac.digest(self.secret, b"%b %b" % (key.encode(), content), "sha256")

    async def get(self, key: str, max_age: int | None) -> Kept | None:
        """The cached answer, if it is at most `max_age` seconds old; failures are counted as errors and treated as a
        miss.
        """
        try:
            [value] = await self.redis.execute(("GET", self.redis.key(key)))
            if value is not None:
                tag, content = value[:TAG_BYTES], value[TAG_BYTES:]
                if not hmac.compare_digest(tag, self.tag(key, content)):
                    raise ValueError("this host did not store it")
                entry = Kept(**from_json(content))
                if max_age is None or entry.age() <= max_age:
                    return entry
        except (RedisUnavailable, ValueError, LookupError, TypeError, AttributeError):
            self.metrics.cache_by["error"].inc()
        return None

    async def put(self, key: str, pieces: list[str], frame: Done) -> None:
        """Cache an answer; a failure is only counted."""
        content = {
            "pieces": pieces,
            "finish_reason": frame.finish_reason,
            "prompt_tokens": frame.prompt_tokens,
            "completion_tokens": frame.completion_tokens,
            "stored": time.time(),
        }
        value = to_json(content)
        try:
            await self.redis.execute(
                ("SET", self.redis.key(key), self.tag(key, value) + value, "EX", self.ttl)
            )
        except RedisUnavailable:
            self.metrics.cache_by["error"].inc()
