"""A chat completion whose response contains the passages that it cites, in the field `documents`."""

import json

from llmserve.api.responses import OpenAiRendering, event
from llmserve.documents.grounding import Grounding
from llmserve.protocol import Choices, Done, Event


class GroundedRendering(OpenAiRendering):
    """`documents` is in the body, or in a chunk of its own before the end of a stream."""

    def __init__(
        self,
        identifier: str,
        model: str,
        revision: str,
        include_usage: bool,
        blind: bool,
        grounding: Grounding,
    ) -> None:
        super().__init__(True, identifier, model, revision, include_usage, blind)
        self.grounding = grounding
        self.text: list[str] = []

    def whole(self, frame: Done) -> bytes:
        body = json.loads(super().whole(frame)) | {"documents": self.grounding.report(frame.text)}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    def piece(self, text: str) -> bytes:
        self.text.append(text)
        return super().piece(text)

    def choices(self, frame: Choices) -> bytes:
        self.text.append(frame.text)
        return super().choices(frame)

    def event(self, passed: Event) -> bytes:
        self.text.append(passed.text)
        return super().event(passed)

    def last(self, frame: Done) -> bytes:
        """The passages come before the finish reason from our engines, and after the one from an upstream."""
        report = {"documents": self.grounding.report("".join(self.text))}
        return event(self.chunk([]) | report) + super().last(frame)
