"""Two hosts train together, and what comes out of it answers through the edge. Takes half an hour: `make storm` has it."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from estate import Lab, answers, changed, fetch_sign_and_add, job_done, open_client, serve_models

HOSTS = ("train1", "train2")
HERE = "/srv/llmkeep/training"
BASE = f"{HERE}/models/smollm2-135m-instruct"
INVENTORIES = ("inventory/lab/hosts.yml", "inventory/lab-kernel", "inventory/lab-train")


def job(name: str, model: str, rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A job on the licences that every Debian has, and the rows of it."""
    prepare = {
        "inputs": [{"path": "/usr/share/common-licenses", "format": "text"}],
        "tokenizer": BASE,
        "pack": rows,
        "work": f"{HERE}/jobs/{name}-work",
        "output": f"{HERE}/jobs/{name}-rows",
    }
    return {"name": name, "model": model, "prepare": prepare, "data": {"train": prepare["output"]}, **more}


@pytest.fixture(scope="module")
def trainers() -> Iterator[Lab]:
    """The lab's estate with two hosts that train, and a tiny DeepSeek-V2 on both."""
    lab = Lab("train", INVENTORIES)
    lab.floor()
    for host in ("ops1", "llm1", *HOSTS):
        lab.run("restore", host, "floor")
    lab.on("ops1", lab.site_command, timeout=2400)
    script = Path(__file__).with_name("tiny_deepseek.py").read_text()
    make = f"/opt/llmtrain/current/bin/python3 - {BASE} {HERE}/models/tiny-deepseek"
    for host in HOSTS:
        lab.on(host, make, given=script)
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


def train(lab: Lab, *jobs: dict[str, Any]) -> str:
    """What an operator does: the jobs into the inventory, and the playbook."""
    variables = json.dumps({"train": {"vars": {"llm_training_jobs": list(jobs)}}})
    lab.on("ops1", "cat > /root/jobs.json", given=variables)
    return lab.on("ops1", f"{lab.site_command} -i /root/jobs.json -t llm_training", timeout=1800)


def saved(lab: Lab, host: str, name: str) -> list[str]:
    return lab.on(host, f"ls {HERE}/jobs/{name}/checkpoints", check=False).split()


def test_zero3_over_two_hosts_goes_on_from_its_last_good_checkpoint_after_a_power_cut(trainers: Lab) -> None:
    deepseek = job(
        "deepseek",
        f"{HERE}/models/tiny-deepseek",
        {"seq_len": 128},
        method={"kind": "full"},
        optim={"steps": 60, "lr": 0.001},
        scale={"strategy": "zero3", "tokens_per_step": 512, "micro_batch": 2},
        keep={"every_steps": 5},
        watch={"log_every": 1},
    )
    train(trainers, deepseek)
    end = time.monotonic() + 600
    while len(saved(trainers, "train2", "deepseek")) < 2:
        assert time.monotonic() < end, trainers.on("train1", "journalctl --unit 'llm-train@*' --lines 40")
        time.sleep(2)
    trainers.run("power-off", "train2")
    time.sleep(5)
    trainers.run("power-on", "train2")
    for host in HOSTS:
        job_done(trainers, host, "llm-train@deepseek")
    told = json.loads(trainers.on("train1", f"cat {HERE}/jobs/deepseek/model/training.json"))
    assert (told["step"], told["ran"]["strategy"], told["ran"]["world_size"]) == (60, "zero3", 2)
    for rank in told["ran"]["ranks"]:
        assert 0.4 < rank["parameters"] / rank["of"] < 0.6
    assert told["resumed"]
    assert all(resumed["step"] >= 5 and not resumed["lost"] for resumed in told["resumed"])
    assert told["losses"]["60"] < told["losses"]["1"] - 1
    again = train(trainers, deepseek)
    assert all(changed(again)[host] == 0 for host in HOSTS)


def test_an_adapter_is_gated_published_installed_and_answers(trainers: Lab) -> None:
    learned = job(
        "licences",
        "smollm2-135m-instruct",
        {"seq_len": 128},
        method={"kind": "lora"},
        optim={"steps": 60, "lr": 0.001},
        scale={"tokens_per_step": 256, "micro_batch": 1},
    )
    train(trainers, learned)
    for host in HOSTS:
        job_done(trainers, host, "llm-train@licences")
    output = f"{HERE}/jobs/licences"
    # Held out: other licences, which have the words and not the text.
    held_out = """import json, pathlib
texts = [path.read_text(errors="replace")[:1500] for path in sorted(pathlib.Path("/usr/share/doc").glob("*/copyright"))]
for text in list(dict.fromkeys(texts))[:40]:
    print(json.dumps({"text": text}))
"""
    trainers.on("train1", f"python3 - > {HERE}/held-out.jsonl", given=held_out)
    # In float32, whose products Debian's torch leaves to OpenBLAS.
    adapted = f"{BASE}+{output}/adapter"
    asked = f"--data {HERE}/held-out.jsonl --out {output}/verdict.json --dtype float32"
    compare = f"llm-train compare {BASE} {adapted} {asked}"
    trainers.on("train1", compare, timeout=3000)
    trainers.on(
        "train1",
        f"llm-train publish {output} --into {HERE}/jobs/candidate --name licences-1 --licence Apache-2.0",
    )
    fetch_sign_and_add(trainers, trainers.command("release fetch train1 candidate"))
    models = [
        {
            "name": "licences",
            "driver": "naive",
            "release": "licences-1",
            "memory": "1G",
            "context": 2048,
            "threads": 1,
        }
    ]
    serve_models(trainers, models)
    assert "Paris" in answers(open_client(trainers))
