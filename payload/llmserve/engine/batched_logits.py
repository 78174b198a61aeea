"""Applies the fields of each request in transformers' continuous batching, which itself supports only temperature, top_p and
top_k.

A logits processor of the batch finds the `NextToken` of each row among the arguments of the row's request.
"""

from typing import Any, ClassVar

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors as theirs

from llmserve.engine.next_token import NextToken

KEY = "change"  # argument of add_request


class Changes(LogitsProcessor):  # type: ignore[misc]
    """A placeholder for `BatchedChanges` in the list that a manager converts."""


class BatchedChanges(theirs.ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Changes the rows of requests that have fields."""

    supported_kwargs: ClassVar[dict[str, type]] = {KEY: NextToken}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, _: Changes) -> None:
        self.rows: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note the requests of the next step's rows. The tensor is not used."""
        self.rows = [each.state for each in requests_with_new_token]
        return torch.zeros(len(self.rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        for number, state in enumerate(self.rows):
            if change := state.logit_processor_kwargs.get(KEY):
                # A request that had to leave the cache begins anew with its answer so far as a part of its prompt.
                prompt_tokens = state._true_initial_tokens or len(state.initial_tokens)
                answer = [*state.initial_tokens[prompt_tokens:], *state.generated_tokens]
                scores[number] = change(answer, scores[number])
        return scores


def use(model: Any) -> None:
    """Make every manager of this model that is created afterwards accept `NextToken`s."""
    theirs.CLASSIC_TO_CB_PROCESSORS_MAP[Changes] = BatchedChanges
    original = model._get_logits_processor
    model._get_logits_processor = lambda *words, **more: LogitsProcessorList(
        [Changes(), *original(*words, **more)]
    )
