"""The report of `llm-serve fit --hosts N`: the choice, the reasons for it, other plans, and splits that are not possible."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcore.config import ConfigError
from llmcore.model_config import read
from llmcore.sizes import gib, parse_memory
from llmserve.engine.memory_fit import LATENT, Architecture, architecture_of
from llmserve.engine.parallel_fit import (
    WEIGHTS,
    Cluster,
    Load,
    Plan,
    Split,
    declared_quantization,
    ranking,
    stage_layers,
    stage_parameters,
)

ROWS = 4  # of a quantization in the table
MEMORY_BOUNDS = ("weights", "cache", "concurrency")
COLUMNS = (
    "quantization", "replicas", "hosts", "tensor", "pipeline", "data", "experts", "weights/GPU", "activations", "cache/GPU",
    "tokens", "requests",
)  # fmt: skip
METHODS = {"awq": "int4", "fp8": "fp8", "gptq": "int4"}


def alternatives(plans: list[Plan]) -> list[Plan]:
    """The best plan of each quantization and those with more capacity than any before; the first ones if none serves the load."""
    chosen: dict[str, list[Plan]] = {}
    for each in plans:
        rows = chosen.setdefault(each.split.quantization, [])
        most = max([row.requests for row in rows], default=0) if each.serves else 0
        if each.requests > most and len(rows) < ROWS:
            rows.append(each)
    return [each for rows in chosen.values() for each in rows]


def refusals(plans: list[Plan]) -> list[Plan]:
    """A plan for each bound, with the best plan's quantization if one breaks it: the one that lacks the least memory, or the
    first."""
    nearest: dict[str, Plan] = {}

    def distance(each: Plan) -> tuple[bool, float]:
        return each.split.quantization != plans[0].split.quantization, each.shortfall

    for each in plans:
        if each.bound and (
            each.bound not in nearest
            or (each.bound in MEMORY_BOUNDS and distance(each) < distance(nearest[each.bound]))
        ):
            nearest[each.bound] = each
    return list(nearest.values())


def reasons(model: Architecture, plans: list[Plan], cluster: Cluster) -> list[str]:
    """The reasons for the first plan: network traffic, the share of a GPU, and the nearest of the plans that would be
    preferred."""
    best = plans[0]
    split, config = best.split, model.config
    if best.crosses:
        network = (
            f"each layer sends between the {best.hosts} hosts of a replica: it needs a network with RDMA"
        )
    elif best.hosts > 1:
        network = (
            f"each layer stays within a host, whose GPUs NVLink joins; {4 * model.hidden} bytes per token travel between the "
            f"{best.hosts} hosts of a replica"
        )
    else:
        network = "a replica stays within a host: no layer waits for the network, no replica for another host"
    heads, layers = config.number("num_attention_heads"), max(stage_layers(model.layers, split.pipeline))
    share = (
        f"a GPU has {heads // split.tensor} of {heads} attention heads and {layers} of {model.layers} layers"
    )
    if model.plain < model.layers:
        routed = config.number("n_routed_experts")
        local = -(-routed // (split.tensor * split.data))
        share += (
            f", {local} of {routed} experts"
            if split.expert_parallel
            else f", 1/{split.tensor} of each expert"
        )
    if (copies := split.tensor // min(split.tensor, model.cache_heads)) > 1:
        latent = config.model_type in LATENT
        cause = "MLA's latent" if latent else f"the cache of {model.cache_heads} key-value heads"
        share += f"; {cause} is on {copies} GPUs each"
    memory = (
        f"{gib(cluster.usable)} a GPU: weights {gib(best.weights)}, activations {gib(best.activations)}, "
        f"runtime {gib(best.runtime)}, cache {gib(best.cache)}"
    )
    preferred = [
        each
        for each in plans
        if each.bound in MEMORY_BOUNDS
        and each.split.quantization == split.quantization
        and each.rank() < best.rank()
    ]
    lines = [network, share, memory]
    if preferred:
        nearest = max(preferred, key=lambda each: (each.requests, -each.shortfall))
        lines.append(f"preferred if it served: {outline(nearest.split)}: {nearest.verdict}")
    return lines


def outline(split: Split) -> str:
    """A split in words."""
    words = [split.quantization, f"tensor {split.tensor}"]
    if split.pipeline > 1:
        words.append(f"pipeline {split.pipeline}")
    if split.data > 1:
        words.append(f"data {split.data}")
    return ", ".join([*words, "whole experts"] if split.expert_parallel else words)


def table(model: Architecture, plans: list[Plan]) -> list[str]:
    """Hosts and tokens of a replica, memory of a GPU, and requests of all replicas at once."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for each in plans:
        split = each.split
        numbers = each.replicas, each.hosts, split.tensor, split.pipeline, split.data
        sizes = gib(each.weights), gib(each.activations), gib(each.cache)
        experts = "whole" if split.expert_parallel else "sliced" if model.plain < model.layers else "-"
        totals = str(each.cache_tokens), str(each.requests)
        rows.append((split.quantization, *map(str, numbers), experts, *sizes, *totals))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def entry(each: Plan, load: Load) -> dict[str, Any]:
    """A plan for JSON."""
    fields = asdict(each)
    options = each.split.options(load, each.sequences)
    return {**fields.pop("split"), **fields, "serves": each.serves, "options": options}


