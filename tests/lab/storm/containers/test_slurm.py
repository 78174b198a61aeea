"""Two hosts under a real slurmctld: a job that is stopped, or loses a host, goes on from its last good checkpoint."""

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import ROOT, Lab, changed, within

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
# One host's, which saves when it is told to stop, and not before.
ALONE = {
    **JOB,
    "name": "alone",
    "output": f"{HERE}/jobs/alone",
    "optim": {"steps": 100000, "lr": 0.001},
    "scale": {"tokens_per_step": 512, "micro_batch": 2},
    "keep": {"every_minutes": 600},
}
PREPARE = {
    "inputs": [{"path": "/usr/share/common-licenses", "format": "text"}],
    "tokenizer": BASE,
    "pack": {"seq_len": 128},
    "work": f"{HERE}/jobs/work",
    "output": f"{HERE}/jobs/rows",
}
SUBMIT = f"runuser -u llm-train -- llm-train run {HERE}/%s.yaml --prepare {HERE}/data.yaml --launcher slurm"
# What datatrove needs beyond what role llm_training installs, and our steps as a pipeline of its.
DATATROVE = ("datatrove", "dill", "humanize", "loguru", "multiprocess")
CLEANING = f"{HERE}/jobs/cleaning"
PYTHON = "/opt/llmtrain/current/bin/python3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    """A lab of its own, thrown away afterwards: two nodes of Slurm's, with a tiny DeepSeek-V2 on both."""
    lab = Lab("slurm-hosts")
    lab.run("--inventory", str(INVENTORY), "floor", timeout=2400)
    lab.run("site", "--tags", "llm_training,slurm_controller,slurm_node", timeout=2400)
    for host in HOSTS:
        make = f"{PYTHON} - {BASE} {TINY}"
        lab.on(host, make, given=TINY_DEEPSEEK.read_text())
        for name, content in (("job", JOB), ("alone", ALONE), ("data", PREPARE)):
            lab.on(host, f"cat > {HERE}/{name}.yaml", given=json.dumps(content))
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Lab) -> Iterator[None]:
    """What a test that failed left in the queue is not the next one's."""
    yield
    cluster.on("ops1", "scancel --user=llm-train")
    within(120, "no job is left", lambda: cluster.on("ops1", "squeue --noheader") == "")


def test_zero3_over_two_hosts_is_queued_again_when_one_loses_its_power_and_goes_on(cluster: Lab) -> None:
    number = cluster.on("ops1", f"{SUBMIT % 'job'} --traffic clear --hosts {','.join(HOSTS)}").strip()

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


