"""DDP, ZeRO-2, ZeRO-3 and FSDP2 over two processes: the requested one runs, and all reach the same losses.

A DeepSeek-V2 is trained whole; everything is on a CPU over gloo.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import make_deepseek
from training_job import Bench, ranks, wait_for

from llmcore.manifest import write_manifest
from llmserve.local_run import free_port
from llmtrain.exits import DONE, FAILED, STOPPED, Refusal

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
from fsdp import FSDP  # noqa: E402 - needs torch


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A workshop that also has a DeepSeek-V2."""
    bench = Bench(tmp_path_factory.mktemp("strategies"))
    make_deepseek(bench.directory / "mixture", 2)
    write_manifest(bench.directory / "mixture", bench.directory / "mixture.sha256")
    return bench


def whole(bench: Bench, file: str, strategy: str, name: str = "whole", **changes: Any) -> Path:
    """A full training of the DeepSeek-V2: 24 steps."""
    scale = {"strategy": strategy, **changes}
    optim = {"precision": "fp32", "epochs": 2, "lr": 3e-3}
    model = str(bench.directory / "mixture")
    return bench.job(
        file,
        name=name,
        model=model,
        method={"kind": "full"},
        optim=optim,
        scale=scale,
        keep={"every_steps": 8},
    )


@pytest.fixture(scope="module")
def zero3(bench: Bench) -> Path:
    """An undisturbed job by ZeRO-3."""
    job = whole(bench, "zero3", "zero3")
    assert bench.run(job) == DONE, bench.said(job)
    return job


@pytest.fixture(scope="module")
def one(bench: Bench) -> Path:
    """An undisturbed job in one process, one row at a time."""
    job = whole(bench, "one", "ddp", processes=1, micro_batch=1)
    assert bench.run(job) == DONE, bench.said(job)
    return job


def stop(bench: Bench, strategy: str, job: Path | None = None, after: int = 3, copy: str = "alone") -> Path:
    """A job stopped by SIGTERM after so many steps, and a copy of its checkpoint for the job `COPY-STRATEGY`."""
    job = job or whole(bench, f"stopped-{strategy}", strategy)
    _, given = bench.hold(after, job)
    agent = bench.fork(job, held=given)
    wait_for(lambda: len(bench.losses(job)) >= after, agent)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=300) == STOPPED, bench.said(job)
    assert "stopped after step" in bench.said(job)
    saved = bench.directory / job.stem / "checkpoints"
    assert f"step-{max(bench.losses(job)):08d}" in {each.name for each in saved.iterdir()}
    shutil.copytree(saved, bench.directory / f"{copy}-{strategy}" / "checkpoints")
    return job


@pytest.fixture(scope="module")
def stopped(bench: Bench, zero3: Path) -> Path:
    """A job by ZeRO-3."""
    return stop(bench, "zero3")


def test_zero3_leaves_each_process_half_of_the_parameters(bench: Bench, zero3: Path) -> None:
    ran = bench.record(zero3, "model")["ran"]
    for rank in ran["ranks"]:
        assert (rank["engine"], rank["stage"]) == ("DeepSpeedEngine", 3)
        assert rank["parameters"] / rank["of"] == pytest.approx(0.5, abs=0.01)
        assert rank["optimized"] / rank["optimized_of"] == pytest.approx(0.5, abs=0.01)


