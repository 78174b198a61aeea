"""Attention of a batch request by request, compared with transformers' own, which computes all requests as one
sequence.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")

from transformers import (  # noqa: E402 - needs torch
    AttentionInterface,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402 - needs torch

from llmserve.engine import paged_attention  # noqa: E402 - needs torch

PROMPTS = [list(range(1, 1 + length)) for length in (3, 40, 17, 70)]  # some are split by a step of 64 tokens


def sees_only_the_last(model: Path, tokens: int) -> None:
    """Turn the model into a Mistral whose layers attend to the last `tokens` tokens."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": tokens}
    (model / "config.json").write_text(json.dumps(config))


def answer_all(
    directory: Path, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], set[int]]:
    """Run a batch; returns the output of attention at each layer and step, and the number of requests per step."""
    given: list[Any] = []
    requests: set[int] = set()

    def kept(*inputs: Any, **how: Any) -> tuple[Any, None]:
        output, _ = attention(*inputs, **how)
        given.append(output.clone())
        requests.add(len(how["cu_seq_lens_q"]) - 1)
        return output, None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", kept)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=64, max_requests_per_batch=8
        ),
    )
    for prompt in PROMPTS:  # before it starts, so that every run has the same steps
        manager.add_request(prompt, max_new_tokens=12)
    manager.start()
    try:
        assert all(manager.get_result(timeout=60) for _ in PROMPTS)
    finally:
        manager.stop(block=True, timeout=10)
    return given, requests


@pytest.mark.parametrize("window", [None, 8])
def test_a_batch_gives_the_same_values_as_transformers(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, torch.float32)
    if window:
        sees_only_the_last(tmp_path, window)
    ours, requests = answer_all(tmp_path, paged_attention.attend, monkeypatch)
    theirs, _ = answer_all(tmp_path, sdpa_attention_forward, monkeypatch)
    assert len(PROMPTS) in requests
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    assert max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True)) < 1e-5


def test_without_a_batch_transformers_attention_is_used() -> None:
    query, key, value = torch.randn(3, 1, 4, 5, 8).unbind()
    module = torch.nn.Module()
    ours, _ = paged_attention.attend(module, query, key, value, None)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None)
    assert torch.equal(ours, theirs)
