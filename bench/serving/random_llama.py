"""Makes a random Llama of 57 M parameters, with a byte-level tokenizer, in the directory named first."""

import sys
from pathlib import Path

import torch
from tiny import make_model

SIZE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
make_model(Path(sys.argv[1]), torch.float32, **SIZE)
