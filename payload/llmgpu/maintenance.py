"""Frees GPUs: their engines are drained, which is recorded, then stopped, and come back afterwards."""

import fcntl
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

from llmgpu import orders
from llmgpu.declared import SettingError
from llmgpu.nvml import Nvml, message, supported
from llmgpu.orders import OrderError
from llmgpu.settings import GpuConfig

LOOK_SECONDS = 0.5
RECORD_SECONDS = 20.0  # the watch looks every 2 s, and may wait for the audit writer
# As gateways export what becomes of a drained engine (llmserve/upstream/quarantine.py).
ADMISSION = re.compile(
    r'^llm_engine_admission\{socket="(?P<socket>[^"]*)",state="(?P<state>\w+)"\} 1\.0$', re.MULTILINE
)
# Why it drains, on the record; by that it knows its own order again.
REASON = re.compile(r"MIG of GPU [\d, ]+ is changed")
DRAINED, KEPT = "engine_drained", "admission_kept"


@dataclass
class Maintenance:
    """`operator` takes the engines of some GPUs out of service. `seconds`: time for requests that gateways have started.

    `take_last`: also where no other instance serves the model.
    """

    config: GpuConfig
    config_path: Path  # that of the watch
    operator: str
    seconds: float
    take_last: bool = False
    drained: list[str] = field(default_factory=list)  # by this one
    stopped: list[str] = field(default_factory=list)  # units

    @contextmanager
    def of(self, nvml: Nvml, gpus: Sequence[int]) -> Iterator[None]:
        """Keeps the GPUs free of engines until the block ends; the engines also come back after an error, as do those that an
        earlier killed run left drained.

        Raises OrderError, with everything restored, if an engine cannot be spared or a program uses a GPU.
        """
        engines = [name for name, served in self.config.engines.items() if set(served.gpus) & set(gpus)]
        with self.alone():
            try:
                self.take_over()
                self.drain(engines, f"MIG of GPU {', '.join(map(str, gpus))} is changed")
                self.stop(engines)
                free(nvml, gpus)
                yield
            finally:
                self.bring_back()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises OrderError while another one is at work: its orders look like those of one that was killed."""
        path = self.config.orders.with_suffix(".settings.lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OrderError(
                    "another `llm-gpu settings` is at work on this host: run this after it; no setting was changed"
                ) from None
            yield
        finally:
            os.close(lock)

    def take_over(self) -> None:
        """The engines that this operator's last change of MIG left drained, and their units, come back after this one."""
        for name, order in orders.load(self.config.orders).drains.items():
            served = self.config.engines.get(name)
            if served and order.operator == self.operator and REASON.fullmatch(order.reason):
                self.drained.append(name)
                self.stopped += [served.unit] if served.unit else []

    def drain(self, engines: Sequence[str], reason: str) -> None:
        """Return once the quarantine of each is recorded, and each gateway has finished its requests there."""
        for name in engines:
            with orders.edited(self.config.orders) as order_set:
                existing = name in order_set.drains
                orders.drain(
                    order_set, name, self.operator, order_set.drains[name].reason if existing else reason
                )
            if not existing:
                self.drained.append(name)
        for name in engines:
            wait(
                lambda name=name: self.on_record(name),  # type: ignore[misc]
                RECORD_SECONDS,
                f"the drain of '{name}' was not recorded within {RECORD_SECONDS:g} s: start llm-gpu and llm-audit",
            )
        for name in engines:
            socket = str(self.config.engines[name].socket)
            for port in self.config.gateways:
                wait(
                    lambda name=name, socket=socket, port=port: self.is_drained(name, socket, port),  # type: ignore[misc]
                    self.seconds,
                    f"'{name}' is still answering requests from {self.seconds:g} s ago: try again later",
                )

    def status(self, engine: str) -> str:
        """The output of `llm-gpu status` about it, from a separate process that reads the watch's file as the watch's user."""
        arguments = [sys.executable, "-P", "-m", "llmgpu", "status", "--config", str(self.config_path)]
        output = subprocess.run(arguments, capture_output=True, text=True, check=False).stdout
        return next((line for line in output.splitlines() if line.startswith(f"{engine}: ")), "")

    def on_record(self, engine: str) -> bool:
        """Whether the watch has quarantined it for this operator."""
        return f" by {self.operator}: " in self.status(engine)

    def await_return(self) -> None:
        """Return once the engines are in service again; raises SettingError if one takes too long."""
        patience = self.config.return_seconds + self.config.stale_seconds + RECORD_SECONDS
        try:
            for name in self.drained:
                wait(
                    lambda name=name: self.status(name) == f"{name}: in service",  # type: ignore[misc]
                    patience,
                    f"'{name}' is not back in service within {patience:g} s: `llm-gpu status` says why",
                )
        except OrderError as error:
            raise SettingError(str(error)) from error

    def is_drained(self, engine: str, socket: str, port: int) -> bool:
        """Whether a gateway has finished its requests on an engine; raises OrderError if it has no other engine for the model."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError as error:
            raise OrderError(
                f"the gateway with metrics on 127.0.0.1:{port} does not answer: {error}"
            ) from error
        states = {match["socket"]: match["state"] for match in ADMISSION.finditer(text)}
        state = states.get(socket, DRAINED)  # a gateway that does not know the socket sends nothing there
        if state == KEPT and not self.take_last:
            raise OrderError(
                f"'{engine}' is the last instance that serves its model: start another one, or use --take-last"
            )
        return state in (DRAINED, KEPT)

    def stop(self, engines: Sequence[str]) -> None:
        """Stop the engines' units; each finishes its requests."""
        for unit in filter(None, (self.config.engines[name].unit for name in engines)):
            if systemctl("is-active", "--quiet", unit) == 0:
                self.stopped += [] if unit in self.stopped else [unit]
                if systemctl("stop", unit):
                    raise OrderError(f"{unit} does not stop: see `journalctl --unit {unit}`")

    def bring_back(self) -> None:
        """Start what was stopped, and end the drain of each engine that runs again. Raises SettingError for one that does not."""
        failed = [unit for unit in self.stopped if systemctl("start", unit)]
        for name in self.drained:
            if self.config.engines[name].unit not in failed:
                with orders.edited(self.config.orders) as order_set:
                    orders.undrain(order_set, name, self.operator, f"{order_set.drains[name].reason}: done")
        if failed:
            raise SettingError(
                f"{failed[0]} does not start, and stays drained: see `journalctl --unit {failed[0]}`, then `llm-gpu undrain`"
            )


def free(nvml: Nvml, gpus: Sequence[int]) -> None:
    """Raises OrderError while a program is using one of the GPUs."""
    for index in gpus:
        try:
            running = supported(pynvml.nvmlDeviceGetComputeRunningProcesses, nvml.handles[index].handle) or []
        except pynvml.NVMLError as error:
            raise OrderError(f"GPU {index}: {message(error)}; no setting was changed") from error
        if running:
            names = ", ".join(f"{each.pid} ({command(each.pid)})" for each in running)
            raise OrderError(
                f"GPU {index} is in use by process {names}: stop it first; no setting was changed"
            )


def command(pid: int) -> str:
    """The name of a process; "gone" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"


def wait(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait until the condition holds; raises OrderError if that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise OrderError(otherwise)
        time.sleep(LOOK_SECONDS)


def systemctl(*arguments: str) -> int:
    """systemctl's exit code."""
    return subprocess.run(["systemctl", *arguments], capture_output=True, check=False).returncode
