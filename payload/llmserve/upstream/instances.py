"""The instances of one model: a request goes to the one that has its prefix cached, unless the first token is expected much
sooner elsewhere.

The cost of an instance is the work before that token, in characters of prompts: the part of this prompt that it has to compute,
the parts of other prompts that wait for their first token, and REQUEST_CHARACTERS for each of its requests. If an instance takes
longer than the others for the same work, its cost is multiplied by that factor. A prefix that is cached elsewhere counts
CACHE_WEIGHT times: computing it again delays all requests after it, too. The instance of the lowest cost is chosen, among those
that have a free slot or a load within LOAD_BOUND of the average (as in consistent hashing with bounded loads, Mirrokni et al.,
2016).

Each gateway remembers where it has sent conversations and their system messages (`Prefixes`). For others rendezvous hashing
names a home, by the system messages where they are longer than the first question, else by the conversation. Another instance
costs HOME_WEIGHT times the prompt more, since other gateways expect the conversation at its home. So gateways agree without
exchanging anything, and adding or removing an instance moves only the conversations that it gains or loses.

While no instance is available but one is expected back, requests wait for it. The weights were tuned on the traffic
of bench/routing.py alone.
"""

import asyncio
import hashlib
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.http_client import HttpClient
from llmserve.metrics import EngineState
from llmserve.protocol import Delta, Done, Failed, Generate, Hello
from llmserve.settings import ClientTls, Engine, Remote
from llmserve.upstream.admission import Admission, Place, Queue
from llmserve.upstream.engine_client import Answer, EngineClient
from llmserve.upstream.offered import OfferedAddress
from llmserve.upstream.openai_client import OpenAiClient

LOAD_BOUND = 1.25
REQUEST_CHARACTERS = 1000  # work of an answer's tokens, and of what other gateways have sent
CACHE_WEIGHT = 5
HOME_WEIGHT = 2
PREFIXES = 8192  # remembered for each model: up to two of a conversation
PACE_SHARE = 0.1  # of the latest request in an instance's pace
PACE_REQUESTS = 2  # before a pace means something
LEAST_PACE = (
    2e-5  # seconds a character: 20 ms of a short request, below which it does not matter who is faster
)
PACE_SECONDS = 10.0  # in which a pace halves without requests: what was slow is tried again
SLOW = 2.0  # times the usual pace; less is chance
# Of a plain prompt; a conversation is identified by all messages up to the first one by the user.
LEADING_CHARACTERS = 1024
GONE = {"engine_lost", "engine_unavailable"}


