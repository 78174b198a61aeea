"""Parameters and KV cache of each rank, as vLLM lays models out, for the tests of `llm-serve fit`. No GPU, no weights.

    make peers PEER=vllm
    bench/.venv-vllm/bin/python bench/vllm_shards.py > payload/tests/serve/engine/vllm_shards.json

vLLM's CPU build makes the model of one rank after the other on torch's `meta` device, which allocates nothing. Its groups
of processes are replaced by objects that say only which rank of how many this is.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import initialize_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "scoring_func": "softmax", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "Llama-3-70B": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    },
    "DeepSeek-V2.5": {
        **DEEPSEEK, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160,
        "q_lora_rank": 1536, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
    },
}  # fmt: skip
# Model, GPUs that share each layer, stages of layers, ranks of data parallelism that share the experts.
SPLITS = [
    *(("SmolLM2-135M", tensor, pipeline, 1) for tensor, pipeline in ((1, 1), (3, 1), (1, 4))),
    *(("Llama-3-70B", tensor, pipeline, 1) for tensor, pipeline in ((4, 1), (8, 2), (16, 1), (2, 3))),
    *(("DeepSeek-V2-Lite", tensor, 1, data) for tensor, data in ((1, 1), (2, 1), (2, 2))),
    *(("DeepSeek-V2.5", tensor, pipeline, 1) for tensor, pipeline in ((8, 1), (8, 2), (4, 4), (16, 1))),
    *(
        ("DeepSeek-V2.5", tensor, pipeline, data)
        for tensor, pipeline, data in ((1, 1, 16), (4, 1, 2), (2, 2, 4))
    ),
]


@dataclass
class Group:
    """One rank's view of a group of processes."""

    world_size: int
    rank_in_group: int

    def __post_init__(self) -> None:
        self.device_group = self.cpu_group = SimpleNamespace(
            size=lambda: self.world_size, rank=lambda: self.rank_in_group
        )
        self.is_first_rank = self.rank_in_group == 0
        self.is_last_rank = self.rank_in_group == self.world_size - 1
        self.local_rank = self.rank = self.rank_in_group
        self.unique_name = "group"
        self.device_communicator = self.mq_broadcaster = None
        self.ranks = list(range(self.world_size))


def settings(model: str, data: int, folder: Path) -> VllmConfig:
    """vLLM's configuration for `model`, with experts shared by `data` ranks where that is more than one."""
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=4096, dtype="bfloat16"
    )
    config = arguments.create_engine_config()
    config.parallel_config.data_parallel_size = data
    config.parallel_config.enable_expert_parallel = data > 1
    return config


def rank_of(config: VllmConfig, tensor: int, pipeline: int, data: int, stage: int) -> dict[str, int]:
    """What the first GPU of `stage` holds: parameters, layers with a cache, and bytes a token there."""
    config.parallel_config.tensor_parallel_size = tensor
    config.parallel_config.pipeline_parallel_size = pipeline
    parallel_state._WORLD = Group(tensor * pipeline * data, stage * tensor)
    parallel_state._TP, parallel_state._PP = Group(tensor, 0), Group(pipeline, stage)
    parallel_state._DP, parallel_state._EP = Group(data, 0), Group(tensor * data, 0)
    parallel_state._PCP = parallel_state._DCP = Group(1, 0)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), torch.device("meta"):
        model = initialize_model(config)
        specs = [
            spec
            for layer in config.compilation_config.static_forward_context.values()
            if hasattr(layer, "get_kv_cache_spec") and (spec := layer.get_kv_cache_spec(config))
        ]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(specs),
        "cache_bytes_per_token": sum(spec.page_size_bytes // spec.block_size for spec in specs),
    }


def main() -> None:
    torch.set_default_dtype(torch.bfloat16)
    ExpertMapManager.get_compressed_map_string = lambda _: ""  # for its log; it would read a meta tensor
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for model, tensor, pipeline, data in SPLITS:
            config = settings(model, data, Path(folder))
            stages = [rank_of(config, tensor, pipeline, data, stage) for stage in range(pipeline)]
            entries.append(
                {"model": model, "tensor": tensor, "pipeline": pipeline, "data": data, "stages": stages}
            )
    print(json.dumps({"models": MODELS, "splits": entries}, indent=1))


if __name__ == "__main__":
    main()
