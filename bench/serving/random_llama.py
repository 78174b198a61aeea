"""Makes a random Llama with a byte-level tokenizer in the directory named first, and its manifest beside it.

The second argument is its size, 57m by default. 1b and 3b have the shapes of Llama 3.2, with a vocabulary of 32,000 for
training; 1b-bytes is for answers: it has the tokenizer's vocabulary, since a token that the tokenizer lacks has no text.
"""

import sys
from pathlib import Path

import torch
from tiny import make_model

from llmcore.manifest import write_manifest

ONE_BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
SIZES = {
    "tiny": {},
    "57m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1b": ONE_BILLION | {"vocab_size": 32000},
    "1b-bytes": ONE_BILLION,
    "3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
}  # fmt: skip

directory, size = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "57m"
large = "b" in size
with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"):
    make_model(directory, torch.bfloat16 if large else torch.float32, **SIZES[size])
write_manifest(directory, directory.with_name(f"{directory.name}.sha256"))
