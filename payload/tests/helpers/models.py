"""config.json of published models, limited to their shapes, and of tiny ones."""

import json
from pathlib import Path
from typing import Any

from llmtrain.job import Job

TINY_LATENT = {  # multi-head latent attention and experts, as in DeepSeek-V2
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK_7B = {  # deepseek-llm-7b
    "model_type": "llama", "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip
V25 = {
    **V2_LITE, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160, "q_lora_rank": 1536, "n_group": 8,
    "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
V3 = {
    **V25, "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_shared_experts": 1, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_group": 4, "topk_method": "noaux_tc",
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
TINY_V2 = {
    "model_type": "deepseek_v2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "max_position_embeddings": 512,
}  # fmt: skip
TINY_V2_LITE = {**TINY_V2, "q_lora_rank": None}
TINY_V3 = {**TINY_V2, "model_type": "deepseek_v3"}
LORA = {"kind": "lora"}
FULL = {"kind": "full"}


def write_config(directory: Path, content: dict[str, Any]) -> Path:
    """Create a model directory with only this config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def make_job(model: Path, method: dict[str, Any], **sections: Any) -> Job:
    """A job; its data set need not exist if the plan is given the sequence length."""
    described = {
        "name": "test",
        "model": model,
        "method": method,
        "data": {"train": "/no/rows"},
        "output": "/no/output",
    }
    return Job.model_validate({**described, **sections})