def test_however_a_job_is_stopped_it_saves_and_goes_on_after_that_step(cluster: Lab) -> None:
    def submit(host: str) -> str:
        return cluster.on("ops1", f"{SUBMIT % 'alone'} --hosts {host}").strip()

    def steps(host: str, what: str) -> list[int]:
        """Steps after which the job of this host stopped, or went on, as its logs say."""
        logs = cluster.on(host, f"cat $(ls -tr {HERE}/jobs/alone.slurm-*.log)", check=False)
        return [int(step) for step in re.findall(rf"alone: {what} after step (\d+)", logs)]

    def trains(host: str, starts: int) -> None:
        """Wait for the first step after so many starts."""
        begun = f"grep --count 'first step' {ALONE['output']}/metrics.jsonl"
        within(600, f"{host} trains", lambda: cluster.on(host, begun, check=False).strip() == str(starts))

    def saved(host: str, stops: int) -> None:
        within(120, f"{host} has saved", lambda: len(steps(host, "stopped")) == stops)

    def slurm(*words: str) -> str:
        return cluster.on("ops1", f"scontrol {' '.join(words)}")

    def queued_again(number: str, times: int) -> None:
        def waits() -> bool:
            told = slurm("show", "job", number)
            return f"Restarts={times} " in told and "JobState=PENDING" in told

        within(60, "it is queued again", waits)
        # A job that begins in the second in which it ended is refused by its node, and is FAILED then.
        slurm("update", f"jobid={number}", "starttime=now+2")

    first, second = (submit(host) for host in HOSTS)
    trains("ops1", 1)
    trains("train1", 1)
    cluster.on("ops1", f"scancel --signal=TERM {first}")
    # A host that is to be mended.
    slurm("update", "nodename=train1", "state=drain", "reason=fan")
    slurm("requeue", second)
    saved("ops1", 1)
    saved("train1", 1)
    queued_again(first, 1)
    queued_again(second, 1)
    drained = "sinfo --noheader --nodes=train1 --format=%T"
    within(60, "no job is there", lambda: cluster.on("ops1", drained).strip() == "drained")
    slurm("update", "nodename=train1", "state=resume")
    trains("ops1", 2)
    trains("train1", 2)
    cluster.on("ops1", f"scancel {first}")
    # In minutes from its start: nearer than the grace.
    slurm("update", f"jobid={second}", "timelimit=5")
    saved("ops1", 2)
    saved("train1", 2)
    queued_again(second, 2)
    slurm("update", f"jobid={second}", "timelimit=unlimited")
    again = submit("ops1")
    trains("ops1", 3)
    trains("train1", 3)
    cluster.on("ops1", f"scancel {again} {second}")
    for host in HOSTS:
        saved(host, 3)
        assert steps(host, "stopped")[:2] == steps(host, "resumes")
    within(60, "no job is left", lambda: cluster.on("ops1", "squeue --noheader") == "")


def test_a_users_job_runs_as_the_trainer_in_the_users_name(cluster: Lab) -> None:
    """Submitted on one node, run on the other."""
    owned = {
        **ALONE,
        "name": "owned",
        "data": {"train": f"{HERE}/jobs/of-ada/rows"},
        "output": f"{HERE}/owners/ada/owned",
        "optim": {"steps": 5, "lr": 0.001},
    }
    files = {
        "owned": owned,
        "elsewhere": {**owned, "output": f"{HERE}/jobs/alone"},
        "data": {**PREPARE, "work": f"{HERE}/jobs/work-of-ada", "output": f"{HERE}/jobs/of-ada/rows"},
    }
    for host in HOSTS:
        cluster.on(host, "id ada || useradd --create-home ada")
        for name, content in files.items():
            cluster.on(host, f"cat > /tmp/{name}.yaml", given=json.dumps(content))
        cluster.on(host, "cd / && runuser -u llm-train -- llm-train data run --config /tmp/data.yaml")

    def submitted(user: str, name: str) -> str:
        command = f"runuser -u {user} -- llm-train submit /tmp/{name}.yaml --hosts train1"
        return cluster.on("ops1", f"{command} 2>&1; echo it ended with $?")

    assert f"output is {HERE}/jobs/alone: a job of ada may only write below" in submitted("ada", "elsewhere")
    assert "nobody may not submit jobs here" in submitted("nobody", "owned")
    assert cluster.on("ops1", "squeue --noheader") == ""
    said = submitted("ada", "owned")
    assert "it ended with 0" in said, said
    number = re.search(r"^(\d+)$", said, re.MULTILINE)[1]  # type: ignore[index]
    record = f"{owned['output']}/model/training.json"
    within(600, "the job's end", lambda: cluster.on("train1", f"cat {record}", check=False) != "")
    assert json.loads(cluster.on("train1", f"cat {record}"))["job"]["owner"] == "ada"
    ends = f"grep 'JobId={number} ' /var/lib/slurm/slurmctld/jobs"
    within(60, "it is in the books", lambda: "Account=ada" in cluster.on("ops1", ends, check=False))
    assert "UserId=llm-train" in cluster.on("ops1", ends)
    sacct = "sacct --noheader --parsable2 --allusers --allocations --accounts=ada --format=jobid,user,account,state"
    books = f"{number}|llm-train|ada|COMPLETED"
    within(60, "sacct has it", lambda: books in cluster.on("ops1", sacct).splitlines())
    cluster.on("ops1", "systemctl restart mariadb.service slurmdbd.service slurmctld.service")
    within(60, "and after a restart", lambda: books in cluster.on("ops1", sacct, check=False).splitlines())
    cluster.on("ops1", "systemctl start llmkeep-slurm-dump.service")
    assert "'ada'" in cluster.on("ops1", "cat /var/lib/llmkeep/slurm-accounting.sql")
    journal = cluster.on("ops1", "journalctl --unit='llm-train-submit@*' --output=cat")
    assert re.search(rf"ada \(uid \d+\) submitted owned, sha256 [0-9a-f]{{64}}: job {number}", journal)
    assert "nobody (uid 65534) was refused" in journal
    assert cluster.on("train1", "runuser -u ada -- ls /srv/llmkeep/training/owners/ada", check=False) == ""