class Instances:
    """All instances of a model. `hello` is that of the first available one."""

    def __init__(self, model: str, engines: list[EngineClient], room: Queue) -> None:
        """`engines`: in the order of the configuration, which matters only where a request identifies no
        conversation.

        `room`: capacity of the queue for an engine to come back, the same as that for a slot of an available one.
        """
        self.model = model
        self.room = room
        self.engines = engines
        self.prefixes = Prefixes()
        self.pending = dict.fromkeys(engines, 0)  # characters to compute before first tokens
        self.paces = {engine: Pace() for engine in engines}
        self.away = Admission(room)  # has no slots: requests wait here until an engine is back
        for engine in engines:
            engine.on_return = partial(self.returned, engine)

    def returned(self, engine: EngineClient) -> None:
        """An engine has come back with an empty cache: requests that wait for one continue."""
        self.prefixes.forget(engine)
        self.away.call_in()

    @property
    def hello(self) -> Hello | None:
        """The Hello of the first available instance, or None."""
        return next((engine.hello for engine in self.engines if engine.hello), None)

    @property
    def up(self) -> int:
        """Number of available instances."""
        return sum(engine.up for engine in self.engines)

    @property
    def sick(self) -> bool:
        """Whether it is available on quarantined GPUs only."""
        available = [engine for engine in self.engines if engine.up]
        return bool(available) and all(engine.quarantined for engine in available)

    def state(self) -> EngineState:
        """State for a scrape: sums over all instances, the fullest KV cache, and the GPUs of the first instance that
        has any.
        """
        states = [engine.state() for engine in self.engines]
        return EngineState(
            self.model,
            self.up,
            any(state.stalled for state in states),
            sum(state.running for state in states),
            sum(state.running_tokens for state in states),
            self.away.waiting.total.requests + sum(state.waiting for state in states),
            self.away.waiting.total.tokens + sum(state.waiting_tokens for state in states),
            max((state.kv_used for state in states if state.kv_used is not None), default=None),
            next((state.gpu_used for state in states if state.gpu_used), []),
            sum(state.quarantined for state in states),
        )

    def route(self, tenant: str, request: Generate) -> "RoutedRequest":
        """Choose the instances for this request; raises ApiError 503 if none is available or expected back."""
        if len(self.engines) == 1:
            return RoutedRequest(self, self.engines)
        prefix = Prefix.of_request(tenant, request)
        return RoutedRequest(self, self.order(prefix.home), prefix)

    def cheapest(self, prefix: "Prefix", there: list[EngineClient]) -> tuple[EngineClient, int]:
        """The instance of the lowest cost among `there`, which are in order of preference, and the characters that it has to
        compute.
        """
        bound = math.ceil(LOAD_BOUND * (sum(engine.load for engine in there) + 1) / len(there))
        slowness = self.slowness(there)
        home = next((engine for engine in there if slowness[engine] == 1), there[0])
        remembered = prefix.conversation in self.prefixes.lengths
        missing = {engine: self.prefixes.missing(prefix, engine, home) for engine in there}

        def cost(engine: EngineClient) -> float:
            work = self.pending[engine] + REQUEST_CHARACTERS * (engine.load + 1) + missing[engine]
            again = (CACHE_WEIGHT - 1) * missing[engine]
            away = 0 if remembered or engine is home else HOME_WEIGHT * prefix.length
            return work * slowness[engine] + again + away

        best = min((each for each in there if each.load < max(bound, each.admission.slots)), key=cost)
        return best, missing[best]

    def slowness(self, there: list[EngineClient]) -> dict[EngineClient, float]:
        """The factor by which an instance is slower than the median of `there`: at least SLOW, or 1."""
        now = time.monotonic()
        paces = {engine: self.paces[engine].at(now) for engine in there}
        usual = statistics.median_low([max(pace, LEAST_PACE) for pace in paces.values() if pace] or [1.0])
        return {engine: pace / usual if pace > SLOW * usual else 1.0 for engine, pace in paces.items()}

    async def until_found(self, place: Place) -> None:
        """Wait until an engine is available again; raises ApiError 429 or 503."""
        await self.away.enter(place)
        self.away.leave(place)

    def order(self, key: bytes) -> list[EngineClient]:
        """All instances, ordered by preference for the conversation `key`; quarantined ones are the last."""

        def preference(engine: EngineClient) -> tuple[bool, bytes]:
            return engine.quarantined, hashlib.sha256(key + engine.identity.encode()).digest()

        return sorted(self.engines, key=preference)


class Pace:
    """How long an instance takes to the first token for the expected work: the average of recent requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.seconds = 0.0
        self.characters = 0.0
        self.observed = 0.0  # time.monotonic()

    def observe(self, seconds: float, characters: float) -> None:
        """Add a request."""
        self.requests += 1
        self.seconds += seconds - PACE_SHARE * self.seconds
        self.characters += characters - PACE_SHARE * self.characters
        self.observed = time.monotonic()

    def at(self, now: float) -> float:
        """Seconds per character; 0 while unknown. `now`: time.monotonic()."""
        if self.requests < PACE_REQUESTS:
            return 0.0
        return self.seconds / self.characters * math.exp2((self.observed - now) / PACE_SECONDS)


@dataclass(slots=True)
class Prefix:
    """The prefixes that a request shares with others. Keys are hashes, which include the tenant; lengths are in characters.

    `system`: the messages before the first one by the user. `conversation`: these and the first one by the user. `home`: the one
    of the two that determines the home. `earlier`: the length of the previous request in the conversation; without one, of the
    system messages.
    """

    system: bytes
    conversation: bytes
    home: bytes
    system_length: int
    earlier: int
    length: int
    continued: bool

    @classmethod
    def of_request(cls, tenant: str, request: Generate) -> "Prefix":
        """The prefix of a tenant's request."""
        if request.messages is None:
            plain = request.inputs[0] if request.inputs else request.prompt or ""
            key = hashlib.sha256(to_json([tenant, plain[:LEADING_CHARACTERS]])).digest()
            return cls(key, key, key, 0, 0, len(plain), False)
        lengths = [length_of(message) for message in request.messages]
        first = next((at for at, each in enumerate(request.messages) if each["role"] == "user"), 0)
        hashed = hashlib.sha256(to_json([tenant, request.messages[:first]]))
        system = hashed.digest()
        hashed.update(to_json(request.messages[first : first + 1]))
        conversation = hashed.digest()
        system_length = sum(lengths[:first])
        home = system if system_length > sum(lengths[first : first + 1]) else conversation
        continued = len(lengths) > first + 1
        earlier = sum(lengths[:-1]) if continued else system_length
        return cls(system, conversation, home, system_length, earlier, sum(lengths), continued)


