"""The reference engine: the `generate` method of transformers, one request at a time, in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llmserve.engine.language_model import PROBE, Answer, LanguageModel
from llmserve.engine.next_token import NextToken
from llmserve.engine.server import Finish, Steady, token_budget
from llmserve.engine.unsupported_models import refuse_adapters_beside_latents
from llmserve.protocol import Generate
from llmserve.settings import NaiveModel


class Steps(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """Receives every token of one request, and decides when to stop. Runs in the model's thread."""

    def __init__(self, answer: Answer) -> None:
        """The `emit` of `answer` must be callable from any thread."""
        self.answer = answer
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.answer.push(token)

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self.answer.end()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called by `generate` after each step; returns for each row of the batch whether it is done."""
        ended = self.answer.stopped or self.cancelled.is_set()
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)


class OneRow(LogitsProcessor):  # type: ignore[misc]
    """Has the fields of the one request change its logits."""

    def __init__(self, change: NextToken, prompt_tokens: int) -> None:
        self.change, self.prompt_tokens = change, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate`, with all ids of the row so far."""
        return self.change(input_ids[0, self.prompt_tokens :].tolist(), scores[0])[None]


class NaiveDriver(Steady):
    """Runs one `generate` after the other."""

    name = "naive"
    slots = 1
    dimensions = 0
    tokens = 0
    template = ""  # part of the model's directory, so the revision covers it

    def __init__(
        self, settings: NaiveModel, revision: str, adapters: Mapping[str, str] | None = None
    ) -> None:
        """Load the model, and generate one token. `revision` and the values of `adapters`: results of verify_model."""
        if settings.adapters:
            refuse_adapters_beside_latents(settings.path)
        self.language = LanguageModel(settings, revision, settings.device)
        self.revision, self.context = self.language.revision, self.language.context
        self.fields: Sequence[str] = ("seed", *self.language.fields)
        self.adapters: Mapping[str, str] = {
            name: f"{self.revision}+{each}" for name, each in (adapters or {}).items()
        }
        self.choose: Callable[[str], AbstractContextManager[Any]] = nullcontext
        if settings.adapters:
            from llmserve.engine.adapters import Switchable

            self.choose = Switchable(self.language.model, settings.adapters).chosen
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.run(PROBE, Steps(self.language.answer(PROBE, lambda _: None)))

    def kv_used(self) -> None:
        """None: `generate` allocates a cache per request, as large as it needs."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`; when cancelled, this returns only once the model has stopped, within one step."""
        loop = asyncio.get_running_loop()

        def emit_in_loop(text: str) -> None:
            loop.call_soon_threadsafe(emit, text)

        steps = Steps(self.language.answer(request, emit_in_loop))
        work = loop.run_in_executor(self.thread, self.run, request, steps)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            steps.cancelled.set()
            await asyncio.wait([work])
            raise

    def run(self, request: Generate, steps: Steps) -> Finish:
        """One `generate` call, in the model's thread."""
        prompt = self.language.encode(request)
        budget = token_budget(request, len(prompt), self.context)
        if request.seed is not None:
            torch.manual_seed(request.seed)
        else:
            torch.seed()
        ids = torch.tensor([prompt], device=self.language.model.device)
        steps.answer.change = change = self.language.next_token(request, prompt)
        with self.choose(request.adapter):
            self.language.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.generation(request, budget),
                logits_processor=LogitsProcessorList([OneRow(change, len(prompt))] if change else []),
                streamer=steps,
                stopping_criteria=[steps],
            )
        return self.language.finish(steps.answer, len(prompt))

    def generation(self, request: Generate, budget: int) -> GenerationConfig:
        """Greedy at temperature 0; otherwise sampling from the whole vocabulary, as OpenAI does."""
        ends = self.language.ends_of(request)
        common = {"max_new_tokens": budget, "eos_token_id": ends, "pad_token_id": self.language.ends[0]}
        temperature, top_p = self.language.sampling(request)
        if temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, **common)
