"""Functions that a model may call: how a prompt presents them, and how an answer contains the calls.

Only Hermes' form is supported, with which Qwen and SmolLM were trained: <tool_call>{"name": …, "arguments": …}</tool_call>. vLLM
supports others.
"""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmserve.api.errors import ApiError
from llmserve.api.requests import bad_value, shorten
from llmserve.engine.stop_strings import StopStrings
from llmserve.protocol import Generate

FIELDS = ("parallel_tool_calls", "tool_choice", "tools")
BEGIN, END = "<tool_call>", "</tool_call>"
CALL = re.compile(rf"{BEGIN}\s*(\{{.*?\}})\s*{END}", re.DOTALL)
# As the grammar of `grammar` writes it, and perhaps cut short.
FORCED = re.compile(r'\{"name":"([^"]+)","arguments":(.*)', re.DOTALL)
COMPACT: dict[str, Any] = {"x-guidance": {"whitespace_flexible": False}}
IN_WORDS = (
    "You can call functions. Each line describes one:\n{functions}\n"
    f'To call one, answer {BEGIN}{{{{"name": NAME, "arguments": ARGUMENTS}}}}{END} and nothing else.'
)


class Shape(BaseModel):
    """Base: exactly the listed fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Function(Shape):
    """A function as described by the client. `parameters`: a JSON schema; without one it has no parameters. `strict` is always
    on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


OFFERED = TypeAdapter(list[Tool])


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request. `forced`: functions of which the answer must call one; empty if the model is free to choose."""

    offered: list[Function]
    forced: list[Function]
    parallel: bool

    @classmethod
    def of(cls, request: Generate) -> "Tools | None":
        """None if the model may not call any; raises ApiError 400."""
        try:
            offered = [tool.function for tool in OFFERED.validate_python(request.extra.get("tools", []))]
        except ValidationError as error:
            raise bad_value("tools", error) from None
        match request.extra.get("tool_choice", "auto"):
            case "none" | "auto" as choice:
                forced = []
            case "required" as choice:
                forced = offered
            case {"type": "function", "function": {"name": choice}}:
                forced = [each for each in offered if each.name == choice]
            case choice:
                forced = []
        if not forced and choice not in ("none", "auto"):
            message = f"'tool_choice' is {shorten(choice)}: send 'none', 'auto', 'required' or a function in 'tools'"
            raise ApiError(400, "invalid_value", message, "tool_choice")
        if choice == "none" or not offered:
            return None
        return cls(offered, forced, request.extra.get("parallel_tool_calls", True))

    def grammar(self) -> str:
        """Lark rules for a call of a forced function: `call` and its parts."""
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(self.forced)))}"]
        for number, function in enumerate(self.forced):
            schema = (function.parameters or {"type": "object", "additionalProperties": False}) | COMPACT
            before = json.dumps(f'{{"name":"{function.name}","arguments":')
            rules += [
                f'call_{number}: {before} arguments_{number} "}}"',
                f"arguments_{number}: %json {json.dumps(schema)}",
            ]
        return "\n".join(["start: call", *rules])


def for_template(
    template: str, messages: list[dict[str, Any]], tools: Tools | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and functions for a chat template: one without support for `tools` gets everything in the contents of messages.

    Raises ApiError 400 if the answer's calls would be in an unsupported form.
    """
    described = [
        {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"strict"})}
        for each in (tools.offered if tools else ())
    ]
    if "tools" not in template:
        return in_words(messages, described), None
    if tools and not tools.forced and BEGIN not in template:
        message = f"this model was trained on another form of calls than {BEGIN}: set it to 'required', or to a function"
        raise ApiError(400, "invalid_value", message, "tool_choice")
    return [with_objects(message) for message in messages], described or None


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as objects, since templates convert them to JSON themselves."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [{**call, "function": call_of(call)} for call in message["tool_calls"]]}


def call_of(call: Any) -> dict[str, Any]:
    """Name and arguments of a call in a message; raises ApiError 400."""
    try:
        function = call["function"]
        return {"name": str(function["name"]), "arguments": json.loads(function["arguments"])}
    except (KeyError, TypeError, ValueError, RecursionError):
        message = "a call in 'tool_calls' lacks a function with a name and JSON arguments: send it as it was received"
        raise ApiError(400, "invalid_value", message, "messages") from None


def in_words(messages: list[dict[str, Any]], described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with functions, calls and results in their contents."""
    conversation: list[dict[str, Any]] = []
    for message in messages:
        text = message["content"] or ""
        if message["role"] == "tool":
            result = f"<tool_response>{text}</tool_response>"
            if conversation and conversation[-1].get("results"):
                conversation[-1]["content"] += f"\n{result}"
            else:
                conversation.append({"role": "user", "content": result, "results": True})
            continue
        calls = [
            f"{BEGIN}{json.dumps(call_of(call), ensure_ascii=False)}{END}"
            for call in message.get("tool_calls", ())
        ]
        conversation.append(
            {"role": message["role"], "content": "\n".join([*([text] if text else []), *calls])}
        )
    if described:
        lines = "\n".join(json.dumps(each["function"], ensure_ascii=False) for each in described)
        intro = IN_WORDS.format(functions=lines)
        if conversation[0]["role"] == "system":
            conversation[0]["content"] += f"\n\n{intro}"
        else:
            conversation.insert(0, {"role": "system", "content": intro})
    return conversation


class CallReader:
    """Receives the text of an answer, emits everything but calls, and provides the calls at the end."""

    def __init__(self, tools: Tools, emit: Callable[[str], None]) -> None:
        self.tools = tools
        self.emit = emit
        self.before = StopStrings([BEGIN])
        self.rest = ""  # a call, and all that follows it
        self.calls: list[dict[str, Any]] = []  # as in OpenAI's messages

    def push(self, text: str) -> None:
        """Add a piece; something is always emitted, as a sign of progress."""
        if self.tools.forced or self.before.stopped:
            self.rest += text
        else:
            self.emit(self.before.push(text))
            self.rest = self.before.after
            return
        self.emit("")

    def end(self) -> None:
        """Emit text that turned out not to be a call."""
        if self.tools.forced:
            if match := FORCED.match(self.rest):
                name, arguments = match.groups()
                whole = is_json(self.rest)
                self.calls.append(new_call(name, arguments[:-1] if whole else arguments))
            return
        for text in CALL.findall(self.rest):
            try:
                call = json.loads(text)
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                self.calls.append(new_call(str(call["name"]), arguments))
            except (ValueError, KeyError, TypeError, RecursionError):
                self.calls.clear()
                break
        if not self.tools.parallel:
            del self.calls[1:]
        if not self.calls:
            self.emit(self.before.flush() or self.rest)


def is_json(text: str) -> bool:
    """Whether a text is complete JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def new_call(name: str, arguments: str) -> dict[str, Any]:
    """A call in the format of OpenAI's messages."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
