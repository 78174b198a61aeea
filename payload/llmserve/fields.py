"""Each field of OpenAI's and vLLM's requests, in one of three classes. A field in none of them is refused.

- `DROPPED`: no influence on an answer; accepted with any value, and not passed on.
- `PASSED`: changes the answer; checked here, then passed to an engine that declares it, and refused by name otherwise.
- `REFUSED`: crosses tenants, reads files or networks, runs what the client sends, or has no bound.

Null is always a no-op. Fields that every engine takes (`model`, `messages`, `temperature`, …) are in `llmserve.api.requests`.
`payload/tests/serve/api/test_fields.py` compares these tables with vLLM's and with OpenAI's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

Endpoint = Literal["chat", "completion"]
CHAT: frozenset[Endpoint] = frozenset({"chat"})
COMPLETION: frozenset[Endpoint] = frozenset({"completion"})
BOTH = CHAT | COMPLETION

DROPPED = {
    "metadata": "kept with stored answers, and no answers are stored here",
    "prompt_cache_key": "a hint for a provider's routing",
    "prompt_cache_options": "likewise",
    "prompt_cache_retention": "likewise",
    "request_id": "an answer has the gateway's",
    "safety_identifier": "the key identifies the caller",
    "service_tier": "the policy's rate class takes its place",
    "session_id": "a hint for a provider's routing",
    "stream_interval": "how many tokens an event has, not which",
    "user": "the key identifies the caller",
}

CODE = "the engine would execute it"
READS = "the engine would read files or addresses that it names"
TENANTS = "it would reach requests of other callers"
UNBOUNDED = "it does not limit the work that it asks for"
INSIDE = "it concerns the server, not the answer"
REFUSED = {
    "audio": READS,
    "cache_salt": "the gateway sets it, so that tenants cannot detect each other's prompts",
    "chat_template": CODE,
    "ec_transfer_params": READS,
    "kv_transfer_params": READS,
    "length_penalty": UNBOUNDED,
    "logits_processors": CODE,
    "media_io_kwargs": READS,
    "mm_payload": INSIDE,
    "mm_processor_kwargs": READS,
    "moderation": READS,
    "prediction": "no engine here supports it, but the answer would cost as much as if one did",
    "priority": TENANTS,
    "prompt_embeds": CODE,
    "prompt_logprobs": UNBOUNDED,
    "return_mm_kwargs": INSIDE,
    "return_prompt_text": INSIDE,
    "return_weight_versions": INSIDE,
    "routed_experts_prompt_start": INSIDE,
    "use_beam_search": UNBOUNDED,
    "verbosity": "no model here was trained for it",
    "vllm_xargs": CODE,
    "web_search_options": READS,
}


@dataclass(frozen=True, slots=True)
class Passed:
    """A field that some engines take. `neutral`: the value, besides null, that changes nothing and that no engine needs to
    declare."""

    values: TypeAdapter[Any]
    neutral: object = None
    endpoints: frozenset[Endpoint] = BOTH


def passed(kind: Any, neutral: object = None, endpoints: frozenset[Endpoint] = BOTH) -> Passed:
    """A row of the table; `kind`: type of its values."""
    return Passed(TypeAdapter(kind, config=ConfigDict(strict=True)), neutral, endpoints)


MAX_CHOICES = 8  # answers to one request
Id = Annotated[int, Field(ge=0, lt=2**31)]  # a token's
Penalty = Annotated[float, Field(ge=-2, le=2)]
Few = Field(fail_fast=True, max_length=128)
Object = dict[str, Any]
PASSED: Mapping[str, Passed] = {
    "add_generation_prompt": passed(bool, True, CHAT),
    "add_special_tokens": passed(bool),
    "allowed_token_ids": passed(Annotated[list[Id], Field(fail_fast=True, max_length=4096)]),
    "bad_words": passed(Annotated[list[Annotated[str, Field(max_length=128)]], Few], []),
    "best_of": passed(Annotated[int, Field(ge=1, le=MAX_CHOICES)], 1, COMPLETION),
    # The names that a model's engine is configured to take: what a template does with another is not known.
    "chat_template_kwargs": passed(
        Annotated[
            dict[str, bool | int | float | Annotated[str, Field(max_length=256)]], Field(max_length=16)
        ],
        {},
        CHAT,
    ),
    "continue_final_message": passed(bool, False, CHAT),
    "documents": passed(Annotated[list[dict[str, str]], Few], [], CHAT),
    "echo": passed(bool, False),
    "frequency_penalty": passed(Penalty, 0),
    "function_call": passed(str | Object, None, CHAT),
    "functions": passed(Annotated[list[Object], Few], [], CHAT),
    "ignore_eos": passed(bool, False),
    "include_reasoning": passed(bool, None, CHAT),
    "include_stop_str_in_output": passed(bool, False),
    "logit_bias": passed(
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ],
        {},
    ),
    "logprob_token_ids": passed(Annotated[list[Id], Few]),
    "logprobs": passed(bool | Annotated[int, Field(ge=0, le=20)], False),
    "min_p": passed(Annotated[float, Field(ge=0, le=1)], 0),
    "min_tokens": passed(Annotated[int, Field(ge=0, lt=2**31)], 0),
    "modalities": passed(list[Literal["text"]], ["text"], CHAT),
    "n": passed(Annotated[int, Field(ge=1, le=MAX_CHOICES)], 1),
    "parallel_tool_calls": passed(bool, None, CHAT),
    "presence_penalty": passed(Penalty, 0),
    "reasoning_effort": passed(Annotated[str, Field(max_length=16)], None, CHAT),
    "repetition_detection": passed(Object),
    "repetition_penalty": passed(Annotated[float, Field(gt=0, le=2)], 1),
    "response_format": passed(Object, {"type": "text"}),
    "return_token_ids": passed(bool, False),
    "return_token_offsets": passed(bool, False),
    "return_tokens_as_token_ids": passed(bool, False),
    "seed": passed(Annotated[int, Field(ge=0, lt=2**63)]),
    "skip_special_tokens": passed(bool, True),
    "spaces_between_special_tokens": passed(bool, True),
    "stop_token_ids": passed(Annotated[list[Id], Few], []),
    "store": passed(Literal[False], False, CHAT),
    "structured_outputs": passed(Object),
    "suffix": passed(Annotated[str, Field(max_length=65_536)], None, COMPLETION),
    "thinking_token_budget": passed(Annotated[int, Field(ge=0, lt=2**31)]),
    "tool_choice": passed(str | Object, None, CHAT),
    "tools": passed(Annotated[list[Object], Few], [], CHAT),
    "top_k": passed(Annotated[int, Field(ge=-1, lt=2**31)], -1),
    "top_logprobs": passed(Annotated[int, Field(ge=0, le=20)], None, CHAT),
    "truncate_prompt_tokens": passed(Annotated[int, Field(ge=-1, lt=2**31)]),
    "truncation_side": passed(Literal["left", "right"]),
    "watermarking": passed(bool),
}
