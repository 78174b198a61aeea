"""Attention of a batch in which each request attends to its own keys only.

transformers concatenates all requests of a step into one sequence, with a mask that separates them. So it computes
the products of all requests with all others and masks them out, and each token becomes more expensive the more
requests there are. Its kernels that know where a request begins (flash attention) are for GPUs.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`, with the same results for a batch: (1, heads, tokens, size) in, (1, tokens, heads,
    size) out.
    """
    if attention_mask is None or not isinstance(cache, PagedAttentionCache):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, cache=cache, **how)
        return output, None
    key, value = cache.update(key, value, module.layer_idx, how)
    answered = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    queries = pairwise(how["cu_seq_lens_q"].tolist())
    for (first, end), (oldest, newest) in zip(queries, pairwise(how["cu_seq_lens_k"].tolist()), strict=True):
        answered[:, first:end], _ = sdpa_attention_forward(
            module,
            query[:, :, first:end],
            key[:, :, oldest:newest],
            value[:, :, oldest:newest],
            attention_mask[..., first:end, oldest:newest],
            **how,
        )
    return answered, None


def use() -> None:
    """Register it for all models of this process whose attention is `sdpa`, the default of transformers."""
    AttentionInterface.register("sdpa", attend)
