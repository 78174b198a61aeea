"""Answers as clients get them: a whole body, or the frames of a stream. One class for each endpoint."""

import json
import secrets
import time
from typing import Protocol

from pydantic_core import to_json

from llmserve.api.errors import ApiError
from llmserve.protocol import Done, Event

END = b"data: [DONE]\n\n"


def usage(done: Done) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The end of a stream that broke; there is no [DONE] after it."""
    return b"data: " + error.body() + b"\n\n"


class Rendering(Protocol):
    """How an endpoint shows an answer."""

    def whole(self, done: Done) -> bytes:
        """Everything in one body."""

    def first(self) -> bytes:
        """What a stream says before the first piece."""

    def piece(self, text: str) -> bytes:
        """A piece of text as an event."""

    def event(self, passed: Event) -> bytes:
        """An upstream's event, which comes instead of our own pieces; its stream has no first()."""

    def last(self, done: Done) -> bytes:
        """What a stream says after the last piece, [DONE] included."""


class OpenAiRendering:
    """Chat completions and completions differ in a few names only."""

    def __init__(self, chat: bool, model: str, revision: str, include_usage: bool) -> None:
        """`chat`: messages instead of text."""
        self.chat = chat
        self.include_usage = include_usage
        self.passing = False
        self.head: dict[str, object] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{revision}",
        }
        self.before = self.after = b""

    def whole(self, done: Done) -> bytes:
        """Everything in one body; an upstream's is passed on as it is."""
        if done.passed is not None:
            return done.passed.encode()
        said: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": done.finish_reason}
        if self.chat:
            said["message"] = {"role": "assistant", "content": done.text, "refusal": None}
        else:
            said["text"] = done.text
        return to_json({**self.head, "choices": [said], "usage": usage(done)})

    def chunk(
        self, choices: list[dict[str, object]], used: dict[str, int] | None = None
    ) -> dict[str, object]:
        """One chunk of the stream."""
        content = {**self.head, "choices": choices}
        if self.chat:
            content["object"] = "chat.completion.chunk"
        if self.include_usage:
            content["usage"] = used
        return content

    def choice(self, delta: dict[str, str], text: str = "", reason: str | None = None) -> dict[str, object]:
        """The one choice of a chunk."""
        said: dict[str, object] = {"delta": delta} if self.chat else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def first(self) -> bytes:
        """The role, for chats; and the frame around each piece is built once."""
        mark = "\0"
        around = event(self.chunk([self.choice({"content": mark}, mark)]))
        self.before, self.after = around.split(b'"\\u0000"')
        return event(self.chunk([self.choice({"role": "assistant", "content": ""})])) if self.chat else b""

    def piece(self, text: str) -> bytes:
        """A piece of text as an event."""
        return self.before + json.dumps(text, ensure_ascii=False).encode() + self.after

    def event(self, passed: Event) -> bytes:
        """As it is; the one with the usage only if it was asked for."""
        self.passing = True
        return b"" if passed.usage and not self.include_usage else passed.data

    def last(self, done: Done) -> bytes:
        """Finish reason, usage if it was asked for, [DONE]; an upstream has said the first two itself."""
        if self.passing:
            return END
        frames = event(self.chunk([self.choice({}, reason=done.finish_reason)]))
        if self.include_usage:
            frames += event(self.chunk([], usage(done)))
        return frames + END


class GenerateRendering:
    """/generate: {"response", "model", "usage"}."""

    def __init__(self, model: str) -> None:
        """Which model answers."""
        self.model = model

    def whole(self, done: Done) -> bytes:
        """Everything in one body."""
        return to_json({"response": done.text, "model": self.model, "usage": usage(done)})

    def first(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, text: str) -> bytes:
        """A piece of text as an event."""
        return event({"response": text})

    def event(self, passed: Event) -> bytes:
        """Its text, in our own form."""
        return self.piece(passed.text) if passed.text else b""

    def last(self, done: Done) -> bytes:
        """Model and usage, then [DONE]."""
        return event({"response": "", "model": self.model, "usage": usage(done)}) + END


class EmbeddingRendering(GenerateRendering):
    """/v1/embeddings: the engine has made the list, only what is around it is added. It has no stream."""

    def whole(self, done: Done) -> bytes:
        """Everything in one body."""
        if done.passed is not None:
            return done.passed.encode()
        used = {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens}
        around = json.dumps({"object": "list", "model": self.model, "usage": used})
        return f'{around[:-1]}, "data": {done.text}}}'.encode()
