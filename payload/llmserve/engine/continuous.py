"""The batching engine: transformers' continuous batching, through its public manager."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from llmserve.api.errors import unavailable
from llmserve.engine import paged_attention
from llmserve.engine.language_model import PROBE, LanguageModel
from llmserve.engine.server import Finish, token_budget
from llmserve.engine.unsupported_models import refuse_latent_attention
from llmserve.protocol import Generate
from llmserve.settings import ContinuousModel

log = logging.getLogger("llmserve.continuous")
# It has a handler of its own, and shows the ids of a prompt's tokens. What ends a manager is told by `broken`.
logging.getLogger("ContinuousBatchingLogger").disabled = True

FLUSH_SECONDS = 5.0  # for the answers that run when the engine is told to stop
HARD_SECONDS = 2.0  # for the step that runs when that time is over
WATCH_SECONDS = 0.1


class Batch:
    """One of transformers' managers, the thread it runs, and who waits for its outputs.

    Its own table of handlers never forgets a request that was cancelled, and what it delivers for a request without a
    handler stays in a queue for ever: so `forget` cleans both.
    """

    def __init__(self, model: Any, generation: GenerationConfig, batching: ContinuousBatchingConfig) -> None:
        """Start it. What is wrong with the cache's size is raised here, not in its thread."""
        self.manager: Any = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self.waiting: dict[str, asyncio.Queue[Any]] = {}
        self.stopping = False
        self.manager.warmup()
        self.manager.start()

    def ask(self, name: str, prompt: list[int], **how: Any) -> asyncio.Queue[Any]:
        """Queue a request, and return where its outputs will come; raises ApiError 503 when nobody takes it."""
        outputs = self.waiting[name] = asyncio.Queue()
        # Before add_request: an answer may be finished before that returns.
        self.manager.register_result_handler(name, self.deliver)
        if self.manager.add_request(prompt, request_id=name, **how) is None:
            self.forget(name)
            raise unavailable("engine_unavailable", "the engine takes no requests now: ask again", 2)
        return outputs

    def deliver(self, output: Any) -> None:
        """Called in the event loop for each output."""
        if outputs := self.waiting.get(output.request_id):
            outputs.put_nowait(output)

    def cancel(self, name: str) -> None:
        """Nobody waits for `name` any more; its slot is free after the step that runs now."""
        self.manager.cancel_request(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Leave nothing behind for `name`."""
        self.waiting.pop(name, None)
        router = self.manager.output_router
        router.result_handlers.pop(name, None)
        while not router.output_queue.empty():  # a step's outputs for requests that were cancelled meanwhile
            router.output_queue.get_nowait()

    def stop(self) -> None:
        """End the thread: when all is answered, or after FLUSH_SECONDS with a failure for the rest. Blocks."""
        self.stopping = True
        self.manager.stop(block=True, timeout=FLUSH_SECONDS)
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=HARD_SECONDS, hard_stop=True)


class ContinuousDriver:
    """Requests join and leave the batch at each step.

    Choosing greedily is a matter of a whole manager, so there are two, each with a cache of its own: one takes the
    likeliest token, exactly as `generate` does, and one draws.
    """

    name = "continuous"
    dimensions = 0
    adapters: Mapping[str, str] = {}  # the public manager knows none
    template = ""  # stands in the model's directory, so the revision covers it
    fields: Sequence[str] = ()  # no seed: everybody in a batch draws from one generator

    def __init__(self, settings: ContinuousModel, revision: str) -> None:
        """Load, and say one token from each manager. `revision` is what verify_model returned for this directory."""
        refuse_latent_attention(settings.path)
        paged_attention.use()
        self.language = LanguageModel(settings, revision)
        self.revision, self.context = self.language.revision, self.language.context
        self.slots = settings.slots
        self.tokens = settings.cache_tokens
        self.numbers = count()
        self.tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        batching = ContinuousBatchingConfig(
            page_size=settings.page_tokens,
            # Without these numbers it takes a share of the host's memory, whatever the unit may use.
            num_blocks=math.ceil(settings.cache_tokens / settings.page_tokens),
            max_batch_tokens=settings.batch_tokens,
            max_requests_per_batch=settings.slots,
            allow_block_sharing=settings.share_prefixes,
            max_queue_size=0,  # a full queue would block the event loop; the gateway's admission bounds it
            per_request_processors=True,
        )
        ends = {"eos_token_id": self.language.ends, "pad_token_id": self.language.ends[0]}
        greedy = GenerationConfig(do_sample=False, **ends)
        # A request may only set what is not neutral here.
        drawn = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.5, top_k=0, **ends)
        self.batches: list[Batch] = []
        try:
            for generation in greedy, drawn:
                self.batches.append(Batch(self.language.model, generation, replace(batching)))
            for temperature in 0.0, 1.0:
                asyncio.run(self.generate(replace(PROBE, temperature=temperature), lambda _: None))
        except BaseException:
            self.stop()  # or its threads keep the process alive
            raise

    def kv_used(self) -> None:
        """Not known: the public manager does not say."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`. When cancelled it returns at once, and the model leaves it out from the next step on."""
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self.tokenizer_thread, self.language.encode, request)
        how: dict[str, Any] = {
            "max_new_tokens": token_budget(request, len(prompt), self.context),
            "eos_token_id": self.language.ends,
            "streaming": True,  # also for a whole answer: each output shows that the model makes steps
        }
        temperature, top_p = self.language.sampling(request)
        greedy, drawn = self.batches
        batch = greedy if temperature == 0 else drawn
        if batch is drawn:
            how |= {"temperature": float(temperature), "top_p": float(top_p)}
        answer = self.language.answer(request, emit)
        name = str(next(self.numbers))
        outputs = batch.ask(name, prompt, **how)
        finished = False
        try:
            while not (finished or answer.stopped):
                output = await outputs.get()
                finished = output.is_finished()
                for token in output.generated_tokens[len(answer.tokens) :]:
                    if not answer.stopped:
                        answer.push(token)
                if output.error is not None:
                    raise RuntimeError(output.error)
        finally:
            if finished:
                batch.forget(name)
            else:
                batch.cancel(name)
        answer.end()
        return self.language.finish(answer, len(prompt))

    async def broken(self) -> str:
        """Wait until a manager's thread has died: it never comes back, and its requests wait for nothing."""
        while True:
            for batch in self.batches:
                if not batch.manager.is_running() and not batch.stopping:
                    fatal = batch.manager.background_thread_status.fatal_error
                    log.error("continuous batching has ended", exc_info=fatal)
                    return f"continuous batching has ended with {type(fatal).__name__}"
            await asyncio.sleep(WATCH_SECONDS)

    async def close(self) -> None:
        """Answer what is running, for a while, then stop."""
        await asyncio.gather(*(asyncio.to_thread(batch.stop) for batch in self.batches))

    def stop(self) -> None:
        """The same, one after the other."""
        for batch in self.batches:
            batch.stop()
