"""The engine for embeddings: an encoder whose last layer is averaged over the tokens and brought to length 1.

So the models of the family `sentence-transformers/all-MiniLM` say in their cards; one that pools otherwise is refused.
"""

import asyncio
import json
import os
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1"
)  # before the imports

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.engine.server import Finish, Steady
from llmserve.protocol import Generate
from llmserve.settings import EmbedModel

BATCH = 32  # texts in one pass; a cancellation waits for one


class EmbedDriver(Steady):
    """An encoder from a directory of safetensors, one request at a time, in a thread of its own."""

    name = "embed"
    slots = 1
    tokens = 0
    template = ""
    adapters: Mapping[str, str] = {}
    fields: Sequence[str] = ()

    def __init__(self, settings: EmbedModel, revision: str) -> None:
        """Load, and embed a letter. `revision` is what verify_model returned for this directory."""
        self.revision = f"{revision}-{settings.dtype}"
        torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
        disable_progress_bar()
        refuse_other_pooling(settings)
        directory = str(settings.path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(
            directory, dtype=getattr(torch, settings.dtype), local_files_only=True, use_safetensors=True
        ).eval()
        self.context = min(settings.context, self.model.config.max_position_embeddings)
        self.dimensions = int(self.model.config.hidden_size)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.run(Generate(0, False, 0, inputs=["a"]), threading.Event())

    def kv_used(self) -> None:
        """An encoder keeps no keys and values."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Emit the vectors of `request.inputs`; when cancelled, the model stops after the batch at hand."""
        cancelled = threading.Event()
        loop = asyncio.get_running_loop()

        def step() -> None:
            loop.call_soon_threadsafe(emit, "")

        work = loop.run_in_executor(self.thread, self.run, request, cancelled, step)
        try:
            text, tokens = await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([work])
            raise
        emit(text)
        return Finish("stop", tokens, 0)

    def run(
        self, request: Generate, cancelled: threading.Event, step: Callable[[], None] = lambda: None
    ) -> tuple[str, int]:
        """The list `data` of the answer, as JSON, and the tokens of all texts; in the model's thread."""
        rows: list[list[int]] = self.tokenizer(request.inputs, truncation=False, padding=False).input_ids
        for at, row in enumerate(rows):
            if len(row) > self.context:
                raise ApiError(
                    400,
                    "context_length_exceeded",
                    f"text {at} has {len(row)} tokens, the model reads {self.context}: send it in parts",
                    "input",
                )
        vectors: list[Any] = [None] * len(rows)
        shortest_first = sorted(range(len(rows)), key=lambda at: len(rows[at]))
        for start in range(0, len(rows), BATCH):
            if cancelled.is_set():
                break
            batch = shortest_first[start : start + BATCH]
            for at, vector in zip(batch, self.embed([rows[at] for at in batch]), strict=True):
                vectors[at] = vector
            step()
        return as_data(vectors, request.encoding), sum(map(len, rows))

    def embed(self, rows: list[list[int]]) -> torch.Tensor:
        """One vector of length 1 a row, shape (rows, dimensions), float32."""
        longest = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        means = (states * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(means, dim=1)


def refuse_other_pooling(settings: EmbedModel) -> None:
    """Raise ConfigError for a model whose card says that its vectors are made otherwise."""
    file = settings.path / "1_Pooling" / "config.json"
    if file.exists() and not json.loads(file.read_text()).get("pooling_mode_mean_tokens"):
        raise ConfigError(
            f"{file} says that this model's vectors are no mean of its tokens, and this engine makes no others: "
            "serve it by vLLM, or take another model"
        )


def as_data(vectors: list[Any], encoding: str) -> str:
    """OpenAI's list of embeddings: numbers, or base64 of float32 with the lowest byte first."""
    data = []
    for index, vector in enumerate(vectors):
        said: object = None
        if vector is not None:
            said = (
                b64encode(vector.numpy().astype("<f4").tobytes()).decode()
                if encoding == "base64"
                else vector.tolist()
            )
        data.append({"object": "embedding", "index": index, "embedding": said})
    return json.dumps(data, separators=(",", ":"))
