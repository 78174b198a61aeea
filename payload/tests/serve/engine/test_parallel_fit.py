"""`llm-serve fit --hosts`, compared with what each rank holds in vLLM, and with vLLM's logs. No GPU was asked.

bench/vllm_shards.py, which vLLM's CPU build runs, wrote vllm_shards.json.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_config

from llmserve.cli import main
from llmserve.engine.memory_fit import Architecture, architecture_of, model_of
from llmserve.engine.parallel_fit import (
    Cluster,
    Load,
    Plan,
    Split,
    local_weights,
    plan,
    ranking,
    splits,
    stage_bytes,
    stage_layers,
    stage_parameters,
)

G = 2**30
VLLM = json.loads((Path(__file__).parent / "vllm_shards.json").read_text())
MODELS = {name: architecture_of(content) for name, content in VLLM["models"].items()}
V25, LITE, LLAMA_70B, SMOLLM2 = (
    MODELS[name] for name in ("DeepSeek-V2.5", "DeepSeek-V2-Lite", "Llama-3-70B", "SmolLM2-135M")
)
TWO_A100_HOSTS = Cluster(2, 8, 80 * G)
# Logs of vLLM, which its pull request 10511 has: `vllm serve meta-llama/Meta-Llama-3-8B` on one card of 80 GB and on two.
# It takes 71.29 of 79.22 GiB; GiB of a card for weights, what torch did not allocate, and the peak of activations.
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LOGGED = {1: (14.96, 1.79, 1.26), 2: (7.48, 3.58, 1.26)}


@pytest.mark.parametrize(
    "entry", VLLM["splits"], ids=lambda each: "{model} {tensor}x{pipeline}x{data}".format(**each)
)
def test_parameters_and_cache_of_each_rank_are_those_of_vllm(entry: dict[str, Any]) -> None:
    model = MODELS[entry["model"]]
    split = Split("none", entry["tensor"], entry["pipeline"], entry["data"], entry["data"] > 1)
    assert stage_parameters(model, split) == [stage["parameters"] for stage in entry["stages"]]
    counts = stage_layers(model.layers, split.pipeline)
    assert counts == [stage["layers"] for stage in entry["stages"]]
    each = model.cache_bytes // min(split.tensor, model.cache_heads)
    assert [count * each for count in counts] == [stage["cache_bytes_per_token"] for stage in entry["stages"]]


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_of_a_pipeline_sum_to_the_model(name: str) -> None:
    model, whole = MODELS[name], model_of(VLLM["models"][name]).parameters
    assert stage_parameters(model, Split("none", 1, 1)) == [whole]
    # The last stage of a model that ties its embeddings needs them, too.
    second = model.vocabulary * model.hidden if model.tied else 0
    for pipeline in range(2, 17):
        assert sum(stage_parameters(model, Split("none", 1, pipeline))) == whole + second
        assert sum(stage_bytes(model, Split("none", 1, pipeline))) == 2 * (whole + second)


@pytest.mark.parametrize(
    "split", [Split("none", 8, 1), Split("none", 4, 1, 2, True), Split("none", 1, 1, 16, True)]
)
def test_the_gpus_of_a_split_hold_each_divided_weight_once(split: Split) -> None:
    for part in (*V25.dense, *V25.sparse):
        copies = local_weights(part, split, V25) * split.tensor * split.data / part.weights
        once = {"experts": 1, "tensor": split.data, "whole": split.tensor * split.data}
        once["shared"] = split.data * (split.tensor if split.data > 1 else 1)
        assert copies == once[part.division]


@pytest.mark.parametrize("gpus", LOGGED)
def test_the_cache_is_no_larger_than_vllm_logged_on_a_card_and_at_most_one_gib_smaller(gpus: int) -> None:
    weights, runtime, activations = LOGGED[gpus]
    cache = 71.29 - weights - runtime - activations
    model = architecture_of(LLAMA_8B)
    counted = plan(model, Split("none", gpus, 1), Cluster(1, gpus, 80 * G), Load(8192, 1, 8192))
    assert counted.weights / G == pytest.approx(weights, abs=0.01)
    assert cache - 1 < counted.cache / G <= cache


def most(model: Architecture, cluster: Cluster, load: Load) -> int:
    return max(each.requests for each in ranking(model, cluster, load, ["none", "int4"]))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)), hosts=st.integers(1, 3), gpus=st.integers(1, 8),
    memory=st.integers(8, 141), context=st.integers(1, 65536), concurrency=st.integers(1, 4096),
)  # fmt: skip
def test_more_gpus_hosts_or_memory_never_serve_fewer_requests(
    name: str, hosts: int, gpus: int, memory: int, context: int, concurrency: int
) -> None:
    cluster, load = Cluster(hosts, gpus, memory * G), Load(context, concurrency, 8192)
    requests = most(MODELS[name], cluster, load)
    assert most(MODELS[name], replace(cluster, hosts=hosts + 1), load) >= requests
    assert most(MODELS[name], replace(cluster, gpus=gpus + 1), load) >= requests
    assert most(MODELS[name], replace(cluster, memory=(memory + 1) * G), load) >= requests


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    hosts=st.integers(1, 4),
    gpus=st.integers(1, 8),
    memory=st.integers(8, 141),
)
def test_a_plan_uses_no_more_than_there_is(name: str, hosts: int, gpus: int, memory: int) -> None:
    cluster = Cluster(hosts, gpus, memory * G)
    for each in ranking(MODELS[name], cluster, Load(4096, 1, 8192), ["none", "fp8", "int4"]):
        assert each.replicas * each.split.gpus <= hosts * gpus
        if each.requests:
            assert each.weights + each.activations + each.runtime + each.cache <= cluster.usable


def best(model: Architecture, cluster: Cluster, context: int, concurrency: int) -> Plan:
    return ranking(model, cluster, Load(context, concurrency, 8192), ["none"])[0]


def test_deepseek_v25_has_a_replica_on_each_host_until_the_load_needs_a_pipeline_over_both() -> None:
    few, many = (best(V25, TWO_A100_HOSTS, 16384, concurrency) for concurrency in (16, 64))
    assert (few.split, few.replicas, few.hosts) == (Split("none", 8, 1), 2, 1)
    assert (many.split, many.replicas, many.hosts) == (Split("none", 8, 2), 1, 2)
    assert few.requests == 16
    assert many.requests >= 64


def test_a_model_that_one_gpu_holds_is_on_each() -> None:
    for model in SMOLLM2, LITE:
        chosen = best(model, TWO_A100_HOSTS, 8192, 64)
        assert (chosen.split, chosen.replicas) == (Split("none", 1, 1), 16)


def test_tensor_parallelism_stays_within_a_host_where_a_pipeline_serves() -> None:
    chosen = best(LLAMA_70B, Cluster(4, 2, 40 * G), 8192, 1)
    assert (chosen.split.tensor, chosen.crosses) == (2, False)
    across = plan(LLAMA_70B, Split("none", 8, 1), Cluster(4, 2, 40 * G), Load(8192, 1, 8192))
    assert across.serves
    assert across.crosses


@pytest.mark.parametrize(
    ("model", "split", "load", "bound", "sentence"),
    [
        (V25, Split("none", 8, 3), 1, "gpus", "needs 24 GPUs, 8 more than are available"),
        (SMOLLM2, Split("none", 2, 1), 1, "heads", "9 attention heads among 2 GPUs: 1 left over"),
        (V25, Split("int4", 8, 1), 1, "quantization groups", "192 inputs of an expert on each GPU in groups of 128"),
        (V25, Split("none", 4, 1), 1, "weights", "exceed the 71.3 GiB of a GPU by 46.0 GiB"),
        (V25, Split("none", 4, 1, 2, True), 1, "cache", "hold 15088 tokens, 1296 fewer than a request has: 85 MiB too little"),
        (V25, Split("none", 8, 2), 80, "concurrency", "serves 69 of 80 requests, 11 too few"),
        (V25, Split("none", 4, 3), 1, "placement", "12 GPUs in groups of 4: no number of hosts up to 2 has as many on each"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_bound_and_what_is_lacking(
    model: Architecture, split: Split, load: int, bound: str, sentence: str
) -> None:
    refused = plan(model, split, TWO_A100_HOSTS, Load(16384, load, 8192))
    assert (refused.bound, sentence in refused.verdict) == (bound, True), refused.verdict


@pytest.mark.parametrize(
    ("change", "tensor", "pipeline", "sentence"),
    [
        ({"num_hidden_layers": 12}, 1, 16, "12 layers leave 4 of 16 stages empty"),
        ({"num_attention_heads": 96, "num_key_value_heads": 6}, 4, 1, "6 key-value heads among 4 GPUs: 2 left over"),
        ({"num_attention_heads": 96, "num_key_value_heads": 6}, 8, 1, "8 GPUs among 6 key-value heads: 2 left over"),
        ({"num_attention_heads": 60, "num_key_value_heads": 30}, 5, 1, "a vocabulary of 128256 among 5 GPUs: 1 left over"),
        ({"intermediate_size": 28668}, 8, 1, "a feed-forward width of 28668 among 8 GPUs: 4 left over"),
    ],
)  # fmt: skip
def test_a_number_that_does_not_divide_is_refused(
    change: dict[str, int], tensor: int, pipeline: int, sentence: str
) -> None:
    changed = architecture_of({**VLLM["models"]["Llama-3-70B"], **change})
    refused = plan(changed, Split("none", tensor, pipeline), TWO_A100_HOSTS, Load(4096, 1, 8192))
    assert refused.verdict == sentence


def test_a_gpu_without_an_expert_is_refused() -> None:
    few = architecture_of({**VLLM["models"]["DeepSeek-V2.5"], "n_routed_experts": 10})
    refused = plan(few, Split("none", 1, 1, 16, True), TWO_A100_HOSTS, Load(4096, 1, 8192))
    assert refused.verdict == "10 experts leave 6 of 16 GPUs without one"


def test_a_model_without_shared_experts_is_counted() -> None:
    alone = architecture_of({**VLLM["models"]["DeepSeek-V2.5"], "n_shared_experts": 0})
    split = Split("fp8", 8, 1)
    assert stage_bytes(alone, split) < stage_bytes(V25, split)


def test_experts_are_whole_on_a_gpu_where_slices_of_them_are_not_possible() -> None:
    chosen = {split for split in splits(V25, TWO_A100_HOSTS, "int4", 8, 1) if split.data == 1}
    assert chosen == {Split("int4", 8, 1), Split("int4", 8, 1, 1, True)}
    assert plan(V25, Split("int4", 8, 1, 1, True), TWO_A100_HOSTS, Load(16384, 16, 8192)).serves


COMMAND = ["--memory", "80G", "--gpus", "8", "--hosts", "2", "--context", "16384"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "model", VLLM["models"]["DeepSeek-V2.5"]))


def test_the_command_prints_the_choice_its_reasons_and_other_plans(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--model", folder, *COMMAND, "--concurrency", "64"]) == 0
    text = capsys.readouterr().out
    assert "choice: 1 x (none, tensor 8, pipeline 2), serves 69" in text
    assert "preferred if it served: none, tensor 2, pipeline 4: serves 56 of 64 requests, 8 too few" in text
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2" in text
    assert [line.split()[0] for line in text.splitlines() if " sliced " in line] == ["none"] * 4 + [
        "fp8"
    ] * 4 + ["int4"] * 4


def test_the_json_has_the_same_and_the_exit_code_says_whether_a_split_serves(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "fit",
        "--model",
        folder,
        *COMMAND,
        "--json",
        "--quantization",
        "none",
        "--tensor-parallel",
        "8",
    ]
    assert main([*command, "--concurrency", "64"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["choice"]["tensor"], answer["choice"]["pipeline"], answer["choice"]["serves"]) == (
        8,
        2,
        True,
    )
    assert main([*command, "--concurrency", "400"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["choice"] is None
    assert "serves 68 of 400 requests, 332 too few" in [each["verdict"] for each in answer["refused"]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*COMMAND, "--concurrency", "0"], "--concurrency is 0: it must be at least 1"),
        ([*COMMAND, "--tensor-parallel", "0"], "--tensor-parallel is 0"),
        (
            [*COMMAND, "--quantization", "nf4"],
            "--quantization is nf4: with --hosts choose one of none, fp8, int4",
        ),
        (["--memory", "80G", "--quantization", "fp8"], "--quantization is fp8: it is counted with --hosts"),
    ],
)
def test_wrong_options_are_refused(
    folder: str, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(["fit", "--model", folder, *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_weights_are_counted_as_the_files_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = write_config(tmp_path / "model", {**VLLM["models"]["DeepSeek-V2.5"], **blocks})
    assert main(["fit", "--model", str(folder), *COMMAND, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {each["quantization"] for each in [answer["choice"], *answer["alternatives"]]} == {"fp8"}
    assert main(["fit", "--model", str(folder), *COMMAND, "--tensor-parallel", "16"]) == 0
    refused = "fp8, tensor 16: 96 inputs of an expert on each GPU in groups of 128: 96 left over"
    assert refused in capsys.readouterr().out
