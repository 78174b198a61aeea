"""The training loop: what each process of a job does, from the start of the process group to the exported weights.

The loss is the mean cross entropy over the positions of a step that count, over all batches of all ranks, so that neither
accumulation nor the number of GPUs changes it.
"""

import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as distributed

from llmcore.files import write_aside
from llmtrain.data.rows import Rows
from llmtrain.exits import DONE, STOPPED, Refusal
from llmtrain.job import Job, Optim, Preference
from llmtrain.run.batches import Batch, Make, evaluation_batches, step_batches
from llmtrain.run.checkpoint import Checkpoints
from llmtrain.run.collectives import gathered, together
from llmtrain.run.export import export, put
from llmtrain.run.health import Health, Norms, gradient_norms
from llmtrain.run.model import load
from llmtrain.run.preferences import Compared, Preferences, measured_drift, set_drift
from llmtrain.run.report import Report, peak_memory
from llmtrain.run.setup import Setup, job_digest
from llmtrain.run.state import Step, Training, TrainingState
from llmtrain.run.strategies.ddp import Ddp
from llmtrain.run.strategies.fsdp import Fsdp
from llmtrain.run.strategies.protocol import Strategy, proven
from llmtrain.run.strategies.zero import Zero

WAIT = timedelta(minutes=10)  # for the other ranks in a collective


def learning_rate(optim: Optim, before: float, after: float) -> float:
    """The learning rate of a step that starts at the share `before` of the job's rows and ends at `after`, each from 0 to 1."""
    if after < optim.warmup:
        return optim.lr * after / optim.warmup
    if optim.schedule == "constant" or optim.warmup == 1:
        return optim.lr
    past = max(0.0, (before - optim.warmup) / (1 - optim.warmup))
    return optim.lr * ((1 + math.cos(math.pi * past)) / 2 if optim.schedule == "cosine" else 1 - past)


def train(job: Job, setup: Setup, key: bytes) -> int:
    """Run one process of a job; return the exit code, on which all ranks agree.

    Errors other than Refusal propagate: torchrun then restarts all processes, which resume from the last good checkpoint.
    """
    asked_to_stop: list[int] = []
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _: asked_to_stop.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    start_process_group(setup, "nccl" if cuda else "gloo")
    try:
        return learn(job, setup, key, device, asked_to_stop)
    except Refusal as refusal:
        if os.environ["LOCAL_RANK"] == "0":
            print(f"llm-train: {refusal}", file=sys.stderr, flush=True)
        return refusal.code
    except Exception as error:
        clear_frames(error.__traceback__)  # they hold the model
        raise
    finally:
        leave_process_groups()


def learn(job: Job, setup: Setup, key: bytes, device: torch.device, asked_to_stop: list[int]) -> int:
    """Train, and export what was trained; returns the exit code."""
    training = prepare(job, setup, key, device)
    if not train_steps(training, asked_to_stop):
        return STOPPED
    finish(training)
    return DONE


def start_process_group(setup: Setup, backend: str) -> None:
    """Initialize torch.distributed, or DeepSpeed's wrapper of it. Call it before the model is loaded, which ZeRO-3 shards as
    it loads."""
    if setup.deepspeed is None:
        distributed.init_process_group(backend, timeout=WAIT)
        return
    if backend == "gloo":
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    refuse_to_compile()
    # On a CPU DeepSpeed would compile this at first use; torch's gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, timeout=WAIT, verbose=False)


def leave_process_groups() -> None:
    """Leave all process groups. Call it when nothing refers to the model: DDP's reducer holds a group as well.

    Whatever frees a group of gloo waits for its threads, and one of them may wait for the GIL to free a tensor. Only the type of
    its backend lets go of the GIL (pytorch issue 56297; torch 2.8 does for the group too), so that has to be freed last.
    """
    gc.collect()
    groups = list(distributed.distributed_c10d._world.pg_map)
    backends = [group._get_backend(device) for group in groups for device in group._device_types]
    del groups
    distributed.destroy_process_group()
    del backends


