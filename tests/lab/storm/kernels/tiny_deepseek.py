"""Runs on a lab host: a random DeepSeek-V2 of a few million parameters, with another model's tokenizer; the same bytes each time.

python3 tiny_deepseek.py TOKENIZER_FROM INTO
"""

import hashlib
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
torch.manual_seed(0)
config = DeepseekV2Config(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, topk_method="greedy",
    n_group=1, topk_group=1, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
)  # fmt: skip
DeepseekV2ForCausalLM(config).save_pretrained(folder)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(source / name, folder / name)
for path in folder.iterdir():
    path.chmod(0o644)  # safetensors leaves its files to their owner alone
lines = [
    f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    for path in sorted(folder.iterdir())
    if path.name != "SHA256SUMS"
]
(folder / "SHA256SUMS").write_text("".join(lines))
