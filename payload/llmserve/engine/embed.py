"""The engine for embeddings: an encoder whose last layer is averaged over the tokens and normalized to length 1.

This is the pooling documented for the models of the family `sentence-transformers/all-MiniLM`; models with another
pooling are rejected.
"""

import asyncio
import json
import os
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Must precede the imports.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
from pydantic import BaseModel, ValidationError
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.engine.server import Finish, Steady
from llmserve.protocol import Generate
from llmserve.settings import EmbedModel

PURPOSES = ("query", "document")
BATCH = 32  # texts per pass; a cancellation waits for the current pass


class EmbedDriver(Steady):
    """An encoder from a directory of safetensors, one request at a time, in a thread of its own."""

    name = "embed"
    slots = 1
    tokens = 0
    template = ""
    adapters: Mapping[str, str] = {}
    fields: Sequence[str] = ()

    def __init__(self, settings: EmbedModel, revision: str) -> None:
        """Load the model, and embed one text. `revision`: the result of verify_model."""
        self.revision = f"{revision}-{settings.dtype}"
        torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
        disable_progress_bar()
        refuse_other_pooling(settings)
        directory = str(settings.path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self.model: Any = AutoModel.from_pretrained(
            directory,
            dtype=getattr(torch, settings.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
        self.context = min(settings.context, self.model.config.max_position_embeddings)
        self.dimensions = int(self.model.config.hidden_size)
        how = usage(settings.path)
        self.prompts = {name: text for name, text in (how.prompts or {}).items() if name in PURPOSES}
        self.least_similarity = how.least_similarity
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.run(Generate(0, False, 0, inputs=["a"]), threading.Event())

    def kv_used(self) -> None:
        """None: an encoder has no KV cache."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Emit the vectors of `request.inputs`; when cancelled, the model stops after the current batch."""
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
        """The list `data` of the response as JSON, and the total number of tokens. Runs in the model's thread; raises
        ApiError.
        """
        rows: list[list[int]] = self.tokenizer(request.inputs, truncation=False, padding=False).input_ids
        for at, row in enumerate(rows):
            if len(row) > self.context:
                raise ApiError(
                    400,
                    "context_length_exceeded",
                    f"text {at} has {len(row)} tokens, the limit is {self.context}: split it",
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
        """One vector of length 1 per row, shape (rows, dimensions), float32."""
        longest = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        means = (states * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(means, dim=1)


def refuse_other_pooling(settings: EmbedModel) -> None:
    """Raise ConfigError if the model's configuration specifies another pooling than the mean."""
    file = settings.path / "1_Pooling" / "config.json"
    if file.exists() and not json.loads(file.read_text()).get("pooling_mode_mean_tokens"):
        raise ConfigError(
            f"{file} specifies another pooling than the mean of the tokens, the only one of this engine: "
            "serve the model with vLLM, or use another one"
        )


class Usage(BaseModel):
    """How the model is used, from the file that sentence-transformers reads; `least_similarity` is ours (as in Hello)."""

    prompts: dict[str, str] | None = None
    least_similarity: dict[str, float] = {}


def usage(directory: Path) -> Usage:
    """Raises ConfigError."""
    file = directory / "config_sentence_transformers.json"
    if not file.exists():
        return Usage()
    try:
        return Usage.model_validate_json(file.read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"{file}: '{where}' is invalid: correct the model's release") from None


def as_data(vectors: list[Any], encoding: str) -> str:
    """OpenAI's list of embeddings: numbers, or base64 of little-endian float32."""
    data = []
    for index, vector in enumerate(vectors):
        value: object = None
        if vector is not None:
            value = (
                b64encode(vector.numpy().astype("<f4").tobytes()).decode()
                if encoding == "base64"
                else vector.tolist()
            )
        data.append({"object": "embedding", "index": index, "embedding": value})
    return json.dumps(data, separators=(",", ":"))