def refuse_to_compile() -> None:
    """Make DeepSpeed raise Refusal if it would compile one of its operators, instead of trying for a minute."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    def refuse(builder: Any, verbose: bool = True) -> None:
        raise Refusal(
            f"DeepSpeed would compile its operator '{builder.name}', but hosts have neither nvcc nor a compiler: remove what "
            "asks for it from the job's environment (DS_…); torch's AdamW, alone or with scale.offload, needs none"
        )

    OpBuilder.jit_load = refuse


def start_strategy(job: Job, setup: Setup, device: torch.device) -> Strategy:
    """Load the model and distribute it."""
    if setup.deepspeed is None:
        model = load(job, setup, device)
        strategy = Fsdp if setup.strategy == "fsdp" else Ddp
        return strategy(model, job.optim, setup.precision, device)
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(setup.deepspeed)  # as long as it exists, transformers loads for ZeRO-3
    model = load(job, setup, device)
    return Zero(model, setup.precision, device, setup.deepspeed, alive)


def prepare(job: Job, setup: Setup, key: bytes, device: torch.device) -> Training:
    """Load everything, and resume from the newest good checkpoint if there is one; raises Refusal."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    digest = job_digest(job)
    job.output.mkdir(parents=True, exist_ok=True)
    report = Report(job.name, job.output / "metrics.jsonl", job.watch.metrics, rank == 0, job.watch.log_every)

    rows, held_out = Rows(job.data.train), Rows(job.data.eval) if job.data.eval else None
    refuse_differences([digest, asdict(setup.verified)])

    torch.manual_seed(job.seed)  # all ranks initialize the same adapters
    strategy = together(lambda: start_strategy(job, setup, device))
    evidence = proven(strategy)
    torch.manual_seed(job.seed + 1 + rank)  # but draw their own dropout
    report.say(
        f"{job.name}: {job.method.kind} by {evidence['strategy']} on {world_size} rank(s) of {device.type}, {setup.precision}, "
        f"{sum(whole_size(each) for each in strategy.model.parameters() if each.requires_grad) / 1e6:.2f} M trainable parameters"
    )

    newest = (
        Path(os.environ.get("STATE_DIRECTORY", job.output)) / "newest-save"
    )  # systemd's is on another disk
    checkpoints = together(lambda: Checkpoints(job.output / "checkpoints", key, job.keep.last, newest=newest))
    training = Training(
        job=job,
        setup=setup,
        device=device,
        rows=rows,
        held_out=held_out,
        strategy=strategy,
        evidence=evidence,
        checkpoints=checkpoints,
        report=report,
        health=Health(job, setup.active_parameters, world_size, setup.peak_flops),
        state=TrainingState(data=setup.verified.data, job_digest=digest, world_size=world_size),
        saved_at=0.0,
        make=maker(job, setup, strategy, rows, device),
        make_held_out=maker(job, setup, strategy, held_out, device) if held_out else None,
    )
    resume(training)
    training.saved_at = time.monotonic()
    return training


def maker(job: Job, setup: Setup, strategy: Strategy, rows: Rows, device: torch.device) -> Make | None:
    """Makes the batches of rows for DPO or KTO. The model is the reference: it is untrained and no checkpoint is loaded."""
    if rows.objective == "sft":
        return None
    preferences = Preferences(rows, job.preference or Preference())
    strategy.module.eval()
    with torch.no_grad():
        preferences.measure_reference(
            partial(log_probabilities, strategy),
            partial(added_up, device=device),
            setup.micro_batch,
            strategy.rank,
            strategy.world_size,
            device,
        )
    strategy.module.train()
    return preferences.batch


def log_probabilities(strategy: Strategy, batch: Compared) -> torch.Tensor:
    """The log-probability of each answer under the current model; shape (rows, documents)."""
    return strategy.computed(batch.log_probabilities)


def drift(training: Training, batches: Iterable[Batch]) -> float:
    """For KTO: how far the model has moved, measured on all batches of a step or of an evaluation."""
    with torch.no_grad():
        return measured_drift(
            batches, partial(log_probabilities, training.strategy), partial(added_up, device=training.device)
        )


