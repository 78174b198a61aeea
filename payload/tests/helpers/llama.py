"""A Llama with 60,000 parameters and three blocks, and tokens that it can learn."""

from typing import Any

import torch


def llama() -> Any:
    """The same model on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def batch(step: int = 0, rows: int = 2) -> torch.Tensor:
    """Rows of 32 consecutive numbers modulo 101; shape (rows, 32)."""
    start = torch.arange(rows)[:, None] * 37 + step * 13
    return (start + torch.arange(32)) % 101
