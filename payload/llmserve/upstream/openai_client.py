"""An engine that is a server of OpenAI's API: vLLM, or another gateway. What it says passes through as it is.

The gateway asks it itself, without a process between: an answer's events are checked and counted, and not made anew.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from llmcore.config import ConfigError
from llmserve.protocol import Done, Event, Failed, FinishReason, Generate, Hello
from llmserve.settings import Remote
from llmserve.upstream.admission import Queue
from llmserve.upstream.engine_client import RETRY_SECONDS, EngineClient
from llmserve.upstream.http_client import BadAnswer, HttpClient, Lost, Response

log = logging.getLogger("llmserve.remote")
PROBE_SECONDS = 10.0  # longest time between two questions whether it is there, and for an answer to one
ANSWER_BYTES = 16 * 1024 * 1024
EVENT_BYTES = 1024 * 1024
EVENT_END = re.compile(rb"\r?\n\r?\n")
DATA = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
DONE = b"[DONE]"
# What a client may be told in an upstream's own words; its other refusals are about us.
CLIENT_ERRORS = {400, 404, 413, 422}
CODES = {  # ours; an error's code is a label of the metrics, so an upstream cannot invent one
    "context_length_exceeded",
    "invalid_value",
    "missing_field",
    "no_chat_template",
    "unsupported_field",
}
TOO_LONG = "maximum context length"  # how vLLM says it


class OpenAiClient(EngineClient):
    """One server. It is there as long as it lists the model; that is asked whenever an idle connection ends."""

    def __init__(self, model: str, http: HttpClient, settings: Remote, waiting: Queue) -> None:
        """The server must list the model by its name here: its answers say it, and pass through."""
        super().__init__(model, Path(str(http.address)), waiting)
        self.http = http
        self.settings = settings
        self.tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def stalled(self) -> bool:
        """It sends no beats; what hangs is seen by the probe and ended by the deadline."""
        return False

    async def keep_connected(self) -> None:
        """Ask whether it is there, for ever; runs until cancelled."""
        failures = 0
        reported = ""
        while True:
            self.trouble = "it closed the connection"
            try:
                self.http.refresh()
                await self.watch()
                failures = 0
                continue
            except (OSError, TimeoutError, Lost, BadAnswer, ConfigError) as error:
                self.trouble = f"{type(error).__name__}: {error}"
            if self.trouble != reported or self.hello:
                reported = self.trouble
                fields = {"model": self.model, "upstream": str(self.http.address), "reason": reported}
                log.warning("upstream not there", extra={"fields": fields})
            self.hello = None
            self.changed.set()
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def watch(self) -> None:
        """Read the list of models, then wait until the idle connection ends: a dead server is so seen at once."""
        async with self.http.request("GET", "/v1/models", keep=True) as response:
            async with asyncio.timeout(PROBE_SECONDS):
                listed = await response.whole(ANSWER_BYTES)
            if response.status != 200:
                raise BadAnswer(f"GET /v1/models answers {response.status}")
            hello = self.described(listed)
            if hello != self.hello:
                fields = {"model": self.model, "revision": hello.revision, "context": hello.context}
                log.info("upstream connected", extra={"fields": fields})
            self.hello = hello
            self.admission.slots = hello.slots
            self.changed.set()
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await response.reader.read(1)
            except TimeoutError:
                return

    def described(self, listed: bytes) -> Hello:
        """Who it is, from its list of models and our settings; raises BadAnswer."""
        try:
            models = {each["id"]: each for each in json.loads(listed)["data"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadAnswer("GET /v1/models gives no list of models") from None
        if self.model not in models:
            raise BadAnswer(f"it has no model '{self.model}': let it serve the model under this name")
        said = models[self.model]
        revision = self.settings.revision or said.get("revision")
        context = self.settings.context or said.get("max_model_len") or said.get("context")
        parent = said.get("parent")  # of an adapter, as vLLM lists it
        for name, value, kind in ("revision", revision, str), ("context", context, int):
            if not isinstance(value, kind) or not value:
                raise BadAnswer(f"it does not say the model's {name}: set '{name}' beside its address")
        return Hello(
            self.model,
            revision,
            "remote",
            context,
            self.settings.slots,
            fields=list(self.settings.fields),
            dimensions=self.settings.dimensions or 0,
            kept=self.settings.cache,
            parent=parent if isinstance(parent, str) else "",
        )

    def send(self, request: Generate) -> None:
        """Ask, in a task of its own."""
        task = asyncio.create_task(self.run(request))
        self.tasks[request.id] = task
        task.add_done_callback(lambda _: self.tasks.pop(request.id, None))

    def stop(self, number: int) -> None:
        """Hang up on request `number`."""
        if task := self.tasks.get(number):
            task.cancel()

    async def run(self, request: Generate) -> None:
        """One request, to its last frame."""
        try:
            last = await self.ask_upstream(request, request.clip)
        except BadAnswer as error:
            log.error("upstream misbehaves", extra={"fields": {"model": self.model, "reason": str(error)}})
            last = self.failed(request)
        except (OSError, TimeoutError, Lost):
            last = Failed(request.id, 503, "engine_lost", self.lost())
        except Exception:
            log.exception("a talk with an upstream failed")
            last = self.failed(request)
        if answer := self.end(request.id):
            answer.put_nowait(last)

    async def ask_upstream(self, request: Generate, clip: bool) -> Done | Failed:
        """Ask, hand on the events of a stream, and return what ends the answer.

        `clip`: a server that refuses the default length is asked again without one, since what it then gives is the
        rest of its context, which is shorter.
        """
        path, body = http_request(self.model, request)
        async with self.http.request("POST", path, body) as response:
            if response.status == 200:
                return await (
                    self.relay(request, response) if request.stream else self.whole(request, response)
                )
            refused = await response.whole(ANSWER_BYTES)
        if clip and response.status in CLIENT_ERRORS:
            request.max_tokens = 0
            return await self.ask_upstream(request, False)
        return self.refusal(request, response.status, refused)

    async def whole(self, request: Generate, response: Response) -> Done:
        """An answer in one body."""
        body = await response.whole(ANSWER_BYTES)
        said = as_object(body)
        if request.inputs is not None:
            prompt, _ = usage_of({"usage": {"completion_tokens": 0, **(said.get("usage") or {})}})
            return Done(request.id, "", "stop", prompt, 0, passed=body.decode())
        text, reason = first_choice(said, "message")
        return Done(request.id, text, reason, *usage_of(said), passed=body.decode())

    async def relay(self, request: Generate, response: Response) -> Done | Failed:
        """A stream; the chunk with the usage goes on only if the client asked for it."""
        reason: FinishReason = "stop"
        usage = (0, 0)
        async for event, data in events(response):
            if data == DONE:
                if usage == (0, 0):
                    raise BadAnswer("its stream ends without usage, so it cannot be counted")
                return Done(request.id, "", reason, *usage)
            text, counts_only = "", False
            if data is not None:
                said = as_object(data)
                if "error" in said:
                    raise BadAnswer("its stream ends with an error")
                if said.get("usage"):
                    usage = usage_of(said)
                if said.get("choices"):
                    text, reason = first_choice(said, "delta", reason)
                else:
                    counts_only = True
            if waiting := self.answers.get(request.id):
                waiting[0].put_nowait(Event(request.id, text, event, counts_only))
        raise Lost

    def refusal(self, request: Generate, status: int, body: bytes) -> Failed:
        """What a status that is no success means for the client."""
        if status not in CLIENT_ERRORS:
            fields = {"model": self.model, "http.response.status_code": status}
            log.error("upstream refuses", extra={"fields": fields})
            if status == 429:
                message = f"the engine of '{self.model}' has too much to do: ask again later"
                return Failed(request.id, 503, "overloaded", message)
            return self.failed(request)
        try:
            said = json.loads(body)
            error = said.get("error", said)
            message, code, param = str(error["message"]), error.get("code"), error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            message, code, param = (
                f"the model's server refuses this with {status}: change the request",
                None,
                None,
            )
        if code not in CODES:
            code = "context_length_exceeded" if TOO_LONG in message else "engine_refused"
        return Failed(request.id, 400, code, message[:500], param[:80] if isinstance(param, str) else None)

    def failed(self, request: Generate) -> Failed:
        """503, for what is not the client's doing."""
        message = f"the engine of '{self.model}' gave no answer that can be passed on: ask again, or tell the operator"
        return Failed(request.id, 503, "engine_failed", message)


