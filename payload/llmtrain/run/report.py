"""What a running job says: one line a person reads, `metrics.jsonl` and a file for Prometheus' textfile collector.

Numbers alone; of the data nothing is ever said.
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
    """GB of this process at most: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Report:
    """Rank 0's; the other ranks have one that is silent."""

    def __init__(self, job: str, file: Path, prometheus: Path | None, speaks: bool, every: int) -> None:
        """`file` is metrics.jsonl; `every` so many steps there is a line."""
        self.job, self.file, self.prometheus, self.speaks, self.every = job, file, prometheus, speaks, every
        self.begun = time.monotonic()
        self.done_before, self.stepping = -1, 0.0

    def say(self, message: str) -> None:
        """A line for a person."""
        if self.speaks:
            print(message, file=sys.stderr, flush=True)

    def event(self, **facts: Any) -> None:
        """A line of metrics.jsonl."""
        if self.speaks:
            with self.file.open("a") as opened:
                opened.write(
                    json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}) + "\n"
                )

    def step(self, step: int, of: int, seconds: float, facts: dict[str, Any]) -> None:
        """After each step, which took `seconds`. In `facts`: loss, lr, grad_norm, tokens_per_second and memory_gb."""
        if self.done_before < 0:
            self.done_before, self.stepping = step - 1, time.monotonic() - seconds
            self.event(event="first step", seconds=time.monotonic() - self.begun)
        if not self.speaks or (step % self.every and step != of):
            return
        self.event(step=step, of=of, **facts)
        left = (time.monotonic() - self.stepping) / (step - self.done_before) * (of - step)
        scale = f"  scale {facts['loss_scale']:g}" if facts.get("loss_scale") else ""
        self.say(
            f"step {step}/{of}  loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  grad {facts['grad_norm']:.3g}{scale}  "
            f"{facts['tokens_per_second']:.0f} tokens/s  {facts['memory_gb']:.2f} GB  left {timedelta(seconds=round(left))}"
        )
        if self.prometheus:
            self.expose({"step": step, "steps": of, "seconds_left": left, **facts})

    def expose(self, facts: dict[str, Any]) -> None:
        """The numbers as gauges `llm_train_…{job}`, the file replaced at once."""
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()
        for name, value in facts.items():
            if isinstance(value, int | float):
                gauge = Gauge(f"llm_train_{name}", f"of the running job: {name}", ["job"], registry=registry)
                gauge.labels(self.job).set(value)
        write_to_textfile(str(self.prometheus), registry)
