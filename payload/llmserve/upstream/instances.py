"""The instances of one model: a conversation stays where its prefix is, unless too much is asked there already.

Rendezvous hashing orders the instances for each conversation; the first that is there and whose load stays within
LOAD_BOUND of the average takes it (consistent hashing with bounded loads, Mirrokni and others, 2016). So one more or
one less moves only the conversations that it had or gets. While none is there and one has said goodbye, who asks waits for it.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.metrics import EngineState
from llmserve.protocol import Delta, Done, Failed, Generate, Hello
from llmserve.settings import Engine
from llmserve.upstream.admission import Admission, Place, Queue
from llmserve.upstream.engine_client import Answer, EngineClient
from llmserve.upstream.http_client import HttpClient
from llmserve.upstream.openai_client import OpenAiClient

LOAD_BOUND = 1.25
LEADING_CHARACTERS = 1024  # of a plain prompt; a conversation's are its messages up to the first of the user
GONE = {"engine_lost", "engine_unavailable"}


class Instances:
    """All instances of a model. `hello` is the first one's that is there."""

    def __init__(self, model: str, engines: list[EngineClient], room: Queue) -> None:
        """In the order of the configuration, which counts for nothing but where a request says nothing. `room`: to wait
        until an engine is back; as much as there is for a slot of one that is there.
        """
        self.model = model
        self.engines = engines
        self.away = Admission(room)  # nobody's slots: whoever is in it waits until an engine is found
        for engine in engines:
            engine.found = self.away.call_in

    @property
    def hello(self) -> Hello | None:
        """Who answers, or None while no instance is there."""
        return next((engine.hello for engine in self.engines if engine.hello), None)

    @property
    def up(self) -> int:
        """Instances that are there."""
        return sum(engine.up for engine in self.engines)

    def state(self) -> EngineState:
        """For a scrape: counts of all instances together, the fullest cache, the GPUs of the first that has some."""
        states = [engine.state() for engine in self.engines]
        return EngineState(
            self.model,
            self.up,
            any(state.stalled for state in states),
            sum(state.running for state in states),
            sum(state.running_tokens for state in states),
            len(self.away.waiting) + sum(state.waiting for state in states),
            self.away.waiting_tokens + sum(state.waiting_tokens for state in states),
            max((state.kv_used for state in states if state.kv_used is not None), default=None),
            next((state.gpu_used for state in states if state.gpu_used), []),
        )

    def route(self, tenant: str, request: Generate) -> "RoutedRequest":
        """Where a request of this conversation may go; raises ApiError 503 where there is no instance."""
        return RoutedRequest(
            self, self.order(prefix_key(tenant, request)) if len(self.engines) > 1 else self.engines
        )

    async def until_found(self, place: Place) -> None:
        """Wait until an engine is there again; raises ApiError 503."""
        await self.away.enter(place)
        self.away.leave(place)

    def order(self, key: bytes) -> list[EngineClient]:
        """All instances, the conversation's own first."""
        return sorted(
            self.engines, key=lambda engine: hashlib.sha256(key + str(engine.socket).encode()).digest()
        )


class RoutedRequest:
    """One request's place in a fleet. It stays with one revision of the model."""

    def __init__(self, instances: Instances, order: list[EngineClient]) -> None:
        """Nothing is asked yet. `order`: the conversation's own instance first. `queued`: seconds of waiting for a slot."""
        self.queued = 0.0
        self.instances = instances
        self.model = instances.model
        self.order = order
        up = (engine for engine in order if engine.up)
        self.engine = next(up, next((engine for engine in order if engine.returning), order[0]))
        self.hello = self.engine.returning or self.engine.present()

    def there(self) -> list[EngineClient]:
        """Who can answer it."""
        return [
            engine
            for engine in self.order
            if engine.hello and engine.up and same_model(engine.hello, self.hello)
        ]

    def choose(self) -> EngineClient:
        """The first instance in the conversation's order that is within its share; raises ApiError 503."""
        there = self.there()
        if not there:
            raise self.engine.absent()
        bound = math.ceil(LOAD_BOUND * (sum(engine.load for engine in there) + 1) / len(there))
        return next(engine for engine in there if engine.load < bound)

    @property
    def awaited(self) -> bool:
        """Whether no instance is there, and one that said goodbye is expected back."""
        return any(engine.returning for engine in self.order) and not any(engine.up for engine in self.order)

    async def begin(self, request: Generate, place: Place) -> tuple[Delta | Done | Failed, Answer]:
        """Ask, and wait for the first frame; where an instance leaves or dies before it, another is asked, or the same one
        once it is back. Raises ApiError.
        """
        while True:
            if self.awaited:
                await self.instances.until_found(place)
            self.engine = self.choose()
            try:
                answer = await self.engine.ask(request, place)
            except ApiError as error:
                if self.may_go_elsewhere(error.code):
                    continue
                raise
            self.queued = place.waited
            try:
                frame = await answer.get()
            except asyncio.CancelledError:
                self.engine.cancel(request.id)
                raise
            if not isinstance(frame, Failed) or not self.may_go_elsewhere(frame.code):
                return frame, answer

    def cancel(self, number: int) -> None:
        """Request `number` needs its slot no more, and the instance's work on it stops."""
        self.engine.cancel(number)

    def may_go_elsewhere(self, code: str) -> bool:
        """Whether a request that failed with `code` before its first frame is asked again: its instance has died and others
        live, or has said goodbye. What was dead once is not asked again, as the request may be what it died of.
        """
        if code not in GONE:
            return False
        if not self.engine.returning:
            self.order = [engine for engine in self.order if engine is not self.engine]
        return self.awaited or bool(self.there())


def same_model(one: Hello, other: Hello) -> bool:
    """Whether two instances give the same answers, and answers of one may be kept as the other's."""
    return (one.revision, one.driver) == (other.revision, other.driver)


def prefix_key(tenant: str, request: Generate) -> bytes:
    """What stays the same through a conversation: whose it is, and its messages up to the first of the user."""
    plain = request.inputs[0] if request.inputs else request.prompt or ""
    leading: object = plain[:LEADING_CHARACTERS]
    if request.messages is not None:
        first = next((at for at, each in enumerate(request.messages) if each["role"] == "user"), 0)
        leading = request.messages[: first + 1]
    return hashlib.sha256(json.dumps([tenant, leading]).encode()).digest()


def open_instances(
    model: str, engine: Engine, room: Queue, credential: Callable[[str], bytes | None]
) -> Instances:
    """The instances that the configuration names; raises ConfigError for what they need and lack."""
    engines: list[EngineClient] = [EngineClient(model, socket, room) for socket in engine.socket]
    if remote := engine.remote:
        key = None
        if remote.key_credential:
            secret = credential(remote.key_credential)
            if secret is None:
                raise ConfigError(
                    f"engines.{model}.remote.key_credential is '{remote.key_credential}', but there is no such "
                    "credential: start this as the unit that loads it (LoadCredentialEncrypted=)"
                )
            key = secret.decode().strip()
        addresses: list[Path | str] = [*remote.socket, *remote.url]
        for address in addresses:
            engines.append(OpenAiClient(model, HttpClient(address, remote.tls, key), remote, room))
    return Instances(model, engines, room)
