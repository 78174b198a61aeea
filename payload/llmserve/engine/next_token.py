"""Applies the fields of a request to the logits of its next token: penalties, biases, sampling bounds, a grammar.

The fields have the same meaning as in vLLM: `repetition_penalty` applies to prompt and answer, the other penalties to the answer;
`top_k` and `min_p` limit sampling, so they do not affect a greedy answer. Grammars are llguidance's, whose limits bound the cost
of a hostile schema: it is first compiled on trial, and each mask has a limit of work.
"""

import json
import math
from typing import TYPE_CHECKING, Any

import numpy
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from llmserve.api.errors import ApiError
from llmserve.engine.trial import LIMITS, Trial
from llmserve.protocol import Generate

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ENDS = ("ignore_eos", "stop_token_ids")  # fields that say where the answer ends
BY_GRAMMAR = ("response_format", "structured_outputs")
FIELDS = (
    "allowed_token_ids", "frequency_penalty", "logit_bias", "logprobs", "min_p", "min_tokens", "presence_penalty",
    "repetition_penalty", "top_k", "top_logprobs",
)  # fmt: skip
IDS = ("allowed_token_ids", "logit_bias", "stop_token_ids")  # fields that name tokens
NO_BLANKS: "JsonCompileOptions" = {
    "whitespace_flexible": False
}  # else a small model may go on with blanks for ever


def refuse_foreign_tokens(request: Generate, size: int) -> None:
    """Raise ApiError 400 for ids that are not of the model's `size` tokens."""
    for name in IDS:
        for token in request.extra.get(name, ()):
            if int(token) >= size:
                message = f"'{name}' names the token {token}: the model has {size}"
                raise ApiError(400, "invalid_value", message, name)


def grammar_of(request: Generate, name: str) -> str:
    """The grammar that the field `name` asks for, in llguidance's format; raises ApiError 400."""
    shape = request.extra[name]
    try:
        match shape:
            case {"type": "json_object"} | {"json_object": True}:
                return str(LLMatcher.grammar_from_json_schema({"type": "object"}, NO_BLANKS))
            case {"type": "json_schema", "json_schema": {"schema": schema}} | {"json": schema}:
                return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), NO_BLANKS))
            case {"regex": str(regex)}:
                return str(LLMatcher.grammar_from_regex(regex))
            case {"choice": [*choices]} if choices and all(isinstance(each, str) for each in choices):
                return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices))))
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"'{name}' is not a JSON schema: {error}", name) from None
    shapes = "a 'type' of json_object, or json_schema with 'json_schema.schema'"
    if name == "structured_outputs":
        shapes = "one of 'json', 'json_object', 'regex' and 'choice'"
    raise ApiError(
        400,
        "invalid_value",
        f"'{name}' has a form that this model's engine does not support: send {shapes}",
        name,
    )


def logprobs_of(request: Generate) -> int | None:
    """How many of the most likely tokens the request wants at each position, besides the answer's own; None if no log
    probabilities.

    Raises ApiError 400.
    """
    logprobs, top = request.extra.get("logprobs"), request.extra.get("top_logprobs")
    if request.messages is None:
        if logprobs is True:
            raise ApiError(
                400, "invalid_value", "'logprobs' is true: it is a number at /v1/completions", "logprobs"
            )
        return logprobs
    if logprobs not in (None, True) or (top is not None and not logprobs):
        message = "set 'logprobs' to true, and 'top_logprobs' to the number of the likeliest tokens"
        raise ApiError(400, "invalid_value", message, "logprobs")
    return top or 0 if logprobs else None


class Grammars:
    """Creates matchers for one model's tokens."""

    def __init__(self, tokenizer: Any, size: int, ends: list[int]) -> None:
        """Takes about a second. `size`: of the logits."""
        self.tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
        self.trial = Trial()

    def matcher(self, grammar: str, name: str) -> LLMatcher:
        """A matcher for the grammar in the field `name`; raises ApiError 400 if the grammar cannot be compiled within LIMITS.

        Blocks for seconds if it is hostile.
        """
        fault = self.trial.fault(grammar)
        if not fault:
            matcher = LLMatcher(self.tokens, grammar, limits=LIMITS, log_level=0)
            fault = matcher.get_error() if matcher.is_error() else ""
        if fault:
            raise ApiError(
                400, "invalid_value", f"'{name}' cannot be followed: {fault.splitlines()[0][:300]}", name
            )
        return matcher


def unfollowable(matcher: LLMatcher) -> ApiError:
    """A 400 for a grammar that was compiled, but turns out to be too expensive, or empty, while it is followed."""
    reason = (matcher.get_error() or "a token is not in it").splitlines()[0][:300]
    return ApiError(400, "invalid_value", f"the schema or grammar cannot be followed: {reason}")


