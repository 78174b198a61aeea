"""The instances of one model: a conversation stays on the instance that has its prefix cached, unless that is
overloaded.

Rendezvous hashing orders the instances for each conversation; the first available one whose load stays within
LOAD_BOUND of the average is chosen (consistent hashing with bounded loads, Mirrokni et al., 2016). So adding or
removing an instance moves only the conversations that it gains or loses. While none is available but one is expected
back, requests wait for it.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

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
        self.away = Admission(room)  # has no slots: requests wait here until an engine is back
        for engine in engines:
            engine.found = self.away.call_in

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
        return RoutedRequest(
            self, self.order(prefix_key(tenant, request)) if len(self.engines) > 1 else self.engines
        )

    async def until_found(self, place: Place) -> None:
        """Wait until an engine is available again; raises ApiError 429 or 503."""
        await self.away.enter(place)
        self.away.leave(place)

    def order(self, key: bytes) -> list[EngineClient]:
        """All instances, ordered by preference for the conversation `key`; quarantined ones are the last."""

        def preference(engine: EngineClient) -> tuple[bool, bytes]:
            return engine.quarantined, hashlib.sha256(key + engine.identity.encode()).digest()

        return sorted(self.engines, key=preference)


class RoutedRequest:
    """One request and the instances it may go to. All of them serve the same revision of the model."""

    def __init__(self, instances: Instances, order: list[EngineClient]) -> None:
        """`order`: the conversation's preferred instance first. `queued`: seconds it has waited for a slot."""
        self.queued = 0.0
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
        """The most preferred instance within its load bound; raises ApiError 503."""
        there = self.there()
        if not there:
            raise self.engine.absent()
        bound = math.ceil(LOAD_BOUND * (sum(engine.load for engine in there) + 1) / len(there))
        return next(engine for engine in there if engine.load < bound)

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


def prefix_key(tenant: str, request: Generate) -> bytes:
    """Hash of what stays the same throughout a conversation: its tenant, and its messages up to the first one by the
    user.
    """
    plain = request.inputs[0] if request.inputs else request.prompt or ""
    leading: object = plain[:LEADING_CHARACTERS]
    if request.messages is not None:
        first = next((at for at, each in enumerate(request.messages) if each["role"] == "user"), 0)
        leading = request.messages[: first + 1]
    return hashlib.sha256(to_json([tenant, leading])).digest()


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
