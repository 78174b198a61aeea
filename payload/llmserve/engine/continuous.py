"""The batching engine: continuous batching in transformers, through its public manager."""

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
from llmserve.engine import batched_logits, paged_attention
from llmserve.engine.language_model import PROBE, LanguageModel
from llmserve.engine.server import Finish, token_budget
from llmserve.engine.unsupported_models import refuse_latent_attention
from llmserve.protocol import Generate
from llmserve.settings import ContinuousModel

log = logging.getLogger("llmserve.continuous")
# It has its own handler, and logs the token ids of prompts. `broken` reports what ended a manager.
logging.getLogger("ContinuousBatchingLogger").disabled = True

FLUSH_SECONDS = 5.0  # for running answers when the engine stops
HARD_SECONDS = 2.0  # for the running step after that
WATCH_SECONDS = 0.1


class Batch:
    """One of transformers' managers, its thread, and the queues of its outputs.

    The manager never forgets the handler of a cancelled request, and queues outputs for requests without a handler
    forever: `forget` cleans up both.
    """

    def __init__(self, model: Any, generation: GenerationConfig, batching: ContinuousBatchingConfig) -> None:
        """Start it. Errors in the size of the cache are raised here, not in its thread."""
        self.manager: Any = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self.waiting: dict[str, asyncio.Queue[Any]] = {}
        self.stopping = False
        self.manager.warmup()
        self.manager.start()

    def ask(self, name: str, prompt: list[int], **how: Any) -> asyncio.Queue[Any]:
        """Queue a request; returns the queue of its outputs. Raises ApiError 503 if the manager does not accept it."""
        outputs = self.waiting[name] = asyncio.Queue()
        # Before add_request, because the answer may be complete before that returns.
        self.manager.register_result_handler(name, self.deliver)
        if self.manager.add_request(prompt, request_id=name, **how) is None:
            self.forget(name)
            raise unavailable("engine_unavailable", "the engine accepts no requests at present: retry", 2)
        return outputs

    def deliver(self, output: Any) -> None:
        """Called in the event loop for each output."""
        if outputs := self.waiting.get(output.request_id):
            outputs.put_nowait(output)

    def cancel(self, name: str) -> None:
        """Cancel `name`; its slot is free after the current step."""
        self.manager.cancel_request(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Remove all traces of `name` from the manager."""
        self.waiting.pop(name, None)
        router = self.manager.output_router
        router.result_handlers.pop(name, None)
        while not router.output_queue.empty():  # outputs of a step for requests cancelled meanwhile
            router.output_queue.get_nowait()

    def stop(self) -> None:
        """Stop the thread once everything is answered, or after FLUSH_SECONDS, failing the rest. Blocks."""
        self.stopping = True
        self.manager.stop(block=True, timeout=FLUSH_SECONDS)
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=HARD_SECONDS, hard_stop=True)


class ContinuousDriver:
    """Requests join and leave the batch at each step.

    Greedy or sampled is a property of a whole manager, so there are two, each with its own cache: one takes the
    likeliest token, exactly as `generate` does, and one samples.
    """

    name = "continuous"
    dimensions = 0
    adapters: Mapping[str, str] = {}  # not supported by the public manager
    prompts: Mapping[str, str] = {}
    least_similarity: Mapping[str, float] = {}
    template = ""  # part of the model's directory, so the revision covers it

    def __init__(self, settings: ContinuousModel, revision: str) -> None:
        """Load the model, and generate one token with each manager. `revision`: the result of verify_model."""
        refuse_latent_attention(settings.path)
        paged_attention.use()
        self.language = LanguageModel(settings, revision)
        batched_logits.use(self.language.model)
        self.revision, self.context = self.language.revision, self.language.context
        self.fields: Sequence[str] = (
            self.language.fields
        )  # no seed: all requests of a batch share one generator
        self.slots = settings.slots
        self.tokens = settings.cache_tokens
        self.numbers = count()
        self.tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        batching = ContinuousBatchingConfig(
            page_size=settings.page_tokens,
            # Without explicit numbers it takes a share of the host's memory, regardless of the unit's limit.
            num_blocks=math.ceil(settings.cache_tokens / settings.page_tokens),
            max_batch_tokens=settings.batch_tokens,
            max_requests_per_batch=settings.slots,
            allow_block_sharing=settings.share_prefixes,
            max_queue_size=0,  # a full queue would block the event loop; the gateway's admission limits requests
            per_request_processors=True,
        )
        ends = {"eos_token_id": self.language.ends, "pad_token_id": self.language.ends[0]}
        greedy = GenerationConfig(do_sample=False, **ends)
        # A request can only set parameters whose value here is not a no-op.
        drawn = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.5, top_k=0, **ends)
        self.batches: list[Batch] = []
        try:
            for generation in greedy, drawn:
                self.batches.append(Batch(self.language.model, generation, replace(batching)))
            for temperature in 0.0, 1.0:
                asyncio.run(self.generate(replace(PROBE, temperature=temperature), lambda _: None))
        except BaseException:
            self.stop()  # otherwise its threads keep the process alive
            raise

    def kv_used(self) -> None:
        """None: the public manager does not report it."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`. When cancelled it returns at once, and the model drops the request at the next step."""
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self.tokenizer_thread, self.language.encode, request)
        change = await loop.run_in_executor(self.tokenizer_thread, self.language.next_token, request, prompt)
        how: dict[str, Any] = {
            "max_new_tokens": token_budget(request, len(prompt), self.context),
            "eos_token_id": self.language.ends_of(request),
            "streaming": True,  # even for a whole answer, because each output is a sign of progress
        }
        temperature, top_p = self.language.sampling(request)
        greedy, drawn = self.batches
        batch = greedy if temperature == 0 else drawn
        if batch is drawn:
            how |= {"temperature": float(temperature), "top_p": float(top_p)}
        if change:
            how[batched_logits.KEY] = change
        answer = self.language.answer(request, emit)
        answer.change = change
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
        """Wait until a manager's thread has died: it cannot be restarted, and its requests would wait forever."""
        while True:
            for batch in self.batches:
                if not batch.manager.is_running() and not batch.stopping:
                    fatal = batch.manager.background_thread_status.fatal_error
                    log.error("continuous batching has ended", exc_info=fatal)
                    return f"continuous batching has ended with {type(fatal).__name__}"
            await asyncio.sleep(WATCH_SECONDS)

    async def close(self) -> None:
        """Finish running answers for a while, then stop."""
        await asyncio.gather(*(asyncio.to_thread(batch.stop) for batch in self.batches))

    def stop(self) -> None:
        """As `close`, for one manager after the other; blocks."""
        for batch in self.batches:
            batch.stop()