def http_request(model: str, request: Generate) -> tuple[str, bytes]:
    """Path and body."""
    content: dict[str, Any] = {"model": model, **request.extra}
    if request.inputs is not None:
        content |= {"input": request.inputs, "encoding_format": request.encoding}
        return "/v1/embeddings", json.dumps(content, ensure_ascii=False).encode()
    if request.messages is not None:
        path, content["messages"] = "/v1/chat/completions", request.messages
    else:
        path, content["prompt"] = "/v1/completions", request.prompt
    for name in "max_tokens", "stop":
        if value := getattr(request, name):
            content[name] = value
    for name in "temperature", "top_p", "seed":
        if (value := getattr(request, name)) is not None:
            content[name] = value
    if request.stream:
        content |= {"stream": True, "stream_options": {"include_usage": True}}
    return path, json.dumps(content, ensure_ascii=False).encode()


async def events(response: Response) -> AsyncIterator[tuple[bytes, bytes | None]]:
    """Each server-sent event as it came, and its data; None for one without, such as a comment."""
    held = b""
    total = 0
    async for piece in response.body():
        held += piece
        total += len(piece)
        start = 0
        for end in EVENT_END.finditer(held):
            event = held[start : end.end()]
            start = end.end()
            found = DATA.search(event)
            yield event, found[1] if found else None
        held = held[start:]
        if len(held) > EVENT_BYTES or total > ANSWER_BYTES:
            raise BadAnswer(f"an event is longer than {EVENT_BYTES} bytes, or a stream than {ANSWER_BYTES}")


def as_object(data: bytes) -> dict[str, Any]:
    """A JSON object; raises BadAnswer."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise BadAnswer(f"{len(data)} bytes of its answer are no JSON object")
    return said


def first_choice(said: dict[str, Any], name: str, before: FinishReason = "stop") -> tuple[str, FinishReason]:
    """Text and finish reason of the first choice; raises BadAnswer."""
    try:
        choice = said["choices"][0]
        text = choice["text"] if "text" in choice else choice[name].get("content")
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("its answer has no choice") from None
    if text is not None and not isinstance(text, str):
        raise BadAnswer("its answer's text is no text")
    return text or "", "length" if reason == "length" else before if reason is None else "stop"


def usage_of(said: dict[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer; raises BadAnswer, because what is not counted is not given."""
    usage = said.get("usage")
    if isinstance(usage, dict):
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int) and isinstance(answer, int) and min(prompt, answer) >= 0:
            return prompt, answer
    raise BadAnswer("its answer says no usage")