class NextToken:
    """Changes the logits of one request's next token, step by step. An error is stored rather than raised, since raising it would
    end all requests of a batch.
    """

    def __init__(
        self,
        request: Generate,
        prompt: list[int],
        ends: list[int],
        size: int,
        temperature: float,
        matcher: LLMatcher | None,
    ) -> None:
        """`ends`: the tokens that end the answer. `temperature`: 0 for a greedy one."""
        extra = request.extra
        self.ends = [token for token in ends if token >= 0]
        self.matcher, self.temperature = matcher, temperature
        self.counts = torch.zeros(size)
        self.prompted = torch.zeros(size, dtype=torch.bool)
        self.prompted[[token for token in prompt if token < size]] = True
        self.position = 0
        self.frequency, self.presence = extra.get("frequency_penalty", 0), extra.get("presence_penalty", 0)
        self.repetition = extra.get("repetition_penalty", 1)
        bias = extra.get("logit_bias", {})
        self.bias = (
            torch.tensor([*map(int, bias)], dtype=torch.long),
            torch.tensor([*map(float, bias.values())]),
        )
        self.allowed = extra.get("allowed_token_ids")
        self.fewest = extra.get("min_tokens", 0)
        self.min_p, self.top_k = extra.get("min_p", 0), extra.get("top_k", -1)
        self.logprobs = logprobs_of(request)
        self.considered: dict[
            int, torch.Tensor
        ] = {}  # log probabilities by position, until the token is known
        self.trouble: Exception | None = None  # why the answer is not as the fields say

    def __deepcopy__(self, _: object) -> "NextToken":
        """Return itself: a batch that puts a request back copies its arguments, and the answer continues."""
        return self

    def __call__(self, answer: list[int], logits: torch.Tensor) -> torch.Tensor:
        """The changed logits, of shape [tokens], after the tokens of the answer so far; unchanged ones after an error."""
        if self.trouble is None:
            try:
                return self.changed(answer, logits)
            except Exception as error:
                self.trouble = error
        return logits

    def changed(self, answer: list[int], logits: torch.Tensor) -> torch.Tensor:
        """The same, but may raise."""
        row = logits.float().cpu().clone()
        if self.logprobs is not None:
            self.considered[len(answer)] = torch.log_softmax(row, -1)
        for token in answer[self.position :]:
            self.take(token)
        self.position = len(answer)
        if self.repetition != 1:
            present = self.prompted | (self.counts > 0)
            row = torch.where(
                present, torch.where(row > 0, row / self.repetition, row * self.repetition), row
            )
        row -= self.frequency * self.counts + self.presence * (self.counts > 0)
        row[self.bias[0]] += self.bias[1]
        if self.allowed is not None:
            forbidden = torch.ones_like(row, dtype=torch.bool)
            forbidden[self.allowed] = False
            row[forbidden] = -math.inf
        if self.position < self.fewest:
            row[self.ends] = -math.inf
        if self.matcher is not None:
            row[~self.mask(self.matcher, len(row))] = -math.inf
        if not torch.isfinite(row).any():
            raise ApiError(
                400,
                "invalid_value",
                f"the fields of the request leave no token after {len(answer)}: they contradict",
            )
        if self.temperature > 0:
            row = self.bounded(row)
        return row.to(logits)

    def take(self, token: int) -> None:
        """Note a token of the answer."""
        self.counts[token] += 1
        if self.matcher is not None and token not in self.ends and not self.matcher.consume_token(token):
            raise unfollowable(self.matcher)

    def chances(self, position: int, token: int) -> list[tuple[int, float]]:
        """The log probabilities of the answer's token at `position` and of the most likely tokens there, before other fields
        changed them; the token itself comes first.
        """
        row = self.considered.pop(position)
        likeliest = torch.topk(row, self.logprobs or 0)
        return [
            (token, float(row[token])),
            *zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True),
        ]

    def mask(self, matcher: LLMatcher, size: int) -> torch.Tensor:
        """The tokens with which the grammar can continue."""
        bits = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
        if matcher.is_error():
            raise unfollowable(matcher)
        allowed = numpy.zeros(size, dtype=bool)
        unpacked = numpy.unpackbits(bits, bitorder="little")[:size]
        allowed[: len(unpacked)] = unpacked
        return torch.from_numpy(allowed)

    def bounded(self, row: torch.Tensor) -> torch.Tensor:
        """The logits without the tokens that `min_p` and `top_k` exclude."""
        if self.min_p > 0:
            row = row.masked_fill(row < row.max() + self.temperature * math.log(self.min_p), -math.inf)
        if 0 < self.top_k < len(row):
            row = row.masked_fill(row < torch.topk(row, self.top_k).values[-1], -math.inf)
        return row
