"""Answers that are more than one text, as the choices of OpenAI's API: several, or with log probabilities or calls."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from llmserve.engine.tools import FIELDS
from llmserve.protocol import Choices, Generate

MORE_THAN_TEXT = {"logprobs", "n", *FIELDS}
type Chances = Sequence[
    Sequence[tuple[str, float]]
]  # for each token: itself, then the likeliest, with log probabilities


class Choice:
    """One of the answers to a request."""

    def __init__(self, request: Generate, number: int) -> None:
        """`number`: from 0."""
        self.request, self.number = request, number
        self.chat = request.messages is not None
        self.pieces: list[str] = []

    def piece(self, text: str) -> Choices | None:
        """Add text; returns what a stream sends, if anything."""
        first = not self.pieces
        self.pieces.append(text)
        if not self.request.stream or not text:
            return None
        if not self.chat:
            return self.chunk({"text": text}, text)
        role = {"role": "assistant"} if first else {}
        return self.chunk({"delta": {**role, "content": text}}, text)

    def last(self, reason: str, calls: list[dict[str, Any]], chances: Chances) -> Choices:
        """The end of a stream, with the calls and the log probabilities of all of it."""
        if not self.chat:
            return self.chunk({"text": ""}, "", self.logprobs(chances), reason)
        delta: dict[str, Any] = {} if any(self.pieces) else {"role": "assistant"}
        if calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        return self.chunk({"delta": delta}, "", self.logprobs(chances), reason_of(reason, calls))

    def chunk(
        self, content: dict[str, Any], text: str, logprobs: object = None, reason: str | None = None
    ) -> Choices:
        """The frame with one choice of a chunk."""
        choice = {"index": self.number, **content, "logprobs": logprobs, "finish_reason": reason}
        return Choices(self.request.id, "" if self.number else text, [choice])

    def whole(self, reason: str, calls: list[dict[str, Any]], chances: Chances) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        text = "".join(self.pieces)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
            content = {"message": message | ({"tool_calls": calls} if calls else {})}
        return {
            "index": self.number,
            **content,
            "logprobs": self.logprobs(chances),
            "finish_reason": reason_of(reason, calls),
        }

    def logprobs(self, chances: Chances) -> dict[str, Any] | None:
        """In the format of the OpenAI endpoint; None if they are not requested."""
        if "logprobs" not in self.request.extra:
            return None
        if self.chat:
            content = [
                {**probability(*each[0]), "top_logprobs": [probability(*one) for one in each[1:]]}
                for each in chances
            ]
            return {"content": content, "refusal": None}
        texts = [each[0][0] for each in chances]
        return {
            "tokens": texts,
            "token_logprobs": [each[0][1] for each in chances],
            "top_logprobs": [dict(each[1:]) for each in chances],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
        }


def reason_of(reason: str, calls: list[dict[str, Any]]) -> str:
    """The finish reason of a choice; calls that were cut short ended by their length."""
    return "tool_calls" if calls and reason == "stop" else reason


def probability(token: str, chance: float) -> dict[str, Any]:
    """A token with its log probability; without its bytes if they are only part of a character."""
    partly = "\N{REPLACEMENT CHARACTER}" in token
    return {"token": token, "logprob": chance, "bytes": None if partly else list(token.encode())}
