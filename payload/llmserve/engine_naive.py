"""The reference engine: transformers' `generate`, one request at a time, in a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1"
)  # before the imports

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from llmserve.engine import Finish, token_budget
from llmserve.errors import ApiError
from llmserve.protocol import Generate
from llmserve.settings import NaiveModel
from llmserve.text import StopStrings


class Detokenizer:
    """Token ids to text, piece by piece, without showing half a character."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` turns ids into text."""
        self.decode = decode
        self.ids: list[int] = []
        self.start = 0  # decoding begins here: the last shown piece gives the context for blanks
        self.shown = 0

    def push(self, token: int) -> str:
        """Take a token, return the text that is certain now."""
        self.ids.append(token)
        text = self.pending()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return text

    def pending(self) -> str:
        """Text of the tokens not shown yet."""
        before = self.decode(self.ids[self.start : self.shown])
        return self.decode(self.ids[self.start :])[len(before) :]


class Steps(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """Sees every token of one request as it comes, and says when to stop. Runs in the model's thread."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, emit: Callable[[str], None]) -> None:
        """`emit` may be called from any thread."""
        self.detokenizer = detokenizer
        self.stops = stops
        self.emit = emit
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.show(self.detokenizer.push(token))

    def show(self, text: str) -> None:
        """Emit what no stop string can swallow any more, be it nothing."""
        self.emit(self.stops.push(text))

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self.show(self.detokenizer.pending())
        if rest := self.stops.flush():
            self.emit(rest)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called by `generate` after each step: done or not, for each row of the batch."""
        ended = self.stops.stopped or self.cancelled.is_set()
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)


class NaiveDriver:
    """A causal language model from a directory of safetensors."""

    name = "naive"
    slots = 1
    fields: Sequence[str] = ("seed",)
    dimensions = 0
    tokens = 0
    template = ""  # stands in the model's directory, so the revision covers it

    def __init__(self, settings: NaiveModel, revision: str) -> None:
        """Load, and say one token. `revision` is what verify_model returned for this directory."""
        self.revision = f"{revision}-{settings.dtype}"
        torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
        disable_progress_bar()
        directory = str(settings.path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, settings.dtype), local_files_only=True, use_safetensors=True
        ).eval()
        self.context = min(settings.context, self.model.config.max_position_embeddings)
        own = self.model.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [own]
        defaults = self.model.generation_config
        self.temperature = first_set(settings.temperature, defaults.temperature)
        self.top_p = first_set(settings.top_p, defaults.top_p)
        self.ends = sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        probe = Generate(id=0, stream=False, max_tokens=1, clip=True, prompt="a", temperature=0)
        self.run(probe, self.steps(probe, lambda _: None))

    def kv_used(self) -> None:
        """`generate` makes a cache for each request, as large as it needs."""

    def steps(self, request: Generate, emit: Callable[[str], None]) -> Steps:
        """The watcher of one request."""
        decode = self.tokenizer.decode
        return Steps(
            Detokenizer(lambda ids: str(decode(ids, skip_special_tokens=True))),
            StopStrings(request.stop),
            emit,
        )

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`; when cancelled, the model stops within a step, and only then does this return."""
        loop = asyncio.get_running_loop()

        def emit_in_loop(text: str) -> None:
            loop.call_soon_threadsafe(emit, text)

        steps = self.steps(request, emit_in_loop)
        work = loop.run_in_executor(self.thread, self.run, request, steps)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            steps.cancelled.set()
            await asyncio.wait([work])
            raise

    def run(self, request: Generate, steps: Steps) -> Finish:
        """One `generate` call, in the model's thread."""
        prompt = self.encode(request)
        budget = token_budget(request, len(prompt), self.context)
        if request.seed is not None:
            torch.manual_seed(request.seed)
        else:
            torch.seed()
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.generation(request, budget),
            streamer=steps,
            stopping_criteria=[steps],
        )
        said = steps.detokenizer.ids
        stopped = steps.stops.stopped or (bool(said) and said[-1] in self.ends)
        return Finish("stop" if stopped else "length", len(prompt), len(said))

    def generation(self, request: Generate, budget: int) -> GenerationConfig:
        """How to choose tokens: greedy at temperature 0, else over the whole vocabulary, as OpenAI does."""
        common = {"max_new_tokens": budget, "eos_token_id": self.ends, "pad_token_id": self.ends[0]}
        temperature = self.temperature if request.temperature is None else request.temperature
        top_p = self.top_p if request.top_p is None else request.top_p
        if temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, **common)

    def encode(self, request: Generate) -> list[int]:
        """The prompt's tokens; raises ApiError for messages that the chat template refuses."""
        if request.messages is None or (request.prompt is not None and not self.tokenizer.chat_template):
            return list(self.tokenizer(request.prompt or "").input_ids)
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, "no_chat_template", "this model has no chat template: use /v1/completions", "messages"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                request.messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ApiError(
                400, "invalid_value", f"the model's chat template refuses the messages: {error}", "messages"
            ) from None
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def first_set(*values: float | None) -> float:
    """The first value that is not None, or 1."""
    return next((value for value in values if value is not None), 1.0)