def resume(training: Training) -> None:
    """Restore the newest good checkpoint, if there is one; raises Refusal if it belongs to another job or other data."""
    job, state = training.job, training.state
    checkpoint = training.checkpoints.latest_good()
    if checkpoint is None:
        return
    saved = TrainingState(**checkpoint.state)
    for name, differs in (
        ("job_digest", saved.job_digest != state.job_digest),
        ("data", saved.data != state.data),
    ):
        if differs:
            raise Refusal(
                f"{checkpoint.folder} belongs to another job or other data ({name}): set another output for this job, or move it "
                f"away"
            )
    lost = training.strategy.read(checkpoint.folder, checkpoint.world_size)
    saved.world_size = state.world_size
    saved.resumed.append({"step": checkpoint.step, "world_size": state.world_size, "lost": lost})
    training.state = saved
    training.report.event(event="resumed", step=checkpoint.step, lost=lost)
    training.report.say(
        f"{job.name}: resumes after step {checkpoint.step}, saved by {checkpoint.world_size} rank(s)"
        + (f"; LOST, as {state.world_size} run now: {lost}" if lost else "")
    )


def train_steps(training: Training, asked_to_stop: list[int]) -> bool:
    """Train until the job is finished (return True), or until a rank was asked to stop and all have saved (return False)."""
    job, state = training.job, training.state
    while not training.finished:
        step = train_step(training, asked_to_stop)
        report_step(training, step)
        at_step = job.keep.every_steps is not None and state.step % job.keep.every_steps == 0
        saving = step.stopping or step.save_due or at_step or state.cursor == training.end
        if state.step % job.watch.eval_every == 0 if job.watch.eval_every else saving and not step.stopping:
            evaluate(training)
        if saving or training.finished:
            training.checkpoints.save(state.step, training.strategy.write, asdict(state))
            training.saved_at = time.monotonic()
        if step.stopping and not training.finished:
            training.report.say(
                f"{job.name}: stopped after step {state.step}, which is saved; run the same command to resume"
            )
            return False
    return True


def train_step(training: Training, asked_to_stop: list[int]) -> Step:
    """Take one optimizer step, and advance the state."""
    job, setup, state, strategy = training.job, training.setup, training.state, training.strategy
    begun, computed = time.monotonic(), time.process_time()
    cursor, after = state.cursor, min(state.cursor + training.rows_a_step, training.end)
    batches = step_batches(
        training.rows, job.seed, cursor, training.end, setup.micro_batch, setup.accumulation,
        strategy.rank, strategy.world_size, training.device, training.make,
    )  # fmt: skip
    if training.rows.objective == "kto":
        set_drift(batches, drift(training, batches))
    own = torch.tensor([sum(each.learned for each in batches), sum(each.tokens for each in batches)])
    learned, tokens = added_up(own.double(), training.device).tolist()
    lr = learning_rate(job.optim, cursor / training.end, after / training.end)
    norms: list[Norms] = []
    looks = (state.step + 1) % job.watch.log_every == 0
    look = partial(measure, strategy, norms) if looks else lambda: None
    own_loss, norm = strategy.learn(batches, max(1, int(learned)), lr, look)
    due = strategy.rank == 0 and time.monotonic() - training.saved_at > 60 * job.keep.every_minutes
    local_sums = torch.tensor([float(own_loss), bool(asked_to_stop), due], dtype=torch.float64)
    summed_loss, stopping, save_due = added_up(local_sums, training.device).tolist()
    loss = summed_loss / max(1, learned)
    state.step, state.cursor = state.step + 1, after
    if state.step % job.watch.log_every == 0 or state.step == 1 or after == training.end:
        state.losses[str(state.step)] = loss
    return Step(
        cursor=cursor,
        loss=loss,
        lr=lr,
        norm=norm,
        norms=norms[-1] if norms else None,
        tokens=tokens,
        seconds=time.monotonic() - begun,
        cpu_seconds=time.process_time() - computed,
        stopping=bool(stopping),
        save_due=bool(save_due),
    )


