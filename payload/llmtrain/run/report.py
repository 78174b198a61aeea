"""The output of a running job: a line on stderr, `metrics.jsonl`, and a file for Prometheus' textfile collector.

It consists of numbers; the content of the data is never printed.
"""

import json
import resource
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Report:
    """Reports progress on rank 0; on the other ranks it does nothing."""

    def __init__(self, job: str, file: Path, prometheus: Path | None, speaks: bool, every: int) -> None:
        """`file` is metrics.jsonl. A step is reported every `every` steps, if this rank `speaks`."""
        self.job, self.file, self.prometheus, self.speaks, self.every = job, file, prometheus, speaks, every
        self.begun = time.monotonic()
        self.done_before, self.stepping = -1, 0.0

    def say(self, message: str) -> None:
        """Print a line to stderr."""
        if self.speaks:
            print(message, file=sys.stderr, flush=True)

    def event(self, **facts: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.speaks:
            with self.file.open("a") as opened:
                opened.write(
                    json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}) + "\n"
                )

    def step(self, step: int, of: int, seconds: float, facts: dict[str, Any]) -> None:
        """Call after each step. `facts` has at least loss, lr, grad_norm, tokens_per_second and memory_gb."""
        if self.done_before < 0:
            self.done_before, self.stepping = step - 1, time.monotonic() - seconds
            self.event(event="first step", seconds=time.monotonic() - self.begun)
        if not self.speaks or (step % self.every and step != of):
            return
        self.event(step=step, of=of, **facts)
        remaining = (time.monotonic() - self.stepping) / (step - self.done_before) * (of - step)
        scale = f"  scale {facts['loss_scale']:g}" if facts.get("loss_scale") else ""
        self.say(
            f"step {step}/{of}  loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  grad {facts['grad_norm']:.3g}{scale}  "
            f"{facts['tokens_per_second']:.0f} tokens/s  {facts['memory_gb']:.2f} GB  left {timedelta(seconds=round(remaining))}"
        )
        if self.prometheus:
            self.expose({"step": step, "steps": of, "seconds_left": remaining, **facts})

    def expose(self, facts: dict[str, Any]) -> None:
        """Replace the Prometheus file with the numbers as gauges `llm_train_…{job}`."""
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()
        for name, value in facts.items():
            if isinstance(value, int | float):
                gauge = Gauge(f"llm_train_{name}", f"{name} of the running job", ["job"], registry=registry)
                gauge.labels(self.job).set(value)
        write_to_textfile(str(self.prometheus), registry)
