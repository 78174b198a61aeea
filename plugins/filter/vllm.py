"""Filters of role vllm: vLLM's own configuration of an inventory's models, and why they cannot be served."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from ansible_collections.llmkeep.estate.plugins.filter.serving import (
    MEMORY,
    NAME,
    folder_faults,
    memory_max,
    set_of,
    weights_faults,
)

# How `llm-serve fit` counts vLLM's quantizations: by what takes no less where they have 4 and 8 bits, as they mostly do.
COUNTED_AS = {"awq": "nf4", "bitsandbytes": "nf4", "fp8": "int8", "gptq": "nf4"}
UTILIZATION = 0.9
# What the role itself says to vLLM, and by what of the inventory.
SAID = {
    "device-ids": "gpus",
    "dtype": "dtype",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "max-model-len": "max_model_len",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "max-num-seqs": "max_num_seqs",
    "model": "model or release",
    "pipeline-parallel-size": "pipeline_parallel",
    "quantization": "quantization",
    "served-model-name": "name",
    "shutdown-timeout": "vllm_drain_seconds",
    "tensor-parallel-size": "tensor_parallel",
}
# Options of vLLM that take code, weights or a tokenizer from where nothing was signed, open a way in that is not the gateways',
# send something away, write prompts down, or hide from gateways that it takes a salt by which tenants share no cache.
UNSAFE = re.compile(
    "(api-key|allowed-|code-|config|data-parallel|default-mm-loras|disable-fastapi-docs|distributed-executor-backend|download-dir|dp-|ec-transfer|elastic-ep"
    "|enable-(elastic-ep|log-(deltas|outputs|requests)|mm-embeds|prompt-embeds|scale-out|trace-replay)|generation-config|grpc|headless|hf-(config-path|token)"
    "|host$|io-processor-plugin|kv-(events|transfer)|load-format|log-config-file|logging-config|logits-processors|lora-modules|master-|middleware"
    "|model-class-overrides|model-loader-extra-config|nnodes|node-|otlp-|port$|profiler-config|reasoning-parser-plugin|revision|root-path"
    "|scheduler-cls|spec-model|ssl-|tokenizer$|tokenizer-revision|tool-parser-plugin|tool-server|trust-|uds|weight-transfer|worker-).*"
)
# The same inside an option that is a mapping. A `backend` is the module of one where it has a dot.
UNSAFE_KEYS = re.compile(
    "code_revision|inductor_passes|model|revision|tokenizer|tokenizer_revision|trust_remote_code|.*_(cls|dir|path|plugin)"
)


def vllm_faults(
    models: list[dict[str, Any]], gpu_memory: str, beside: list[dict[str, Any]], gpu_count: int = 0
) -> list[str]:
    """Why vLLM cannot serve these models on so many GPUs (0: not known) of that memory each, beside the host's engines.

    A sentence for each fault.
    """
    if not models:
        return ["It is an empty list: name a model, or remove the host from [vllm]"]
    problems = []
    if not MEMORY.fullmatch(gpu_memory):
        problems.append(
            f"vllm_gpu_memory is {gpu_memory or 'not set'}: write the memory of one GPU, such as 24G"
        )
    for name, times in Counter(model["name"] for model in models).items():
        if times > 1:
            problems.append(
                f"{times} models are called {name}: the gateways ask by name, so give each its own"
            )
    for number, times in Counter(gpu for model in models for gpu in model["gpus"]).items():
        if times > 1:
            problems.append(
                f"GPU {number} is named {times} times: a GPU has one model, and is named there once"
            )
        if gpu_count and number not in range(gpu_count):
            problems.append(
                f"GPU {number} is named, but according to gpu_health_expect there are {gpu_count}, numbered from 0"
            )
    for model in map(set_of, models):
        faults = weights_faults(model) + gpu_faults(model) + option_faults(model.get("options", {}))
        problems += [f"{model['name']}: {fault}" for fault in faults]
    return [*problems, *folder_faults([*models, *beside])]


def gpu_faults(model: dict[str, Any]) -> list[str]:
    """What is wrong with one model."""
    problems = []
    if not NAME.fullmatch(model["name"]):
        problems.append(
            "a name has small letters, digits, dots and dashes, at most 63, and starts with no dash or dot"
        )
    tensor, pipeline = parallel(model)
    if not model["gpus"]:
        problems.append("gpus is empty: name at least one, as nvidia-smi numbers them")
    elif tensor * pipeline != len(model["gpus"]):
        problems.append(
            f"tensor_parallel {tensor} times pipeline_parallel {pipeline} is not its {len(model['gpus'])} GPUs: name as many"
        )
    if not 0 < float(model.get("gpu_memory_utilization", UTILIZATION)) <= 0.98:
        problems.append(
            f"gpu_memory_utilization is {model['gpu_memory_utilization']}: take more than 0 and at most 0.98"
        )
    for key in "max_model_len", "max_num_seqs", "max_num_batched_tokens", "start_seconds":
        if key in model and int(model[key]) < 1:
            problems.append(f"{key} is {model[key]}: take 1 or more")
    return problems


def option_name(key: object) -> str:
    """An option's name as vLLM writes it."""
    return str(key).replace("_", "-")


