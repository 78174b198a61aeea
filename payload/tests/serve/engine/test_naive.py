"""The naive engine with a tiny random Llama, compared with calling `generate` directly."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from questions import error
from service import Service, events, eventually, running
from tiny import make_model

from llmcore.manifest import write_manifest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Über 東京, what is the capital?"}]
QUESTION = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
# An engine that says how many threads OpenBLAS has, in place of serving.
OPENBLAS = """
import ctypes, sys, uvloop
def told(served):
    served.close()
    print(ctypes.CDLL("libopenblas.so.0").openblas_get_num_threads())
    return 0
uvloop.run = told
from llmserve.cli import main
sys.exit(main(["engine", "--name", "tiny", "--config", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model(directory)
    write_manifest(directory, directory / "MANIFEST.sha256")
    return directory


@pytest.fixture(scope="module")
def naive(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway in front of the naive engine."""
    described = {
        "driver": "naive",
        "path": str(model),
        "manifest": str(model / "MANIFEST.sha256"),
        "threads": 1,
        "temperature": 0,
    }
    with running(tmp_path_factory.mktemp("naive"), {"tiny": described}) as service:
        yield service


@pytest.fixture
def client(naive: Service) -> Iterator[httpx.Client]:
    with naive.client() as client:
        yield client


def text_of(client: httpx.Client, **change: Any) -> str:
    """Text of the answer."""
    answer = client.post(CHAT, json={**QUESTION, **change})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_a_greedy_answer_equals_that_of_generate(client: httpx.Client, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    reference: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    whole = reference.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    answer = client.post(CHAT, json=QUESTION).json()
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(whole, skip_special_tokens=True)
    assert answer["usage"] == {
        "prompt_tokens": ids.shape[1],
        "completion_tokens": len(whole),
        "total_tokens": ids.shape[1] + len(whole),
    }
    assert answer["system_fingerprint"].endswith("-bfloat16")


def test_a_stream_adds_up_to_the_whole_answer(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json={**QUESTION, "stream": True}) as answer:
        chunks = events(answer)[:-1]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == text_of(client)


def test_a_seed_repeats_a_sampled_answer_and_top_p_narrows_it(client: httpx.Client) -> None:
    first = text_of(client, temperature=1.0, seed=7)
    assert text_of(client, temperature=1.0, seed=7) == first
    assert text_of(client, temperature=1.0, seed=8) != first
    assert text_of(client, temperature=1.0, top_p=1e-6, seed=7) == text_of(client)


def test_a_request_without_a_temperature_uses_the_configured_one(client: httpx.Client) -> None:
    assert text_of(client, temperature=None) == text_of(client)


def test_a_stop_string_stops_the_model_too(client: httpx.Client) -> None:
    whole = text_of(client)
    stop = whole[6:8]
    answer = client.post(CHAT, json={**QUESTION, "stop": stop}).json()
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 24


def test_generate_uses_the_chat_template_and_completions_do_not(client: httpx.Client) -> None:
    chat = client.post("/generate", json={"prompt": MESSAGES[0]["content"], "max_tokens": 24}).json()
    assert chat["response"] == text_of(client)
    body = {"model": "tiny", "prompt": MESSAGES[0]["content"], "max_tokens": 3, "temperature": 0}
    plain = client.post("/v1/completions", json=body).json()
    assert plain["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]


def test_messages_that_the_chat_template_refuses_are_a_400(client: httpx.Client) -> None:
    body = {**QUESTION, "messages": [{"role": "assistant", "content": "x"}]}
    assert "the user speaks first" in error(client.post(CHAT, json=body), 400, "invalid_value")["message"]


def test_a_prompt_longer_than_the_context_is_refused_before_the_model_runs(client: httpx.Client) -> None:
    body = {**QUESTION, "messages": [{"role": "user", "content": "zq" * 3000}]}
    assert "2048" in error(client.post(CHAT, json=body), 400, "context_length_exceeded")["message"]


def test_a_disconnected_client_stops_the_model_within_a_step(naive: Service, client: httpx.Client) -> None:
    def worked() -> int:
        """CPU time of the engine in clock ticks, which for a step does not depend on the load of the machine."""
        stat = Path(f"/proc/{naive.engines['tiny'].process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:13]))

    before = worked()
    usage = client.post(CHAT, json={**QUESTION, "max_tokens": 200}).json()["usage"]
    a_fifth = worked() - before
    assert usage["completion_tokens"] == 200
    long = {**QUESTION, "max_tokens": 1024, "stream": True, "temperature": 1.0, "seed": 1}
    with client.stream("POST", CHAT, json=long) as answer:
        next(answer.iter_lines())
    before = worked()
    running_now = 'llm_requests_running{model="tiny"}'
    eventually("the slot is free", lambda: naive.metrics()[running_now] == 0, 3)
    assert text_of(client, max_tokens=1) is not None
    assert worked() - before < a_fifth


def test_changed_weights_are_refused_before_they_are_loaded(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    service = Service(
        tmp_path, {"tiny": {"driver": "naive", "path": str(copy), "manifest": str(copy / "MANIFEST.sha256")}}
    )
    service.start_engine("tiny", wait=False)
    process = service.engines["tiny"]
    assert process.process.wait(60) == 4
    process.stop()
    assert "model.safetensors has sha256" in service.logs()
    assert "Traceback" not in service.logs()


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one processor, for which OpenBLAS has one thread"
)
def test_openblas_has_as_many_threads_as_the_engine_was_given(model: Path, tmp_path: Path) -> None:
    manifest = str(model / "MANIFEST.sha256")
    described = {
        "driver": "naive",
        "path": str(model),
        "manifest": manifest,
        "threads": 1,
        "dtype": "float32",
    }
    config = tmp_path / "engine.yaml"
    config.write_text(yaml.safe_dump({"socket": str(tmp_path / "socket"), "model": described}))
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", OPENBLAS, str(config)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "1", done.stderr
