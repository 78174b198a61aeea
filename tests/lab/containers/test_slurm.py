"""Two hosts train under a real slurmctld; one loses its power, and the job goes on from its last good checkpoint."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from estate import Lab, within

pytestmark = pytest.mark.skipif(
    "STORM" not in os.environ, reason="torch on two hosts takes minutes: `make storm` has it"
)
NODES = ("llm1", "ops1")
HERE = "/srv/llmkeep/training"
BASE = f"{HERE}/models/smollm2-135m-instruct"
TINY = f"{HERE}/models/tiny-deepseek"
# Both hosts of the lab train, without volumes, and one of them is the controller, too.
GROUPS: dict[str, Any] = {
    "all": {
        "children": {
            "train": {
                "hosts": dict.fromkeys(NODES),
                "vars": {
                    "llm_training_models": ["smollm2-135m-instruct"],
                    "llm_training_plain_disk_allowed": True,
                    # ESP needs a kernel of its own.
                    "llm_training_encrypt": False,
                },
            },
            "slurm_controller": {
                "hosts": {"ops1": None},
                "vars": {
                    "slurm_controller_cgroups": False,
                    "slurm_controller_node_seconds": 20,
                    "slurm_controller_kill_seconds": 10,
                },
            },
            "slurm_node": {"hosts": dict.fromkeys(NODES)},
        }
    }
}
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
AS_TRAINER = "runuser -u llm-train --"


@pytest.fixture(scope="module")
def cluster(floor_again: Lab) -> Iterator[Lab]:
    """Two nodes of Slurm's with a tiny DeepSeek-V2 on both."""
    lab = floor_again
    lab.on("ops1", "cat > /root/slurm.json", given=json.dumps(GROUPS))
    lab.on("ops1", f"{lab.site_command} -i /root/slurm.json -t llm_training,slurm", timeout=1800)
    script = (Path(__file__).parents[1] / "kernels/tiny_deepseek.py").read_text()
    for host in NODES:
        lab.on(host, f"/opt/llmtrain/current/bin/python3 - {BASE} {TINY}", given=script)
        for name, content in (("job", JOB), ("data", PREPARE)):
            lab.on(host, f"cat > {HERE}/{name}.yaml", given=json.dumps(content))
    yield lab


def test_zero3_over_two_hosts_is_queued_again_when_one_loses_its_power_and_goes_on(cluster: Lab) -> None:
    submit = (
        f"{AS_TRAINER} llm-train run {HERE}/job.yaml --prepare {HERE}/data.yaml --launcher slurm --traffic clear "
        f"--hosts {','.join(NODES)}"
    )
    number = cluster.on("ops1", submit).strip()
    within(
        600,
        "a second save",
        lambda: len(cluster.on("llm1", f"ls {JOB['output']}/checkpoints", check=False).split()) >= 2,
    )
    cluster.run("power-off", "llm1")
    within(
        120,
        "the job is queued again",
        lambda: "Restarts=1" in cluster.on("ops1", f"scontrol show job {number}"),
    )
    cluster.run("power-on", "llm1")
    within(
        900,
        "the job's end",
        lambda: "JobState=COMPLETED" in cluster.on("ops1", f"scontrol show job {number}"),
    )
    told = json.loads(cluster.on("llm1", f"cat {JOB['output']}/model/training.json"))
    assert (told["step"], told["ran"]["strategy"], told["ran"]["world_size"]) == (60, "zero3", 2)
    assert told["resumed"]
    assert all(resumed["step"] >= 5 and not resumed["lost"] for resumed in told["resumed"])
    assert told["losses"]["60"] < told["losses"]["1"] - 1
    # Accounting has both: the loss of the node, and the end.
    ends = cluster.on("ops1", f"grep 'JobId={number} ' /var/lib/slurm/slurmctld/jobs")
    assert [line.split("JobState=")[1].split()[0] for line in ends.splitlines()] == ["NODE_FAIL", "COMPLETED"]
