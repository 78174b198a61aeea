"""Client of a server of OpenAI's API, such as vLLM or another gateway, in place of an engine.

The gateway calls it directly, without a process in between. The events of an answer are validated and counted, but
passed through unchanged.
"""

import asyncio
import hmac
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from llmcore.config import ConfigError
from llmserve.fast_json import parse
from llmserve.fields import PASSED
from llmserve.http_client import BadAnswer, HttpClient, Lost, Response
from llmserve.protocol import Done, Event, Failed, FinishReason, Generate, Hello
from llmserve.settings import MOST_CONTEXT, Remote
from llmserve.upstream.admission import Place, Queue
from llmserve.upstream.engine_client import RETRY_SECONDS, Answer, EngineClient
from llmserve.upstream.offered import OfferedAddress

log = logging.getLogger("llmserve.remote")
PROBE_SECONDS = 10.0  # interval of the probes, and the time limit of each
ANSWER_BYTES = 16 * 1024 * 1024
EVENT_BYTES = 1024 * 1024
MOST_TOKENS = 2**53  # of one answer: what counts them, here and in Redis, is exact up to it
EVENT_END = re.compile(rb"\n\r?\n")
DATA = re.compile(rb"^data: ?(.*)", re.MULTILINE)
DONE = b"[DONE]"
DESCRIPTION = "/openapi.json"
NOT_THERE = {401, 403, 404}  # statuses of a server without a description
SALT = "cache_salt"  # field of vLLM
BODIES = ("ChatCompletionRequest", "CompletionRequest", "EmbeddingCompletionRequest")  # vLLM's names
# Statuses whose message is passed on to the client; all others concern the gateway, not the request.
CLIENT_ERRORS = {400, 404, 413, 422}
CODES = {  # known ones only: codes are labels of metrics, so an upstream must not add any
    "context_length_exceeded",
    "invalid_value",
    "missing_field",
    "no_chat_template",
    "unsupported_field",
}
TOO_LONG = "maximum context length"  # vLLM's wording