def report(
    directory: Path, hosts: int, gpus: int, memory: str, context: int | None, concurrency: int, batched_tokens: int,
    quantization: str | None, tensor: int | None, pipeline: int | None, as_json: bool,
) -> tuple[str, bool]:  # fmt: skip
    """The report, and whether a split serves the load; raises ConfigError."""
    model = architecture_of(read(directory))
    load = Load(context or model.context, concurrency, batched_tokens)
    numbers: dict[str, int | None]
    numbers = {"--hosts": hosts, "--gpus": gpus, "--context": load.context, "--concurrency": concurrency}
    numbers |= {
        "--batched-tokens": batched_tokens,
        "--tensor-parallel": tensor,
        "--pipeline-parallel": pipeline,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    declared = METHODS.get(str(declared_quantization(model).get("quant_method")))
    quantizations = [each for each in [quantization or declared] if each] or list(WEIGHTS)
    if not set(quantizations) <= set(WEIGHTS):
        raise ConfigError(
            f"--quantization is {quantization}: with --hosts choose one of {', '.join(WEIGHTS)}"
        )
    cluster = Cluster(hosts, gpus, parse_memory(memory))
    plans = ranking(model, cluster, load, quantizations, tensor, pipeline)
    best, rows, refused = plans[0], alternatives(plans), refusals(plans)
    why = reasons(model, plans, cluster) if best.serves else []
    parameters = stage_parameters(model, Split("none", 1, 1))[0]
    cached = model.cache_bytes * model.layers
    if as_json:
        head = {
            "model_type": model.config.model_type,
            "parameters": parameters,
            "cache_bytes_per_token": cached,
        }
        content = {
            **head, **asdict(cluster), "usable": cluster.usable, **asdict(load),
            "choice": entry(best, load) if best.serves else None, "reasons": why,
            "alternatives": [entry(each, load) for each in rows if each is not best or not best.serves],
            "refused": [entry(each, load) for each in refused],
        }  # fmt: skip
        return json.dumps(content), best.serves
    lines = [
        f"{model.config.model_type}, {parameters / 1e9:.2f} G parameters, on {hosts} hosts of {gpus} x {gib(cluster.memory)}",
        f"load: {concurrency} x {load.context} tokens at once; the cache takes {cached} bytes per token",
    ]
    if best.serves:
        lines.append(f"choice: {best.replicas} x ({outline(best.split)}), serves {best.requests}")
        lines += [f"  {reason}" for reason in why]
        lines.append(f"  vllm serve {best.split.options(load, best.sequences)}")
    else:
        lines.append("choice: none; no split serves the load")
    if rows:
        lines += ["", *table(model, rows)]
    if refused:
        lines += ["", "refused:", *(f"  {outline(each.split)}: {each.verdict}" for each in refused)]
    return "\n".join(lines), best.serves
