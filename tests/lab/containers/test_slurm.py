"""Two hosts train under a real slurmctld; one loses its power, and the job goes on from its last good checkpoint."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import Lab, changed, within

pytestmark = pytest.mark.skipif(
    "STORM" not in os.environ, reason="torch on two hosts takes minutes: `make storm` has it"
)
INVENTORY = Path(__file__).with_name("slurm_hosts")
TINY_DEEPSEEK = Path(__file__).parents[1] / "kernels/tiny_deepseek.py"
HOSTS = ("ops1", "train1")
HERE = "/srv/llmkeep/training"
BASE = f"{HERE}/models/smollm2-135m-instruct"
TINY = f"{HERE}/models/tiny-deepseek"
JOB = {
    "name": "deepseek",
    "model": TINY,
    "manifest": f"{TINY}/SHA256SUMS",
    "method": {"kind": "full"},
    "data": {"train": f"{HERE}/jobs/rows"},
    "output": f"{HERE}/jobs/deepseek",
    "optim": {"steps": 60, "lr": 0.001},
    "scale": {"nodes": 2, "strategy": "zero3", "tokens_per_step": 512, "micro_batch": 2},
    "keep": {"every_steps": 5},
    "watch": {"log_every": 1},
}
PREPARE = {
    "inputs": [{"path": "/usr/share/common-licenses", "format": "text"}],
    "tokenizer": BASE,
    "pack": {"seq_len": 128},
    "work": f"{HERE}/jobs/work",
    "output": f"{HERE}/jobs/rows",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    """A lab of its own, thrown away afterwards: two nodes of Slurm's, with a tiny DeepSeek-V2 on both."""
    lab = Lab("slurm-hosts")
    lab.run("--inventory", str(INVENTORY), "floor", timeout=2400)
    lab.run("site", "--tags", "llm_training,slurm_controller,slurm_node", timeout=2400)
    for host in HOSTS:
        make = f"/opt/llmtrain/current/bin/python3 - {BASE} {TINY}"
        lab.on(host, make, given=TINY_DEEPSEEK.read_text())
        for name, content in (("job", JOB), ("data", PREPARE)):
            lab.on(host, f"cat > {HERE}/{name}.yaml", given=json.dumps(content))
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


def test_zero3_over_two_hosts_is_queued_again_when_one_loses_its_power_and_goes_on(cluster: Lab) -> None:
    submit = f"llm-train run {HERE}/job.yaml --prepare {HERE}/data.yaml --launcher slurm --traffic clear"
    number = cluster.on("ops1", f"runuser -u llm-train -- {submit} --hosts {','.join(HOSTS)}").strip()

    def has(fact: str) -> bool:
        return fact in cluster.on("ops1", f"scontrol show job {number}")

    def saves() -> list[str]:
        return cluster.on("train1", f"ls {JOB['output']}/checkpoints", check=False).split()

    within(600, "two saves", lambda: len(saves()) >= 2)
    cluster.run("power-off", "train1")
    within(120, "the job is queued again", lambda: has("Restarts=1"))
    cluster.run("power-on", "train1")
    within(900, "the job's end", lambda: has("JobState=COMPLETED"))
    told = json.loads(cluster.on("ops1", f"cat {JOB['output']}/model/training.json"))
    assert (told["step"], told["ran"]["strategy"], told["ran"]["world_size"]) == (60, "zero3", 2)
    assert told["resumed"]
    assert all(resumed["step"] >= 5 and not resumed["lost"] for resumed in told["resumed"])
    assert told["losses"]["60"] < told["losses"]["1"] - 1
    # The books have the loss of the node, and the end.
    ends = cluster.on("ops1", f"grep 'JobId={number} ' /var/lib/slurm/slurmctld/jobs")
    assert [line.split("JobState=")[1].split()[0] for line in ends.splitlines()] == [
        "NODE_FAIL",
        "COMPLETED",
    ]
    # No job, no key.
    assert cluster.on("ops1", "ls /run/llmkeep-slurm") == ""
    again = cluster.run("site", "--tags", "slurm_controller,slurm_node").stdout
    assert changed(again) == dict.fromkeys(HOSTS, 0)
