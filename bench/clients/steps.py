"""Code shared by the clients' programs: the server, the question, and the outcome of each step.

A program reads the server from standard input, which keeps the key out of arguments and environment. The last line that it
prints is JSON: the client's versions, and a cell for each step.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "What is the capital of France?"
FOLLOW_UP = "And of Italy?"
TOOL_QUESTION = "How is the weather in Paris?"
TOKENS = 128  # of an answer; a call and an object need fewer, their white space included
FUNCTION: dict[str, Any] = {
    "name": "weather",
    "description": "Get the weather of a town.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["town"],
        "additionalProperties": False,
    },
}
TOOL: Any = {"type": "function", "function": FUNCTION}
CALLS: list[str] = []


@dataclass(frozen=True)
class Server:
    """`url` without a path."""

    url: str
    key: str
    model: str

    @property
    def base_url(self) -> str:
        """As OpenAI's clients name it."""
        return f"{self.url}/v1"


class Town(BaseModel):
    """A town's facts."""

    size: Literal["village", "town", "city"]
    capital: bool


def weather(town: Literal["Paris", "Rome"]) -> str:
    """Get the weather of a town."""
    CALLS.append(town)
    return f"It is 12 degrees in {town}."


Step = Callable[[Server], None]


def run(distributions: list[str], *steps: Step) -> None:
    """Run the steps and print their outcomes, by the functions' names."""
    server = Server(**json.load(sys.stdin))
    cells = {step.__name__: outcome(step, server) for step in steps}
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    print("\n" + json.dumps({"version": versions, "cells": cells}))


def outcome(step: Step, server: Server) -> str:
    """`yes`, or `no: ` with the code and field of the error, or its text where it has none."""
    CALLS.clear()
    try:
        step(server)
    except Exception as error:  # each client has its own types
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        named = [re.search(rf"""['"]{name}['"]: ['"]([^'"]+)""", text) for name in ("code", "param")]
        return "no: " + (" ".join(each[1] for each in named if each) or text.replace("\n", " ")[:200])
    return "yes"


def check_weather_loop(answer: str) -> None:
    """The function was called, and the model has answered after it."""
    assert CALLS, "the function was not called"
    assert answer, "no answer after the call"