def report_step(training: Training, step: Step) -> None:
    """Report a step and the findings of the health rules; raises Refusal if the training must stop."""
    state, scale, report, health = training.state, training.strategy.scale, training.report, training.health
    of = state.step + math.ceil((training.end - state.cursor) / training.rows_a_step)
    facts: dict[str, Any] = {
        "loss": step.loss, "lr": step.lr, "grad_norm": step.norm, "loss_scale": scale, "tokens": step.tokens,
        **health.speed(step.tokens, step.seconds), **(step.norms.facts() if step.norms else {}),
        "memory_gb": peak_memory(training.device), "cursor": state.cursor, "cpu_seconds": step.cpu_seconds,
    }  # fmt: skip
    report.step(state.step, of, step.seconds, facts)
    verdict = health.step(state.step, step.loss, step.norm, step.cursor, scale, step.norms)
    for finding in verdict.news:
        report.event(event=finding.rule, step=state.step, message=finding.message)
        report.say(f"{training.job.name}: {finding.message}")
    verdict.refuse()


def evaluate(training: Training) -> None:
    """Compute the loss on the held-out rows, if there are any. If it is the lowest so far and the job has `optim.patience`,
    export the weights."""
    job, state, strategy = training.job, training.state, training.strategy
    if training.held_out is None:
        return
    strategy.module.eval()
    summed = torch.zeros(2, dtype=torch.float64)
    batches = partial(
        evaluation_batches,
        training.held_out,
        training.setup.micro_batch,
        strategy.rank,
        strategy.world_size,
        training.device,
        training.make_held_out,
    )
    moved = drift(training, batches()) if training.held_out.objective == "kto" else 0.0
    with torch.no_grad():
        for batch in batches():
            set_drift([batch], moved)
            summed += torch.tensor([float(strategy.computed(batch.loss)), batch.learned], dtype=torch.float64)
    strategy.module.train()
    total, learned = added_up(summed, training.device).tolist()
    loss = total / max(1, learned)
    better = state.best is None or loss < state.best
    state.evaluations[str(state.step)] = loss
    state.best, state.worse = (loss, 0) if better else (state.best, state.worse + 1)
    training.report.event(event="evaluation", step=state.step, loss=loss, better=better)
    training.report.say(f"{job.name}: after step {state.step} the loss on held-out rows is {loss:.4f}")
    if better and job.optim.patience:
        export(job, strategy, job.output / "best", training.record())


def finish(training: Training) -> None:
    """Export the final weights, or the best ones if the job has `optim.patience`, and mark the job as done."""
    job, report = training.job, training.report
    if job.optim.patience and training.held_out:
        best = job.output / "best"
        if (
            training.strategy.rank == 0 and best.exists()
        ):  # it does not if an earlier attempt was killed right after this
            put(best, training.final)
    else:
        export(job, training.strategy, training.final, training.record())
    distributed.barrier()
    if os.environ["LOCAL_RANK"] == "0":  # on every node, so that none starts over and waits for the others
        write_aside(job.output / "training.json", json.dumps(training.record(), indent=1) + "\n")
    report.event(event="done", step=training.state.step)
    report.say(f"{job.name}: done; the trained weights are in {training.final}")


def refuse_differences(mine: list[Any]) -> None:
    """Raise Refusal unless all ranks have the same job, model and data, as nodes share no disk."""
    facts = gathered(mine)
    for rank, each in enumerate(facts):
        if each != facts[0]:
            raise Refusal(
                f"rank {rank} has another job, model or data than rank 0 ({each} there, {facts[0]} here): copy the files of one "
                "node to all of them"
            )


def measure(strategy: Strategy, into: list[Norms]) -> None:
    """Measure the gradient norms of the current step."""
    into.append(gradient_norms(strategy.model, strategy.scale_of_gradients))


def added_up(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all ranks, on the CPU."""
    moved = values.to(device)
    distributed.all_reduce(moved)
    return moved.cpu()


def whole_size(parameter: Any) -> int:
    """The number of elements of a parameter, which ZeRO-3 may have sharded."""
    return int(parameter.ds_numel if "ds_numel" in vars(parameter) else parameter.numel())
