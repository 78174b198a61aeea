"""The engine for tests and for measuring the gateway: repeats the words of the prompt."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence

from llmserve.engine.server import Finish, Steady, token_budget
from llmserve.engine.stop_strings import StopStrings
from llmserve.protocol import Generate
from llmserve.settings import EchoModel

TOKEN = re.compile(r"\S+\s*|\s+")


class EchoDriver(Steady):
    """A token is a word and the whitespace after it. The same prompt always gets the same answer."""

    name = "echo"
    revision = "echo-1"
    fields: Sequence[str] = ("seed",)
    dimensions = 0
    template = ""
    adapters: Mapping[str, str] = {}

    def __init__(self, model: EchoModel) -> None:
        self.context = model.context
        self.slots = model.slots
        self.tokens = model.tokens
        self.token_seconds = model.token_seconds

    def kv_used(self) -> None:
        """None: there is no KV cache."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Emit the words of the prompt, or of the last message."""
        texts = (
            [request.prompt or ""] if request.messages is None else [m["content"] for m in request.messages]
        )
        prompt_tokens = sum(len(TOKEN.findall(text)) for text in texts)
        budget = token_budget(request, prompt_tokens, self.context)
        words = TOKEN.findall(texts[-1])
        stops = StopStrings(request.stop)
        count = 0
        for word in words[:budget]:
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            elif count % 64 == 63:
                await asyncio.sleep(0)  # let other tasks run, and cancellation take effect
            count += 1
            if piece := stops.push(word):
                emit(piece)
            if stops.stopped:
                break
        else:
            if rest := stops.flush():
                emit(rest)
        cut = count < len(words) and not stops.stopped
        return Finish("length" if cut else "stop", prompt_tokens, count)