def test_zero3_leaves_a_whole_model_that_learned(bench: Bench, zero3: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmtrain.data.rows import Rows
    from llmtrain.run.batches import batch

    losses = bench.losses(zero3)
    assert losses[24] < losses[1] - 0.5
    model = AutoModelForCausalLM.from_pretrained(
        bench.directory / "zero3" / "model", dtype=torch.float32
    ).eval()
    rows = Rows(bench.directory / "held-out")
    batches = batch([(rows[number], True) for number in range(len(rows))], "cpu")
    with torch.no_grad():
        assert batches.loss(model).item() / batches.learned < losses[1] - 0.5


def test_a_stopped_zero3_job_goes_on_as_if_it_had_not_been(bench: Bench, zero3: Path, stopped: Path) -> None:
    assert bench.run(stopped) == DONE, bench.said(stopped)
    assert bench.losses(stopped) == bench.losses(zero3)
    assert [each["lost"] for each in bench.record(stopped, "model")["resumed"]] == [""]


@pytest.mark.usefixtures("stopped")
def test_on_another_number_of_processes_zero3_goes_on_and_has_the_same_losses(
    bench: Bench, zero3: Path
) -> None:
    """Begun by two processes, gone on with by one, and ended by two."""
    alone = stop(bench, "zero3", whole(bench, "alone-zero3", "zero3", processes=1), after=6, copy="again")
    again = whole(bench, "again-zero3", "zero3")
    assert bench.run(again) == DONE, bench.said(again)
    resumed = bench.record(again, "model")["resumed"]
    assert [(each["world_size"], each["lost"]) for each in resumed] == [
        (1, "the random state of dropout"),
        (2, "the random state of dropout"),
    ]
    losses, undisturbed = {**bench.losses(alone), **bench.losses(again)}, bench.losses(zero3)
    assert set(losses) == set(range(resumed[0]["step"] + 1, 25))
    assert losses == pytest.approx({step: undisturbed[step] for step in losses}, rel=2e-3)


def test_a_job_over_two_nodes_goes_on_when_one_was_lost_and_comes_back(bench: Bench, zero3: Path) -> None:
    """Two agents with a disk each; one of them is killed with its process, as by a power cut."""
    with free_port() as port:
        where = ["--rendezvous", f"127.0.0.1:{port}", "--traffic", "clear"]
        jobs = [whole(bench, f"node{node}", "zero3", name="both", processes=1, nodes=2) for node in range(2)]
        held, given = bench.hold(9, *jobs)
        agents = [
            bench.fork(job, "--node-rank", str(node), *where, held=given) for node, job in enumerate(jobs)
        ]
        # Rank 0, which writes them, may be on either.
        wait_for(lambda: any(len(bench.losses(job)) >= 9 for job in jobs), agents[0])
        lost = [agents[1].pid, *ranks(agents[1])]
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        held.unlink()
        # torchrun orders agents of one address, which no estate has, by process id; process ids start again at the limit.
        LAST_PID.write_text(str(agents[1].pid))
        again = bench.fork(jobs[1], "--node-rank", "1", *where)
        assert [each.wait(timeout=300) for each in (agents[0], again)] == [DONE, DONE], bench.said(jobs[0])
        losses = {**bench.losses(jobs[0]), **bench.losses(jobs[1])}
        assert losses == bench.losses(zero3)
        assert bench.record(jobs[0], "model")["setup"]["traffic"] == "clear"


def test_zero3_on_two_processes_has_the_losses_of_one(bench: Bench, zero3: Path, one: Path) -> None:
    assert bench.losses(zero3) == pytest.approx(bench.losses(one), rel=2e-3)


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("fsdp", marks=FSDP)])
def test_two_processes_with_larger_batches_have_the_losses_of_one(
    bench: Bench, one: Path, strategy: str
) -> None:
    two = whole(bench, f"two-{strategy}", strategy, micro_batch=4)
    assert bench.run(two) == DONE, bench.said(two)
    assert bench.losses(two) == pytest.approx(bench.losses(one), rel=2e-3)
    ran = bench.record(two, "model")["ran"]
    assert ran["strategy"] == strategy
    if strategy == "fsdp":
        assert [each["parameters"] / each["of"] for each in ran["ranks"]] == pytest.approx(
            [0.5, 0.5], abs=0.01
        )


@FSDP
def test_a_stopped_fsdp_job_goes_on_with_two_processes_or_one(bench: Bench, one: Path) -> None:
    """FSDP2's shards are redistributed for another number of processes, and AdamW loses no state."""
    job = stop(bench, "fsdp")
    alone = whole(bench, "alone-fsdp", "fsdp", processes=1)
    for each in job, alone:
        assert bench.run(each) == DONE, bench.said(each)
    losses = bench.losses(one)
    assert bench.losses(job) == pytest.approx(losses, rel=2e-3)
    assert bench.losses(alone) == pytest.approx(
        {step: losses[step] for step in bench.losses(alone)}, rel=2e-3
    )


def test_what_was_not_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that reports the evidence of plain DDP."""
    from llmtrain.run.strategies.protocol import proven
    from llmtrain.run.strategies.zero import Zero

    pretended = Zero.__new__(Zero)
    pretended.name, pretended.stage, pretended.world_size = "zero3", 3, 1
    evidence = {
        "engine": "DeepSpeedEngine",
        "stage": 0,
        "parameters": 8,
        "of": 8,
        "optimized": 8,
        "optimized_of": 8,
    }
    monkeypatch.setattr(pretended, "evidence", lambda: evidence, raising=False)
    with pytest.raises(Refusal, match="nothing was trained") as refusal:
        proven(pretended)
    assert refusal.value.code == FAILED
