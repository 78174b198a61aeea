"""A causal language model in this process: weights, tokenizer, chat template and text; shared by the drivers that run
one.
"""

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from typing import Any

# Must precede the imports.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from llmcore import quantization
from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.engine import next_token, tools
from llmserve.engine.masked_text import MaskedText
from llmserve.engine.next_token import Grammars, NextToken
from llmserve.engine.server import Finish
from llmserve.engine.stop_strings import StopStrings
from llmserve.engine.tools import CallReader, Tools, for_template
from llmserve.engine.unsupported_models import refuse_without_bitsandbytes
from llmserve.protocol import Generate
from llmserve.settings import LocalModel

type Chances = list[
    tuple[int, float]
]  # tokens with their log probabilities: the chosen one, then the likeliest
log = logging.getLogger("llmserve.model")
NO_TOKEN = -1  # an id, where none ends the answer
# Run once before READY.
PROBE = Generate(id=0, stream=False, max_tokens=1, clip=True, prompt="a", temperature=0)


class Detokenizer:
    """Token ids to text, piece by piece, without splitting characters."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` converts ids to text."""
        self.decode = decode
        self.ids: list[int] = []
        self.start = 0  # decoding starts here: the last emitted piece is the context for spaces
        self.end = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final now."""
        self.ids.append(token)
        text = self.pending()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def pending(self) -> str:
        """Text of the tokens that are not emitted yet."""
        before = self.decode(self.ids[self.start : self.end])
        return self.decode(self.ids[self.start :])[len(before) :]


class Answer:
    """One answer as it grows: takes tokens, and emits text that cannot become part of a stop string any more."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        ends: Collection[int],
        emit: Callable[[str], None],
        tools: Tools | None,
    ) -> None:
        """`ends`: tokens that end the answer, and are no part of its text. `emit` is called in the thread that pushes tokens.
        `tools`: functions that the answer may call.
        """
        self.detokenizer = detokenizer
        self.stops = stops
        self.ends = ends
        self.reader = CallReader(tools, emit) if tools else None
        self.emit = self.reader.push if self.reader else emit
        self.tokens: list[int] = []  # all so far
        self.change: NextToken | None = None  # what the request's fields do
        self.chances: list[Chances] = []  # of each token, where they are wanted

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, or the fields of the request failed."""
        return self.stops.stopped or bool(self.change and self.change.trouble)

    @property
    def complete(self) -> bool:
        """Whether a stop string or one of `ends` was found."""
        return self.stopped or (bool(self.tokens) and self.tokens[-1] in self.ends)

    def push(self, token: int) -> None:
        if self.change and self.change.logprobs is not None and not self.change.trouble:
            self.chances.append(self.change.chances(len(self.tokens), token))
        self.tokens.append(token)
        self.show("" if token in self.ends else self.detokenizer.push(token))

    def end(self) -> None:
        """Emit the rest after the last token."""
        self.show(self.detokenizer.pending())
        if rest := self.stops.flush():
            self.emit(rest)
        if self.reader:
            self.reader.end()

    def show(self, text: str) -> None:
        """Emit the text that is final; even empty text is emitted, as a sign of progress."""
        self.emit(self.stops.push(text))


class LanguageModel:
    """A causal language model from a directory of safetensors."""

    def __init__(self, settings: LocalModel, revision: str, device: str = "cpu") -> None:
        """Load it. `revision`: the result of verify_model."""
        self.revision = f"{revision}-{settings.dtype}"
        if settings.quantization != "none":
            self.revision += f"-{settings.quantization}"
        torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
        disable_progress_bar()
        directory = str(settings.path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        dtype = getattr(torch, settings.dtype)
        refuse_without_bitsandbytes(settings.quantization)
        refuse_without_gpu(device)
        how = quantization.loading(settings.quantization, dtype, settings.path, device)
        if device != "cpu":
            how["device_map"] = {"": device}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **how,
        ).eval()
        sizes = quantization.bytes_by_dtype(self.model)
        quantization.refuse_hardly_quantized(settings.quantization, sizes, settings.path)
        if settings.merged:
            from llmcore.adapters import merged

            self.model = merged(self.model, settings.merged.path)
        log.info("weights loaded", extra={"fields": {"quantization": settings.quantization, "bytes": sizes}})
        self.context = min(settings.context, self.model.config.max_position_embeddings)
        defaults = self.model.generation_config
        self.temperature = first_set(settings.temperature, defaults.temperature)
        self.top_p = first_set(settings.top_p, defaults.top_p)
        own = defaults.eos_token_id
        ends = own if isinstance(own, list) else [own]
        self.ends = sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})
        self.size = int(self.model.get_output_embeddings().weight.shape[0])
        grammars = next_token.BY_GRAMMAR if isinstance(self.tokenizer, PreTrainedTokenizerFast) else ()
        self.fields = (*next_token.FIELDS, *next_token.ENDS, *grammars, "n")
        if grammars and self.tokenizer.chat_template:
            self.fields += tools.FIELDS

    @cached_property
    def grammars(self) -> Grammars:
        """Created when the first request needs it."""
        return Grammars(self.tokenizer, self.size, self.ends)

    def ends_of(self, request: Generate) -> list[int]:
        """The tokens that end the answer to `request`; raises ApiError 400 for tokens that the model does not have."""
        next_token.refuse_foreign_tokens(request, self.size)
        own = [] if request.extra.get("ignore_eos") else self.ends
        return sorted({*own, *request.extra.get("stop_token_ids", ())}) or [NO_TOKEN]

    def next_token(self, request: Generate, prompt: list[int]) -> NextToken | None:
        """The changes that the request's fields make to logits, or None. Raises ApiError 400."""
        if not request.extra.keys() & {*next_token.FIELDS, *next_token.BY_GRAMMAR, "tools"}:
            return None
        offered = Tools.of(request)
        fields = [name for name in next_token.BY_GRAMMAR if name in request.extra] + ["tools"] * bool(offered)
        if len(fields) > 1:
            raise ApiError(400, "invalid_value", f"set {' or '.join(map(repr, fields))}, not both", fields[0])
        matcher = None
        if offered and offered.forced:
            matcher = self.grammars.matcher(offered.grammar(), "tools")
        elif fields and not offered:
            matcher = self.grammars.matcher(next_token.grammar_of(request, fields[0]), fields[0])
        if matcher is None and not request.extra.keys() & {*next_token.FIELDS}:
            return None  # tools that the model may leave alone
        temperature, _ = self.sampling(request)
        return NextToken(request, prompt, self.ends_of(request), self.size, temperature, matcher)

    def answer(self, request: Generate, emit: Callable[[str], None]) -> Answer:
        """The receiver of the tokens for `request`."""
        stops, offered = StopStrings(request.stop), Tools.of(request)
        return Answer(Detokenizer(self.decode), stops, self.ends_of(request), emit, offered)

    def decode(self, ids: list[int]) -> str:
        """Text of the tokens, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def sampling(self, request: Generate) -> tuple[float, float]:
        """Temperature and top_p: requested, configured, or the model's own, in this order."""
        temperature = self.temperature if request.temperature is None else request.temperature
        return temperature, self.top_p if request.top_p is None else request.top_p

    def finish(self, answer: Answer, prompt_tokens: int) -> Finish:
        """How the complete `answer` ended; raises an error if it violates the request's fields."""
        if answer.change and answer.change.trouble:
            raise answer.change.trouble
        finish = Finish("stop" if answer.complete else "length", prompt_tokens, len(answer.tokens))
        finish.chances = [
            [(self.decode_one(token), chance) for token, chance in each] for each in answer.chances
        ]
        if answer.reader:
            finish.calls = answer.reader.calls
        return finish

    def decode_one(self, token: int) -> str:
        """Text of one token; a part of a character is a replacement character."""
        return str(self.tokenizer.decode([token]))

    def encode(self, request: Generate) -> list[int]:
        """The prompt's tokens; raises ApiError for messages that the chat template rejects."""
        if request.messages is None or (request.prompt is not None and not self.tokenizer.chat_template):
            return list(self.tokenizer(request.prompt or "").input_ids)
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, "no_chat_template", "this model has no chat template: use /v1/completions", "messages"
            )
        template = str(self.tokenizer.chat_template)
        masked = MaskedText(self.control_tokens, request.messages, request.extra.get("tools"))
        offered = Tools.of(
            replace(request, extra=request.extra | {"tools": masked.tools}) if masked.tools else request
        )
        messages, described = for_template(template, masked.messages, offered)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=described, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ApiError(
                400, "invalid_value", f"the model's chat template rejects the messages: {error}", "messages"
            ) from None
        return [token for piece, is_text in masked.pieces(text) for token in self.ids(piece, is_text)]

    def ids(self, text: str, is_text: bool) -> list[int]:
        """The tokens of a piece of a prompt. `is_text`: control tokens in it are treated as text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_text).input_ids)

    @cached_property
    def control_tokens(self) -> list[str]:
        """The texts that the tokenizer turns into control tokens."""
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]


def refuse_without_gpu(device: str) -> None:
    """Raise ConfigError if the GPU is configured and torch sees none, instead of computing on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is 'cuda', but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: check NVIDIA's driver "
            f"with nvidia-smi, and check that the release is for the environment serving-cuda; or set device 'cpu'"
        )


def first_set(*values: float | None) -> float:
    """The first value that is not None, or 1.0."""
    return next((value for value in values if value is not None), 1.0)
