"""The training loop, from top to bottom: what each process of a job does.

Loss is the sum of the cross entropies over all positions of a step that count, by their number: over all batches of all ranks,
so that neither accumulation nor the number of GPUs changes it.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from llmtrain.data.rows import Rows
from llmtrain.exits import DONE, STOPPED, Refusal
from llmtrain.job import Job, Optim
from llmtrain.run.batches import evaluation_batches, step_batches
from llmtrain.run.checkpoint import Checkpoints
from llmtrain.run.export import export, put
from llmtrain.run.health import Health, Norms, gradient_norms
from llmtrain.run.model import load
from llmtrain.run.report import Report, peak_memory
from llmtrain.run.setup import Setup, job_digest, kind
from llmtrain.run.strategies.ddp import Ddp
from llmtrain.run.strategies.fsdp import Fsdp
from llmtrain.run.strategies.protocol import Strategy, proven
from llmtrain.run.strategies.zero import Zero

WAIT = timedelta(minutes=10)  # for the other ranks in a collective


def learning_rate(optim: Optim, done: float, after: float) -> float:
    """For a step that takes the job from the share `done` of its rows to `after`."""
    if after < optim.warmup:
        return optim.lr * after / optim.warmup
    if optim.schedule == "constant" or optim.warmup == 1:
        return optim.lr
    past = max(0.0, (done - optim.warmup) / (1 - optim.warmup))
    return optim.lr * ((1 + math.cos(math.pi * past)) / 2 if optim.schedule == "cosine" else 1 - past)


def together[T](work: Callable[[], T]) -> T:
    """Do `work` on each rank. If one cannot, all raise its Refusal: none waits for what will not come."""
    problem: tuple[str, int] | None = None
    value: Any = None
    try:
        value = work()
    except Refusal as refusal:
        problem = str(refusal), refusal.code
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, problem)
    for each in told:
        if each:
            raise Refusal(*each)
    return value  # type: ignore[no-any-return]


def train(job: Job, setup: Setup, key: bytes) -> int:
    """A process's part of a job; the exit code, which all agree upon. An error that is not a Refusal gets out: then
    torchrun starts all processes again, and they go on from the last good checkpoint."""
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
        return loop(job, setup, key, device, asked_to_stop)
    except Refusal as refusal:
        if os.environ["LOCAL_RANK"] == "0":
            print(f"llm-train: {refusal}", file=sys.stderr, flush=True)
        return refusal.code
    finally:
        distributed.destroy_process_group()


def start_process_group(setup: Setup, backend: str) -> None:
    """Before the model is loaded: ZeRO-3 cuts it up while it loads."""
    if setup.deepspeed is None:
        distributed.init_process_group(backend, timeout=WAIT)
        return
    if backend == "gloo":
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # On a CPU DeepSpeed would compile this at first use, on a host that has no compiler; torch's own gloo does it, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, timeout=WAIT, verbose=False)


def start_strategy(job: Job, setup: Setup, device: torch.device) -> Strategy:
    """Load the model and hand it to what trains it."""
    if setup.deepspeed is None:
        model = load(job, setup, device)
        strategy = Fsdp if setup.strategy == "fsdp" else Ddp
        return strategy(model, job.optim, setup.precision, device)
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(setup.deepspeed)  # while it lives, transformers knows of ZeRO-3
    model = load(job, setup, device)
    return Zero(model, setup.precision, device, setup.deepspeed, alive)


def loop(job: Job, setup: Setup, key: bytes, device: torch.device, asked_to_stop: list[int]) -> int:
    """Check, load, resume, train, save, export."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    digest = job_digest(job)
    job.output.mkdir(parents=True, exist_ok=True)
    final = job.output / kind(job)
    report = Report(job.name, job.output / "metrics.jsonl", job.watch.metrics, rank == 0, job.watch.log_every)

    rows, held_out = Rows(job.data.train), Rows(job.data.eval) if job.data.eval else None
    refuse_differences([digest, asdict(setup.verified)])

    torch.manual_seed(job.seed)  # the same adapters on all ranks
    strategy = together(lambda: start_strategy(job, setup, device))
    evidence = proven(strategy)
    torch.manual_seed(job.seed + 1 + rank)  # but each its own dropout
    report.say(
        f"{job.name}: {job.method.kind} by {evidence['strategy']} on {world_size} rank(s) of {device.type}, {setup.precision}, "
        f"{sum(whole_size(each) for each in strategy.model.parameters() if each.requires_grad) / 1e6:.2f} M parameters learn"
    )

    rows_a_step = setup.micro_batch * setup.accumulation * world_size
    end = job.optim.steps * rows_a_step if job.optim.steps else math.ceil(job.optim.epochs * len(rows))
    state: dict[str, Any] = {
        "step": 0, "cursor": 0, "losses": {}, "evaluations": {}, "best": None, "worse": 0, "resumed": [],
        "data": setup.verified.data, "job_digest": digest, "world_size": world_size,
    }  # fmt: skip
    newest = Path(os.environ.get("STATE_DIRECTORY", job.output)) / "newest-save"  # systemd's, on another disk
    checkpoints = together(lambda: Checkpoints(job.output / "checkpoints", key, job.keep.last, newest=newest))
    found = checkpoints.latest_good()
    if found:
        for name in "job_digest", "data":
            if found.state[name] != state[name]:
                raise Refusal(
                    f"{found.folder} is of another job or data ({name}): give this one an output of its own, or move them away"
                )
        lost = strategy.read(found.folder, found.world_size)
        state = {**found.state, "world_size": world_size}
        state["resumed"] = [*state["resumed"], {"step": found.step, "world_size": world_size, "lost": lost}]
        report.event(event="resumed", step=found.step, lost=lost)
        report.say(
            f"{job.name}: goes on after step {found.step}, saved by {found.world_size} rank(s)"
            + (f"; LOST, as {world_size} run now: {lost}" if lost else "")
        )
    saved_when = time.monotonic()
    health = Health(job, setup.active_parameters, world_size, setup.peak_flops)

    def record() -> dict[str, Any]:
        return {
            "job": job.model_dump(mode="json"),
            "base_model": {"path": str(job.model), "revision": setup.verified.revision},
            "tokenizer": setup.verified.tokenizer, "setup": asdict(setup), "ran": evidence, "versions": versions(), **state,
        }  # fmt: skip

    def evaluate() -> None:
        """On the held-out rows; remembers whether it got better, and exports what is the best so far."""
        if held_out is None:
            return
        strategy.module.eval()
        summed = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in evaluation_batches(held_out, setup.micro_batch, rank, world_size, device):
                summed += torch.tensor([float(strategy.loss(batch)), batch.learned], dtype=torch.float64)
        strategy.module.train()
        total, learned = added_up(summed, device).tolist()
        loss = total / max(1, learned)
        better = state["best"] is None or loss < state["best"]
        state["evaluations"][str(state["step"])] = loss
        state["best"], state["worse"] = (loss, 0) if better else (state["best"], state["worse"] + 1)
        report.event(event="evaluation", step=state["step"], loss=loss, better=better)
        report.say(f"{job.name}: after step {state['step']} the loss on held-out rows is {loss:.4f}")
        if better and job.optim.patience:
            export(job, strategy, job.output / "best", record())

    def finished() -> bool:
        patience = job.optim.patience
        return state["cursor"] >= end or (patience is not None and state["worse"] >= patience)

    while not finished():
        begun, computed = time.monotonic(), time.process_time()
        cursor, after = state["cursor"], min(state["cursor"] + rows_a_step, end)
        batches = step_batches(
            rows, job.seed, cursor, end, setup.micro_batch, setup.accumulation, rank, world_size, device
        )
        own = torch.tensor([sum(each.learned for each in batches), sum(each.tokens for each in batches)])
        learned, tokens = added_up(own.double(), device).tolist()
        lr = learning_rate(job.optim, cursor / end, after / end)
        norms: list[Norms] = []
        looks = (state["step"] + 1) % job.watch.log_every == 0
        look = partial(measure, strategy, norms) if looks else lambda: None
        own_loss, norm = strategy.learn(batches, max(1, int(learned)), lr, look)
        due = rank == 0 and time.monotonic() - saved_when > 60 * job.keep.every_minutes
        told = torch.tensor([float(own_loss), bool(asked_to_stop), due], dtype=torch.float64)
        summed_loss, stopping, by_time = added_up(told, device).tolist()
        loss = summed_loss / max(1, learned)
        state["step"], state["cursor"] = state["step"] + 1, after
        step, of = state["step"], state["step"] + math.ceil((end - after) / rows_a_step)
        if step % job.watch.log_every == 0 or step == 1 or after == end:
            state["losses"][str(step)] = loss
        seconds = time.monotonic() - begun
        facts: dict[str, Any] = {
            "loss": loss, "lr": lr, "grad_norm": norm, "loss_scale": strategy.scale, "tokens": tokens,
            **health.speed(tokens, seconds), **(norms[-1].facts() if norms else {}),
            "memory_gb": peak_memory(device), "cursor": after, "cpu_seconds": time.process_time() - computed,
        }  # fmt: skip
        report.step(step, of, seconds, facts)
        verdict = health.step(step, loss, norm, cursor, strategy.scale, norms[-1] if norms else None)
        for finding in verdict.news:
            report.event(event=finding.rule, step=step, message=finding.message)
            report.say(f"{job.name}: {finding.message}")
        verdict.refuse()

        at_step = job.keep.every_steps is not None and step % job.keep.every_steps == 0
        saving = bool(stopping or by_time or at_step or after == end)
        if step % job.watch.eval_every == 0 if job.watch.eval_every else saving and not stopping:
            evaluate()
        if saving or finished():
            checkpoints.save(step, strategy.write, state)
            saved_when = time.monotonic()
        if stopping and not finished():
            report.say(
                f"{job.name}: stopped after step {step}, which is saved; run the same command to go on"
            )
            return STOPPED

    if job.optim.patience and held_out:
        best = job.output / "best"
        if rank == 0 and best.exists():  # it does not where a kill came just after this
            put(best, final)
    else:
        export(job, strategy, final, record())
    distributed.barrier()
    if os.environ["LOCAL_RANK"] == "0":  # on every node, so that none begins anew and waits for the others
        (job.output / "training.json").write_text(json.dumps(record(), indent=1) + "\n")
    report.event(event="done", step=state["step"])
    report.say(f"{job.name}: done; {final} has what was learned")
    return DONE


def refuse_differences(mine: list[Any]) -> None:
    """Raise Refusal unless all ranks have the same job, model and data: nodes share no disk."""
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, mine)
    for rank, each in enumerate(told):
        if each != told[0]:
            raise Refusal(
                f"rank {rank} has another job, model or data than rank 0 ({each} there, {told[0]} here): copy the files of one "
                "node to all of them"
            )


def measure(strategy: Strategy, into: list[Norms]) -> None:
    """While a step's gradients are there."""
    into.append(gradient_norms(strategy.model, strategy.scale_of_gradients))


def added_up(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all ranks."""
    moved = values.to(device)
    distributed.all_reduce(moved)
    return moved.cpu()


def whole_size(parameter: Any) -> int:
    """Of a parameter that ZeRO-3 may have cut up."""
    return int(parameter.ds_numel if "ds_numel" in vars(parameter) else parameter.numel())


def versions() -> dict[str, str]:
    """Of what computed."""
    found = {"torch": torch.__version__}
    for name in ("transformers", "peft", "deepspeed", "bitsandbytes", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