def length_of(message: dict[str, Any]) -> int:
    """Characters of a message."""
    content = message.get("content")
    return len(content) if isinstance(content, str) else len(to_json(message))


class Prefixes:
    """Where this gateway has sent prefixes: by key, the characters that an instance has. The least recently used are
    forgotten.
    """

    def __init__(self) -> None:
        self.lengths: OrderedDict[bytes, dict[EngineClient, int]] = OrderedDict()

    def missing(self, prefix: Prefix, engine: EngineClient, home: EngineClient) -> int:
        """Characters that an instance is expected to compute."""
        conversation = self.lengths.get(prefix.conversation)
        if conversation is None and engine is home and prefix.continued:
            return prefix.length - prefix.earlier  # by another gateway, or before this one started
        cached = (conversation or {}).get(engine, 0)
        if prefix.system_length:
            cached = max(cached, self.lengths.get(prefix.system, {}).get(engine, 0))
        return prefix.length - min(cached, prefix.earlier)

    def forget(self, engine: EngineClient) -> None:
        """Forget what an instance has."""
        for lengths in self.lengths.values():
            lengths.pop(engine, None)

    def add(self, prefix: Prefix, engine: EngineClient) -> None:
        """Remember that an instance has a request."""
        lengths = {prefix.conversation: prefix.length}
        if prefix.system_length:
            lengths[prefix.system] = prefix.system_length
        for key, length in lengths.items():
            self.lengths.setdefault(key, {})[engine] = length
            self.lengths.move_to_end(key)
        while len(self.lengths) > PREFIXES:
            self.lengths.popitem(last=False)