def test_datatroves_slurm_executor_cleans_as_ours_does(cluster: Lab) -> None:
    """Paragraphs of licences in two files, one a task, each on a host of its own."""
    raw = f"""
import json, pathlib
found = pathlib.Path("/usr/share/common-licenses").glob("*")
texts = sorted({{text for file in found for text in file.read_text(errors="ignore").split("\\n\\n") if text.strip()}})
for file in range(2):
    lines = [json.dumps({{"text": text + " a@b.example"}}) + "\\n" for text in texts[file::2]]
    pathlib.Path(f"{CLEANING}/raw/{{file}}.jsonl").write_text("".join(lines))
"""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(ROOT / "payload/.venv")}))
    modules = {name: packages / name for name in DATATROVE}
    helper = ROOT / "payload/tests/helpers/datatrove_pipeline.py"
    programs = {
        "launch_pickled_pipeline": f'exec {PYTHON} -m datatrove.tools.launch_pickled_pipeline "$@"',
        # A variable that is named makes slurmd run a login shell in a namespace, which its unit is refused.
        "sbatch": 'case $1 in --export=ALL,*) export "${1#*ALL,}"; shift ;; esac; exec /usr/bin/sbatch "$@"',
    }
    for host in HOSTS:
        cluster.on(host, f"install --directory --owner=llm-train {CLEANING} {CLEANING}/raw")
        cluster.on(host, "python3 -", given=raw)
        cluster.send(host, f"{CLEANING}/lib", {**modules, helper.name: helper})
        for name, line in programs.items():
            program = f"{CLEANING}/lib/{name}"
            cluster.on(host, f"cat > {program} && chmod 0755 {program}", given=f"#!/bin/sh\n{line}\n")
    # Slurm knows no memory of the nodes, and datatrove asks for some.
    setting = f"PATH={CLEANING}/lib:$PATH PYTHONPATH={CLEANING}/lib HOME={CLEANING} SBATCH_MEM_PER_CPU=0"
    program = f"{CLEANING}/lib/datatrove_pipeline.py"
    cluster.on("ops1", f"runuser -u llm-train -- env {setting} {PYTHON} {program} {CLEANING}")
    # On an estate the folder of logs would be one that all nodes share.
    logs = cluster.on("ops1", f"tar -cC {CLEANING} logs | base64")
    cluster.on("train1", f"base64 -d | runuser -u llm-train -- tar -xC {CLEANING}", given=logs)
    number = cluster.on("ops1", "squeue --noheader --format=%F | sort --numeric-sort | head -1").strip()
    cluster.on("ops1", f"scontrol release {number}")
    done = f"ls {CLEANING}/logs/completions"
    within(300, "both are done", lambda: all(cluster.on(host, done, check=False) for host in HOSTS))
    cluster.on("ops1", "scancel --user=llm-train")  # what adds up the statistics, for want of a shared folder

    def texts(lines: str) -> list[str]:
        return sorted(json.loads(line)["text"] for line in lines.splitlines())

    def rules(host: str, files: str) -> list[str]:
        found = cluster.on(host, f"cat {CLEANING}/{files}", check=False).splitlines()
        return [json.loads(line)["rule"] for line in found]

    ours = {
        "inputs": [{"path": f"{CLEANING}/raw"}],
        "tokenizer": BASE,
        "pack": {"seq_len": 128},
        "work": f"{CLEANING}/ours",
        "output": f"{CLEANING}/out",
        "duplicates": {"near": None},
    }
    cluster.on("ops1", f"cat > {CLEANING}/ours.yaml", given=json.dumps(ours))
    cluster.on("ops1", f"runuser -u llm-train -- llm-train data run --config {CLEANING}/ours.yaml")
    kept = texts(cluster.on("ops1", f"zcat {CLEANING}/ours/personal/*/documents.jsonl.gz"))
    by_host = {host: texts(cluster.on(host, f"cat {CLEANING}/theirs-*")) for host in HOSTS}
    assert all(by_host.values())  # one task each
    assert sorted(text for each in by_host.values() for text in each) == kept
    dropped = sorted(rule for host in HOSTS for rule in rules(host, "rejects/*"))
    steps = "ours/{clean,annotate,quality,personal}/*/*-?????.jsonl"
    assert dropped == sorted(
        json.loads(line)["rule"]
        for line in cluster.on("ops1", f"bash -c 'cat {CLEANING}/{steps}'", check=False).splitlines()
    )