def option_faults(options: dict[str, Any]) -> list[str]:
    """Options of vLLM that are not the inventory's to give. What vLLM itself takes, its own parser says, on the host."""
    problems = []
    for key, value in options.items():
        name = option_name(key)
        variable = SAID.get(name) or SAID.get(name.removeprefix("no-"))
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", name):
            problems.append(
                f"options has {key!r}: write the name of a long option of vLLM, without its dashes"
            )
        elif variable:
            problems.append(f"options has {key}, which the role sets: say it by {variable}")
        elif UNSAFE.fullmatch(name.removeprefix("no-")):
            problems.append(
                f"options has {key}, which is refused: it loads unsigned content, bypasses the gateways, logs prompts, or "
                "hides vLLM's API from the gateways"
            )
        elif value is None:
            problems.append(f"options has {key} without a value: give it one, true where it takes none")
        # vLLM makes a command line of its configuration file, so this would be another option.
        elif any(re.match("-[^0-9.]", str(each)) for each in (value if isinstance(value, list) else [value])):
            problems.append(f"options has {value!r} for {key}: a value does not start with a dash")
        # vLLM would read the mapping out of it. A chat template is no JSON.
        elif name != "chat-template" and any(
            is_json(each) for each in (value if isinstance(value, list) else [value])
        ):
            problems.append(
                f"options has text that begins with {{ or [ for {key}: write the mapping or the list itself"
            )
        elif inner := unsafe_keys(value):
            problems.append(
                f"options has {inner[0]} in {key}, which is refused: it takes in what was not signed"
            )
    return problems


def unsafe_keys(value: Any) -> list[str]:
    """Keys in a mapping, at any depth, that take in what was not signed."""
    if isinstance(value, list):
        return [key for each in value for key in unsafe_keys(each)]
    if not isinstance(value, dict):
        return []
    return [
        str(key)
        for key, each in value.items()
        if UNSAFE_KEYS.fullmatch(str(key).replace("-", "_")) or (key == "backend" and "." in str(each))
    ] + [key for each in value.values() for key in unsafe_keys(each)]


def is_json(value: Any) -> bool:
    """Whether it is text that may be read as a mapping or a list."""
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


def parallel(model: dict[str, Any]) -> tuple[int, int]:
    """GPUs that share each layer, and groups of them that share the layers."""
    pipeline = int(model.get("pipeline_parallel", 1))
    return int(model.get("tensor_parallel", max(len(model["gpus"]) // max(pipeline, 1), 1))), pipeline


def vllm_fit(model: dict[str, Any], models_dir: str, gpu_memory: str) -> list[str]:
    """Arguments of `llm-serve fit` for a model."""
    model = set_of(model)
    share = float(model.get("gpu_memory_utilization", UTILIZATION))
    mebibytes = int(int(memory_max({"memory": gpu_memory})) * share) >> 20
    quantization = COUNTED_AS.get(model.get("quantization", ""), "none")
    return [
        *(
            "--model",
            f"{models_dir}/{model['model']}",
            "--memory",
            f"{mebibytes}M",
            "--gpus",
            str(len(model["gpus"])),
        ),
        *("--context", str(model["max_model_len"]), "--quantization", quantization),
    ]


def vllm_config(model: dict[str, Any], models_dir: str, drain_seconds: int) -> dict[str, Any]:
    """vLLM's own configuration file for a model: its long options by name."""
    model = set_of(model)
    tensor, pipeline = parallel(model)
    config = {
        "model": f"{models_dir}/{model['model']}",
        "served-model-name": model["name"],
        "uds": f"/run/vllm/{model['name']}/api.sock",
        "load-format": "safetensors",
        "tensor-parallel-size": tensor,
        "pipeline-parallel-size": pipeline,
        "max-model-len": model["max_model_len"],
        "gpu-memory-utilization": model.get("gpu_memory_utilization", UTILIZATION),
        "shutdown-timeout": drain_seconds,
        "disable-uvicorn-access-log": True,
    }
    for key in "dtype", "quantization", "max_num_seqs", "max_num_batched_tokens":
        if key in model:
            config[key.replace("_", "-")] = model[key]
    return config | {option_name(key): value for key, value in model.get("options", {}).items()}


def vllm_start_seconds(model: dict[str, Any], sizes: dict[str, int], base: int, rate: int) -> int:
    """Seconds that a model's start may take: its own, else `base` and its weights (`sizes`: bytes by folder) at `rate` MB/s."""
    model = set_of(model)
    return int(model.get("start_seconds") or base + sizes.get(model["model"], 0) // (rate * 10**6))


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "vllm_config": vllm_config,
            "vllm_faults": vllm_faults,
            "vllm_fit": vllm_fit,
            "vllm_start_seconds": vllm_start_seconds,
        }