class RoutedRequest:
    """One request and the instances it may go to. All of them serve the same revision of the model."""

    def __init__(self, instances: Instances, order: list[EngineClient], prefix: Prefix | None = None) -> None:
        """`order`: the conversation's home first. `prefix`: None if there is one instance. `queued`: seconds it has waited
        for a slot.
        """
        self.queued = 0.0
        self.prefix = prefix
        self.missing = 0  # characters that the chosen instance has to compute
        self.instances = instances
        self.model = instances.model
        self.order = order
        up = (engine for engine in order if engine.up)
        self.engine = next(up, next((engine for engine in order if engine.returning), order[0]))
        self.hello = self.engine.returning or self.engine.present()

    def there(self) -> list[EngineClient]:
        """The available instances that serve the same model; quarantined ones only if there are no others."""
        available = [
            engine
            for engine in self.order
            if engine.hello and engine.up and same_model(engine.hello, self.hello)
        ]
        return [engine for engine in available if not engine.quarantined] or available

    def choose(self) -> EngineClient:
        """The instance of the lowest cost; raises ApiError 503."""
        there = self.there()
        if not there:
            raise self.engine.absent()
        if self.prefix is None:
            return there[0]
        engine, self.missing = self.instances.cheapest(self.prefix, there)
        return engine

    @property
    def awaited(self) -> bool:
        """Whether no instance is available, but one is expected back."""
        return any(engine.returning for engine in self.order) and not any(engine.up for engine in self.order)

    async def begin(self, request: Generate, place: Place) -> tuple[Delta | Done | Failed, Answer]:
        """Send the request and wait for the first frame; returns it and the queue of the others. Raises ApiError.

        If an instance leaves or dies before the first frame, the request moves to another one, or to the same one
        once it is back.
        """
        while True:
            if self.awaited:
                await self.instances.until_found(place)
            self.engine = self.choose()
            try:
                frame, answer = await self.first_frame(request, place)
            except ApiError as error:
                if self.may_go_elsewhere(error.code):
                    continue
                raise
            if not isinstance(frame, Failed) or not self.may_go_elsewhere(frame.code):
                return frame, answer

    async def first_frame(self, request: Generate, place: Place) -> tuple[Delta | Done | Failed, Answer]:
        """Send the request to its instance, and observe how long that takes. Raises ApiError."""
        instances, engine, missing = self.instances, self.engine, self.missing
        begun = time.monotonic()
        work = instances.pending[engine] + REQUEST_CHARACTERS * (engine.load + 1) + missing
        if self.prefix:
            instances.prefixes.add(self.prefix, engine)
        instances.pending[engine] += missing
        try:
            answer = await engine.ask(request, place)
            self.queued = place.waited
            try:
                frame = await answer.get()
            except asyncio.CancelledError:
                engine.cancel(request.id)
                raise
        finally:
            instances.pending[engine] -= missing
        if request.stream and not isinstance(frame, Failed):  # else the first frame has the whole answer
            instances.paces[engine].observe(time.monotonic() - begun, work)
        return frame, answer

    def cancel(self, number: int) -> None:
        """Release the slot of request `number`, and stop the instance's work on it."""
        self.engine.cancel(number)

    def may_go_elsewhere(self, code: str) -> bool:
        """Whether a request that failed with `code` before its first frame is sent again: its instance has left, or
        has died while others are available. It never returns to an instance that died, since the request may be the
        cause.
        """
        if code not in GONE:
            return False
        if not self.engine.returning:
            self.order = [engine for engine in self.order if engine is not self.engine]
        return self.awaited or bool(self.there())


def same_model(one: Hello, other: Hello) -> bool:
    """Whether two instances give the same answers, so that one's may be cached as the other's."""
    return (one.revision, one.driver) == (other.revision, other.driver)


def open_instances(
    model: str,
    engine: Engine,
    host: str,
    room: Queue,
    credential: Callable[[str], bytes | None],
    salt_key: bytes,
) -> Instances:
    """The instances in the configuration; raises ConfigError if a credential or certificate is missing. `host`: this one's
    full name. `salt_key`: as in `OpenAiClient`.
    """
    offered = [OfferedAddress(each, engine.tls) for each in engine.offered if engine.tls]
    engines: list[EngineClient] = []
    if remote := engine.remote:
        key = api_key(model, remote, credential)

        def server(
            address: Path | str, tls: ClientTls | None, identity: str, there: OfferedAddress | None = None
        ) -> OpenAiClient:
            http = HttpClient(address, tls, key, there.alpn if there else None)
            return OpenAiClient(model, http, remote, room, salt_key, there, identity)

        for number, path in enumerate(remote.socket, 1):
            engines.append(server(path, None, f"{host}/{model}{f'-{number}' if number > 1 else ''}"))
        engines += [server(url, remote.tls, url) for url in remote.url]
        engines += [server(each.url, engine.tls, each.identity, each) for each in offered]
    else:
        engines += [EngineClient(model, path, room, f"{host}/{path.stem}") for path in engine.socket]
        engines += [EngineClient(model, each, room, each.identity) for each in offered]
    return Instances(model, engines, room)


def api_key(model: str, remote: Remote, credential: Callable[[str], bytes | None]) -> str | None:
    """The key for the model's servers, if they have one; raises ConfigError if its credential is missing."""
    if remote.key_credential is None:
        return None
    secret = credential(remote.key_credential)
    if secret is None:
        raise ConfigError(
            f"engines.{model}.remote.key_credential is '{remote.key_credential}', but there is no such "
            "credential: run this in the unit that loads it (LoadCredentialEncrypted=)"
        )
    return secret.decode().strip()