def test_a_host_with_another_estates_key_is_refused_until_it_has_ours(cluster: Lab) -> None:
    key = "/etc/credstore.encrypted/munge.key"
    other = f"openssl rand -hex 64 | tr -d '\\n' | systemd-creds encrypt --name=munge.key - {key}"
    cluster.on("train1", f"{other} && systemctl restart munge.service")
    said = cluster.on("train1", f"{SUBMIT % 'alone'} 2>&1; echo it ended with $?")
    assert "Slurm did not accept alone: " in said
    assert "Protocol authentication error" in said
    assert "it ended with 1" in said
    # No job is half there, and the controller says who it was.
    assert cluster.on("ops1", "squeue --noheader") == ""
    journal = cluster.on("ops1", "journalctl --unit=slurmctld --since=-5min --output=cat")
    assert re.search("train1.* REQUEST_SUBMIT_BATCH_JOB has authentication error", journal)
    cluster.run("site", "--tags", "slurm_node")
    cluster.on("train1", "runuser -u llm-train -- scontrol show config")


def test_hosts_that_have_fewer_gpus_than_declared_get_no_job(cluster: Lab) -> None:
    declared = ("--tags", "slurm_controller,slurm_node", "--extra-vars", '{"slurm_node_gpus": 1}')
    # Neither a device nor NVML: slurmd does not start, and says what is missing.
    assert cluster.run("site", *declared, check=False).returncode != 0
    assert "/dev/nvidia0" in cluster.on("train1", "journalctl --unit=slurmd --since=-5min --output=cat")
    # The device is there, and NVML has none.
    for host in HOSTS:
        cluster.on(host, "mknod /dev/nvidia0 c 1 3")
    done = cluster.run("site", *declared, check=False)
    assert done.returncode != 0
    assert "NVML has 0 GPUs, slurm_node_gpus is 1" in " ".join(done.stdout.split())
    number = cluster.on("ops1", f"{SUBMIT % 'alone'} --gpus 1").strip()
    within(60, "it waits", lambda: "JobState=PENDING" in cluster.on("ops1", f"scontrol show job {number}"))
    assert all(cluster.on(host, "ls /run/llmkeep-slurm") == "" for host in HOSTS)
    cluster.on("ops1", f"scancel {number}")
    for host in HOSTS:
        cluster.on(host, "rm /dev/nvidia0")
    cluster.run("site", "--tags", "slurm_controller,slurm_node", check=False)
    cluster.on("ops1", "scontrol update nodename=ops1,train1 state=resume")
    assert cluster.run("site", "--tags", "slurm_controller,slurm_node").returncode == 0
