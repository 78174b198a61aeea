"""Responses to clients: a whole body, or the frames of a stream. One class per endpoint."""

import json
import re
import time
from typing import Protocol

from pydantic_core import to_json

from llmserve.api.errors import ApiError
from llmserve.protocol import Choices, Done, Event

END = b"data: [DONE]\n\n"
DATA = re.compile(rb"^data: ?(\{.*\})\r?$", re.MULTILINE)  # of an upstream's event


def usage(frame: Done) -> dict[str, int]:
    """Token counts in OpenAI's format."""
    return {
        "prompt_tokens": frame.prompt_tokens,
        "completion_tokens": frame.completion_tokens,
        "total_tokens": frame.prompt_tokens + frame.completion_tokens,
    }


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


class Rendering(Protocol):
    """How an endpoint renders an answer."""

    def whole(self, frame: Done) -> bytes:
        """The body of an answer that is not streamed."""

    def first(self) -> bytes:
        """What a stream sends before the first piece."""

    def piece(self, text: str) -> bytes:
        """A piece of text as an event."""

    def choices(self, frame: Choices) -> bytes:
        """A piece of more than text, in place of `piece`; its stream has no `first`."""

    def event(self, passed: Event) -> bytes:
        """An upstream's event, in place of `piece`; its stream has no `first`."""

    def last(self, frame: Done) -> bytes:
        """What a stream sends after the last piece, including [DONE]."""

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that failed; no [DONE] follows."""


class OpenAiRendering:
    """Chat completions and completions, which differ only in a few names."""

    def __init__(
        self,
        chat: bool,
        identifier: str,
        model: str,
        revision: str,
        include_usage: bool,
        blind: bool = False,
    ) -> None:
        """`chat`: chat completions. `identifier`: the id for rating the answer. `blind`: replace the upstream's model name."""
        self.chat = chat
        self.blind = blind
        self.include_usage = include_usage
        self.passing = self.finished = False
        self.head: dict[str, object] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + identifier,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{revision}",
        }
        self.before = self.after = b""

    def whole(self, frame: Done) -> bytes:
        """An upstream's body passes through unchanged, unless it must not reveal its model."""
        if frame.passed is not None:
            passed = frame.passed.encode()
            return self.undisclosed(passed) if self.blind else passed
        choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": frame.finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": frame.text, "refusal": None}
        else:
            choice["text"] = frame.text
        return to_json({**self.head, "choices": frame.choices or [choice], "usage": usage(frame)})

    def chunk(
        self, choices: list[dict[str, object]], used: dict[str, int] | None = None
    ) -> dict[str, object]:
        content = {**self.head, "choices": choices}
        if self.chat:
            content["object"] = "chat.completion.chunk"
        if self.include_usage:
            content["usage"] = used
        return content

    def choice(self, delta: dict[str, str], text: str = "", reason: str | None = None) -> dict[str, object]:
        choice: dict[str, object] = {"delta": delta} if self.chat else {"text": text}
        return {"index": 0, **choice, "logprobs": None, "finish_reason": reason}

    def first(self) -> bytes:
        """The role, for chats. Also builds the JSON around a piece, once per stream."""
        mark = "\0"
        around = event(self.chunk([self.choice({"content": mark}, mark)]))
        self.before, self.after = around.split(b'"\\u0000"')
        return event(self.chunk([self.choice({"role": "assistant", "content": ""})])) if self.chat else b""

    def piece(self, text: str) -> bytes:
        return self.before + json.dumps(text, ensure_ascii=False).encode() + self.after

    def choices(self, frame: Choices) -> bytes:
        """The choices that an engine has made."""
        self.finished = True
        return event(self.chunk(frame.choices))

    def event(self, passed: Event) -> bytes:
        """Passed through unchanged, unless it must not reveal its model; the usage only if the client requested it."""
        self.passing = True
        if passed.usage and not self.include_usage:
            return b""
        match = DATA.search(passed.data) if self.blind else None
        return b"data: " + self.undisclosed(match[1]) + b"\n\n" if match else passed.data

    def undisclosed(self, passed: bytes) -> bytes:
        """An upstream's object with the model and fingerprint that this rendering gives."""
        content = json.loads(passed)  # unlike pydantic's, it takes halves of surrogate pairs
        content |= {name: self.head[name] for name in ("model", "system_fingerprint")}
        return json.dumps(content).encode()

    def last(self, frame: Done) -> bytes:
        """Finish reason, usage if requested, and [DONE]; an upstream has sent the first two already, choices the first."""
        if self.passing:
            return END
        frames = b"" if self.finished else event(self.chunk([self.choice({}, reason=frame.finish_reason)]))
        if self.include_usage:
            frames += event(self.chunk([], usage(frame)))
        return frames + END

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"


class GenerateRendering:
    """/generate: {"response", "id", "model", "usage"}."""

    def __init__(self, identifier: str, model: str) -> None:
        self.identifier = identifier
        self.model = model

    def whole(self, frame: Done) -> bytes:
        return to_json(self.body(frame.text, frame))

    def first(self) -> bytes:
        return b""

    def piece(self, text: str) -> bytes:
        return event({"response": text})

    def choices(self, frame: Choices) -> bytes:
        """Its text, in the format of /generate."""
        return self.piece(frame.text) if frame.text else b""

    def event(self, passed: Event) -> bytes:
        """Its text, in the format of /generate."""
        return self.piece(passed.text) if passed.text else b""

    def last(self, frame: Done) -> bytes:
        return event(self.body("", frame)) + END

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def body(self, text: str, frame: Done) -> dict[str, object]:
        return {"response": text, "id": self.identifier, "model": self.model, "usage": usage(frame)}


class EmbeddingRendering(GenerateRendering):
    """/v1/embeddings: the engine provides the list `data`, this adds the rest of the body. There are no streams."""

    def whole(self, frame: Done) -> bytes:
        if frame.passed is not None:
            return frame.passed.encode()
        used = {"prompt_tokens": frame.prompt_tokens, "total_tokens": frame.prompt_tokens}
        around = json.dumps({"object": "list", "model": self.model, "usage": used})
        return f'{around[:-1]}, "data": {frame.text}}}'.encode()
