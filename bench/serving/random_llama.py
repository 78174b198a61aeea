"""Makes a random Llama of 57 M parameters, with a byte-level tokenizer, in the directory named first."""

import sys
from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

directory = Path(sys.argv[1])
tokenizer: Any = make_tokenizer(directory)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=12,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
LlamaForCausalLM(config).save_pretrained(directory)