class OpenAiClient(EngineClient):
    """One server. It is available while it lists the model, which is probed whenever the idle connection ends."""

    def __init__(
        self,
        model: str,
        http: HttpClient,
        settings: Remote,
        waiting: Queue,
        salt_key: bytes,
        offered: OfferedAddress | None = None,
        identity: str = "",
    ) -> None:
        """The server must list the model under the name it has here, because its answers name the model and pass
        through. `salt_key`: the key for deriving a tenant's salt from its name. `offered`: set if another host offers it.
        `identity`: as in `EngineClient`.
        """
        super().__init__(model, offered or Path(str(http.address)), waiting, identity)
        self.http = http
        self.settings = settings
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.fields: list[str] = []
        self.salt_key = salt_key
        self.salted = False  # whether the server keeps prompts with different salts apart

    @property
    def stalled(self) -> bool:
        """Always False, since it sends no beats. The probe detects a server that hangs, and deadlines end its requests."""
        return False

    async def keep_connected(self) -> None:
        """Probe the server repeatedly; runs until cancelled."""
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
            self.http.close()
            if self.trouble != reported or self.hello:
                reported = self.trouble
                fields = {"model": self.model, "upstream": str(self.http.address), "reason": reported}
                log.warning("upstream unavailable", extra={"fields": fields})
            self.hello = None
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def watch(self) -> None:
        """Read the list of models, then wait until the idle connection ends, which reveals a dead server at once."""
        if self.hello is None:
            await self.read_description()
        async with self.http.request("GET", "/v1/models", own=True) as response:
            async with asyncio.timeout(PROBE_SECONDS):
                listed = await response.whole(ANSWER_BYTES)
            if response.status != 200:
                raise BadAnswer(f"GET /v1/models returned {response.status}")
            hello = self.described(listed)
            if hello != self.hello:
                fields = {"model": self.model, "revision": hello.revision, "context": hello.context}
                log.info("upstream connected", extra={"fields": fields})
            previous, self.hello = self.hello, hello
            self.admission.slots = hello.slots
            self.admission.room.context = hello.context
            if not previous:
                self.on_return()
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await response.connection.until_closed()
            except TimeoutError:
                return

    async def read_description(self) -> None:
        """Learn from the server's own description, such as vLLM's, which optional fields it accepts, unless the settings list
        them, and whether it accepts a salt. If that fails, the server is asked again before it gets a prompt.
        """
        async with asyncio.timeout(PROBE_SECONDS), self.http.request("GET", DESCRIPTION) as response:
            body = await response.whole(ANSWER_BYTES)
        if response.status == 200:
            described = await asyncio.to_thread(fields_of, body)
        elif response.status in NOT_THERE:
            described = set()
        else:
            raise BadAnswer(f"GET {DESCRIPTION} returned {response.status}")
        self.salted = SALT in described
        if self.settings.fields is not None:
            self.fields = list(self.settings.fields)
            return
        self.fields = sorted(described & PASSED.keys())
        if not self.fields:
            upstream = {"model": self.model, "upstream": str(self.http.address)}
            log.warning(
                "%s describes no optional field, so none is passed on",
                DESCRIPTION,
                extra={"fields": upstream},
            )

    def described(self, listed: bytes) -> Hello:
        """The server's Hello, from its list of models and the settings; raises BadAnswer."""
        try:
            models = {each["id"]: each for each in parse(listed)["data"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadAnswer("GET /v1/models did not return a list of models") from None
        if self.model not in models:
            raise BadAnswer(
                f"it does not list the model '{self.model}': make it serve the model under this name"
            )
        parsed = models[self.model]
        revision = self.settings.revision or parsed.get("revision")
        self.sick_there = parsed.get("quarantined") is True  # as listed by another gateway
        context = self.settings.context or parsed.get("max_model_len") or parsed.get("context")
        parent = parsed.get("parent")  # the base model of an adapter, as listed by vLLM
        for name, value, kind in ("revision", revision, str), ("context", context, int):
            if not isinstance(value, kind) or not value:
                raise BadAnswer(f"it does not report the model's {name}: set '{name}' beside its address")
        if isinstance(context, bool) or not 0 < context <= MOST_CONTEXT:
            raise BadAnswer(
                f"it reports a context of {context} tokens, and 1 to {MOST_CONTEXT} are possible: "
                "correct it there, or set 'context' beside its address"
            )
        return Hello(
            self.model,
            revision,
            "remote",
            context,
            self.settings.slots,
            fields=self.fields,
            dimensions=self.settings.dimensions or 0,
            kept=self.settings.cache,
            parent=parent if isinstance(parent, str) else "",
            template_arguments=list(self.settings.template_arguments),
        )

    def send(self, request: Generate) -> None:
        """Send the request in a task of its own."""
        task = asyncio.create_task(self.run(request))
        self.tasks[request.id] = task
        task.add_done_callback(lambda _: self.tasks.pop(request.id, None))

    def stop(self, number: int) -> None:
        """Abort request `number`."""
        if task := self.tasks.get(number):
            task.cancel()

    async def run(self, request: Generate) -> None:
        """Run one request to its last frame."""
        try:
            default = request.clip and self.hello is not None and self.hello.context <= request.max_tokens
            last = await self.ask_upstream(request, None if default else request.max_tokens)
        except BadAnswer as error:
            log.error(
                "invalid response from upstream",
                extra={"fields": {"model": self.model, "reason": str(error)}},
            )
            last = self.failed(request)
        except (OSError, TimeoutError, Lost):
            last = Failed(request.id, 503, "engine_lost", self.lost())
        except Exception:
            log.exception("a request to an upstream failed")
            last = self.failed(request)
        if answer := self.end(request.id, last):
            answer.put(last)

    async def ask_upstream(self, request: Generate, length: int | None) -> Done | Failed:
        """Send the request, pass on the events of a stream, and return the frame that ends the answer.

        `length`: of the longest answer. If the server rejects a length that the client did not ask for, the request is sent again
        without it; the server's default is then the rest of its context, which is shorter.
        """
        path, body = http_request(self.model, request, length, self.salt(request))
        async with self.http.request("POST", path, body) as response:
            if response.status == 200:
                return await (
                    self.relay(request, response) if request.stream else self.whole(request, response)
                )
            refused = await response.whole(ANSWER_BYTES)
        if request.clip and length is not None and response.status in CLIENT_ERRORS:
            return await self.ask_upstream(request, None)
        return self.refusal(request, response.status, refused)

    def salt(self, request: Generate) -> str | None:
        """The salt that separates the prompts of the request's tenant from all others in the server's cache, if the server
        accepts salts. Copies for a candidate, whose response time no client sees, share one.
        """
        if not self.salted or request.id not in self.answers:
            return None
        _, place = self.answers[request.id]
        return hmac.digest(self.salt_key, place.tenant.encode(), "sha256").hex()

    async def whole(self, request: Generate, response: Response) -> Done:
        """An answer that is not streamed."""
        body = await response.whole(ANSWER_BYTES)
        parsed = as_object(body)
        if request.inputs is not None:
            usage = parsed.get("usage")
            prompt, _ = usage_of(
                {"usage": {"completion_tokens": 0, **usage} if isinstance(usage, dict) else None}
            )
            return Done(request.id, "", "stop", prompt, 0, passed=body.decode())
        text, reason = first_choice(parsed, "message")
        return Done(request.id, text, reason, *usage_of(parsed), passed=body.decode())

    async def relay(self, request: Generate, response: Response) -> Done:
        """Pass a stream on."""
        stream = Stream(request, self.answers)
        await response.feed(stream.take)
        if stream.end is None:
            raise Lost
        return stream.end

    def refusal(self, request: Generate, status: int, body: bytes) -> Failed:
        """The frame for a status other than 200."""
        if status not in CLIENT_ERRORS:
            fields = {"model": self.model, "http.response.status_code": status}
            log.error("upstream rejected a request", extra={"fields": fields})
            if status == 429:
                message = f"the engine of '{self.model}' is overloaded: retry later"
                return Failed(request.id, 503, "overloaded", message)
            return self.failed(request)
        try:
            parsed = parse(body)
            error = parsed.get("error", parsed)
            message, code, param = str(error["message"]), error.get("code"), error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            message, code, param = (
                f"the model's server rejected this with {status}: change the request",
                None,
                None,
            )
        if request.length_field not in message:  # sent upstream as max_tokens, whichever the client used
            message = message.replace("max_tokens", request.length_field)
        if param == "max_tokens":
            param = request.length_field
        if not isinstance(code, str) or code not in CODES:
            code = "context_length_exceeded" if TOO_LONG in message else "engine_refused"
        return Failed(request.id, 400, code, message[:500], param[:80] if isinstance(param, str) else None)

    def failed(self, request: Generate) -> Failed:
        """503, for failures that the client did not cause."""
        message = f"the engine of '{self.model}' gave no valid answer: retry, or tell the operator"
        return Failed(request.id, 503, "engine_failed", message)


def fields_of(description: bytes) -> set[str]:
    """The fields in the request bodies of a server's OpenAPI document; none if it is not such a document."""
    try:
        schemas = parse(description)["components"]["schemas"]
        return {name for body in BODIES if body in schemas for name in schemas[body]["properties"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def http_request(
    model: str, request: Generate, length: int | None, salt: str | None = None
) -> tuple[str, bytes]:
    """Path and body of the HTTP request. `length`: of the longest answer; None leaves it to the server."""
    content: dict[str, Any] = {"model": model, **request.extra}
    if salt:
        content[SALT] = salt
    if request.inputs is not None:
        content |= {"input": request.inputs, "encoding_format": request.encoding}
        return "/v1/embeddings", to_json(content)
    if request.messages is not None:
        path, content["messages"] = "/v1/chat/completions", request.messages
    else:
        path, content["prompt"] = "/v1/completions", request.prompt
    content["max_tokens"] = length  # also null: without the field, vLLM ends a completion after 16 tokens
    if request.stop:
        content["stop"] = request.stop
    for name in "temperature", "top_p", "seed":
        if (value := getattr(request, name)) is not None:
            content[name] = value
    if request.stream:
        content |= {"stream": True, "stream_options": {"include_usage": True}}
    return path, to_json(content)


class Stream:
    """The events of one answer, validated and counted as they arrive. `end`: the last frame, once [DONE] came."""

    def __init__(self, request: Generate, answers: Mapping[int, tuple[Answer, Place]]) -> None:
        """`answers`: queues by number of the request; once a request has ended, its queue is missing."""
        self.request = request
        self.answers = answers
        self.end: Done | None = None
        self.reason: FinishReason = "stop"
        self.usage = (0, 0)
        self.rest = bytearray()  # of an event that is not complete
        self.searched = 0  # bytes of the rest that have no event's end
        self.total = 0  # bytes

    def take(self, data: bytes) -> bool:
        """Pass on the events that end with the piece `data`; returns whether [DONE] came. Raises BadAnswer."""
        self.total += len(data)
        end = None if self.rest or self.total > ANSWER_BYTES else EVENT_END.search(data)
        if end and end.end() == len(data) <= EVENT_BYTES:
            return self.read(data)  # usually a piece is an event
        self.rest += data
        start = 0
        for end in EVENT_END.finditer(self.rest, self.searched):
            event = bytes(self.rest[start : end.end()])
            start = end.end()
            if self.read(event):
                return True
        del self.rest[:start]
        self.searched = max(0, len(self.rest) - 2)  # the rest of an event's end may come with the next piece
        if len(self.rest) > EVENT_BYTES or self.total > ANSWER_BYTES:
            raise BadAnswer(f"an event exceeds {EVENT_BYTES} bytes, or the stream {ANSWER_BYTES}")
        return False

    def read(self, event: bytes) -> bool:
        """Pass on one server-sent event unchanged, including comments and others without data.

        The chunk with the usage is marked, so that it reaches only clients that requested it.
        """
        text, counts_only = "", False
        if field := DATA.search(event):
            data = field[1].rstrip(b"\r")
            if data == DONE:
                if self.usage == (0, 0):
                    raise BadAnswer("its stream ended without usage, so its tokens cannot be counted")
                self.end = Done(self.request.id, "", self.reason, *self.usage)
                return True
            parsed = as_object(data)
            if "error" in parsed:
                raise BadAnswer("its stream ended with an error")
            if parsed.get("usage"):
                self.usage = usage_of(parsed)
            if parsed.get("choices"):
                text, self.reason = first_choice(parsed, "delta", self.reason)
            else:
                counts_only = True
        if answer := self.answers.get(self.request.id):
            answer[0].put(Event(self.request.id, text, event, counts_only))
        return False


def as_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises BadAnswer."""
    try:
        parsed = parse(data)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise BadAnswer(f"{len(data)} bytes of its answer are not a JSON object")
    return parsed


def first_choice(
    parsed: dict[str, Any], name: str, before: FinishReason = "stop"
) -> tuple[str, FinishReason]:
    """Text and finish reason of the first choice; raises BadAnswer."""
    try:
        choice = parsed["choices"][0]
        text = choice["text"] if "text" in choice else choice[name].get("content")
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("its answer has no choice") from None
    if text is not None and not isinstance(text, str):
        raise BadAnswer("its answer's text is not a string")
    finish_reason: FinishReason = (
        before if reason is None else reason if reason in ("length", "content_filter") else "stop"
    )
    return text or "", finish_reason


def usage_of(parsed: dict[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer; raises BadAnswer, because an answer that cannot be counted is not delivered."""
    usage = parsed.get("usage")
    if isinstance(usage, dict):
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if (
            isinstance(prompt, int)
            and isinstance(answer, int)
            and 0 <= min(prompt, answer) <= max(prompt, answer) <= MOST_TOKENS
        ):
            return prompt, answer
    raise BadAnswer("its answer has no usage")
