"""Answers of OpenAI's Responses API: a chat answer as a response object, or as the events from which a client builds one.

The requests of this API are in `responses_api_request`. A response has output items: the reasoning, a message, the calls of
functions. They are built from pieces of the chat answer, and a whole answer is one piece.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llmserve.api.errors import ApiError, unavailable
from llmserve.api.responses import DATA, OpenAiRendering
from llmserve.protocol import Choices, Done, Event

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}  # by finish reason
type Object = dict[str, Any]


def frame(content: Object) -> bytes:
    """One server-sent event with its type. Halves of surrogate pairs, which upstreams may send, stay escaped."""
    return b"event: %b\ndata: %b\n\n" % (content["type"].encode(), json.dumps(content).encode())


def usage_of(used: Mapping[str, Any]) -> Object:
    """Token counts in this API's format. `used`: in the format of chat answers, where the details are optional."""
    prompt, answer = used["prompt_tokens"], used["completion_tokens"]
    cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoned = (used.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": prompt + answer,
    }


class ResponsesRendering:
    """A response object and its events. Each event has a `sequence_number`; there is no `[DONE]`."""

    def __init__(
        self, chat: OpenAiRendering, identifier: str, model: str, repeated: Mapping[str, object]
    ) -> None:
        """`chat` renders whole answers, which are then translated. `identifier`: the id for rating the answer.
        `repeated`: fields of the request.
        """
        self.chat = chat
        self.identifier = identifier
        self.begun = False
        self.events = 0
        self.output: list[Object] = []
        self.growing: object = None  # what the last item is: "reasoning", "message", or the index of a call
        self.usage: Mapping[str, Any] | None = None  # the upstream's
        self.response: Object = {
            "id": f"resp_{identifier}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **repeated,
        }

    def whole(self, last_frame: Done) -> bytes:
        """The response object; raises ApiError 503 if the upstream's answer does not have the format of OpenAI's API."""
        # Unlike pydantic's parser, json takes halves of surrogate pairs.
        answer = json.loads(self.chat.whole(last_frame))
        self.usage = answer.get("usage")
        choice = answer["choices"][0]
        for _ in self.translated(choice.get("message"), choice.get("logprobs")):
            pass
        for _ in self.ended(last_frame):
            pass
        return json.dumps(self.response).encode()

    def first(self) -> bytes:
        self.begun = True
        return self.lifecycle("created") + self.lifecycle("in_progress")

    def piece(self, text: str) -> bytes:
        return b"".join(self.more_text(text, []))

    def choices(self, piece: Choices) -> bytes:
        """A piece of an answer that is more than text, from one of our own engines."""
        return self.opened() + b"".join(self.of_chunk({"choices": piece.choices}))

    def event(self, passed: Event) -> bytes:
        """An upstream's chunk."""
        opening = self.opened()
        match = DATA.search(passed.data)
        return opening + b"".join(self.of_chunk(json.loads(match[1]))) if match else opening

    def last(self, last_frame: Done) -> bytes:
        """The end of the open item, and of the response."""
        frames = [self.opened(), *self.ended(last_frame)]
        return b"".join(frames) + self.lifecycle(
            "incomplete" if self.response["incomplete_details"] else "completed"
        )

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""
        self.response |= {"status": "failed", "error": {"code": error.code, "message": error.message}}
        return self.opened() + self.lifecycle("failed")

    def opened(self) -> bytes:
        """The first events, unless they have been sent."""
        return b"" if self.begun else self.first()

    def lifecycle(self, name: str) -> bytes:
        """An event with the current response object."""
        return self.typed(f"response.{name}", response=self.response)

    def typed(self, name: str, /, **content: object) -> bytes:
        self.events += 1
        return frame({"type": name, **content, "sequence_number": self.events - 1})

    def of_item(self, name: str, /, **content: object) -> bytes:
        """An event about the last item."""
        item = self.output[-1]
        return self.typed(name, item_id=item["id"], output_index=len(self.output) - 1, **content)

    def of_chunk(self, chunk: Mapping[str, Any]) -> Iterator[bytes]:
        """The events for one chunk of a chat answer."""
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            yield from self.translated(choice.get("delta"), choice.get("logprobs"))

    def translated(
        self, delta: Mapping[str, Any] | None, logprobs: Mapping[str, Any] | None
    ) -> Iterator[bytes]:
        """The events for a piece of a chat message; raises ApiError 503 if it does not have the format of OpenAI's API."""
        try:
            delta, logprobs = delta or {}, logprobs or {}
            yield from self.more_reasoning(delta.get("reasoning") or delta.get("reasoning_content") or "")
            yield from self.more_text(delta.get("content") or "", logprobs.get("content") or [])
            for number, call in enumerate(delta.get("tool_calls") or ()):
                yield from self.more_of_call(call.get("index", number), call)
        except (AttributeError, IndexError, KeyError, TypeError):
            message = "the model's engine gave no valid answer: retry, or tell the operator"
            raise unavailable("engine_failed", message) from None

    def more_reasoning(self, text: str) -> Iterator[bytes]:
        if not text:
            return
        if self.growing != "reasoning":
            yield from self.begin(
                "reasoning", {"type": "reasoning", "id": self.next_id("rs"), "summary": [], "content": []}
            )
            yield self.begin_part({"type": "reasoning_text", "text": ""})
        self.output[-1]["content"][0]["text"] += text
        yield self.of_item("response.reasoning_text.delta", content_index=0, delta=text)

    def more_text(self, text: str, logprobs: list[Object]) -> Iterator[bytes]:
        """Log probabilities may come after the text."""
        if text:
            if self.growing != "message":
                yield from self.begin_message()
            self.output[-1]["content"][0]["text"] += text
            yield self.of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        if logprobs and self.growing == "message":
            self.output[-1]["content"][0]["logprobs"] += logprobs

    def more_of_call(self, index: int, call: Mapping[str, Any]) -> Iterator[bytes]:
        """Chunks carry a call's id and name once, and its arguments in pieces; calls come one after the other."""
        called = call["function"]
        if self.growing != index:
            item = {
                "type": "function_call",
                "id": self.next_id("fc"),
                "call_id": call["id"],
                "name": called["name"],
            }
            yield from self.begin(index, {**item, "arguments": ""})
        if arguments := called.get("arguments") or "":
            self.output[-1]["arguments"] += arguments
            yield self.of_item("response.function_call_arguments.delta", delta=arguments)

    def begin_message(self) -> Iterator[bytes]:
        item = {"type": "message", "id": self.next_id("msg"), "role": "assistant", "content": []}
        yield from self.begin("message", item)
        yield self.begin_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def next_id(self, prefix: str) -> str:
        """The id of the next item."""
        return f"{prefix}_{self.identifier}_{len(self.output)}"

    def begin(self, growing: object, item: Object) -> Iterator[bytes]:
        """End the previous item, and begin this one."""
        yield from self.end_item("completed")
        self.growing = growing
        self.output.append({**item, "status": "in_progress"})
        yield self.typed(
            "response.output_item.added", output_index=len(self.output) - 1, item=self.output[-1]
        )

    def begin_part(self, part: Object) -> bytes:
        event = self.of_item("response.content_part.added", content_index=0, part=part)
        self.output[-1]["content"].append(part)
        return event

    def end_item(self, status: str) -> Iterator[bytes]:
        """The events that end the last item, if it is open."""
        if self.growing is None:
            return
        item = self.output[-1]
        if item["type"] == "function_call":
            arguments = item["arguments"]
            yield self.of_item(
                "response.function_call_arguments.done", name=item["name"], arguments=arguments
            )
        else:
            (part,) = item["content"]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self.of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self.of_item("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield self.typed("response.output_item.done", output_index=len(self.output) - 1, item=item)
        self.growing = None

    def ended(self, last_frame: Done) -> Iterator[bytes]:
        """Complete the response object, whose output is never empty; the events that end its last item."""
        if not self.output:
            yield from self.begin_message()
        reason = INCOMPLETE.get(last_frame.finish_reason)
        status = "incomplete" if reason else "completed"
        yield from self.end_item(status)
        counted = {
            "prompt_tokens": last_frame.prompt_tokens,
            "completion_tokens": last_frame.completion_tokens,
        }
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": reason} if reason else None,
            "output": self.output,
            "usage": usage_of({**(self.usage or {}), **counted}),
        }
