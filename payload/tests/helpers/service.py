"""Real processes for tests: engines and a gateway, started as systemd starts them, on UNIX sockets."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import yaml
from authority import PUBLIC_KEY, signed_bundle
from forks import WITH_TORCH, Fork

from llmserve.access.api_keys import edited, new_key

PEPPER = b"a pepper for tests, 32 bytes long"
START_SECONDS = 90.0  # on a busy machine
NO_FORK = {"PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD"}  # variables that are read when a program starts
PATIENCE = 30.0  # with what comes at once on an idle one


def eventually(what: str, holds: Any, seconds: float = PATIENCE) -> Any:
    """Wait until `holds()` is true, and return its result; raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := holds():
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def patched(folder: Path, **values: float | str) -> dict[str, str]:
    """Environment that overrides constants in a process: `llmserve__audit__writer_client__INTENT_SECONDS=60.0`."""
    code = ""
    for name, value in values.items():
        module, constant = name.rsplit("__", 1)
        module = module.replace("__", ".")
        code += f"import {module}\nassert hasattr({module}, {constant!r})\n{module}.{constant} = {value!r}\n"
    (folder / "sitecustomize.py").write_text(code)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


class Process:
    """A process that speaks sd_notify; its stdout and stderr go to a file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        arguments: list[str],
        environment: dict[str, str],
        module: str = "llmserve",
        torch: bool = False,
    ) -> None:
        """Start it; `await_ready` waits for READY=1. `torch`: whether it needs torch."""
        self.log = folder / f"{name}.log"
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = folder / f"{name}.notify"
        address.unlink(missing_ok=True)
        self.notifications.bind(str(address))
        self.notifications.settimeout(0.1)
        self.states: list[str] = []
        whole = {**os.environ, "NOTIFY_SOCKET": str(address), **environment}
        self.process: subprocess.Popen[bytes] | Fork
        if environment.keys() & NO_FORK:
            command = [sys.executable, "-m", module, *arguments]
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, env=whole)
        else:
            self.process = Fork(module, arguments, whole, self.log, self.log, torch)

    def await_ready(self) -> "Process":
        """Wait for READY=1; fails with the log if the process exits before."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                self.states.append(self.notifications.recv(1000).decode())
            except TimeoutError:
                if self.process.poll() is not None:
                    break
            if "READY=1" in self.states:
                return self
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def stop(self) -> int:
        """Send SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.ended()

    def ended(self) -> int:
        """Wait for the exit code. A further SIGTERM after its event loop has ended would kill it by the signal."""
        end = time.monotonic() + 60  # torch takes long to exit on a busy machine
        try:
            while self.process.poll() is None and time.monotonic() < end:
                with suppress(TimeoutError):  # unread notifications block the process at the tenth
                    self.notifications.recv(1000)
            return self.process.wait(0)
        finally:
            self.kill()
            self.notifications.close()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Service:
    """A gateway and its engines in one folder."""

    folder: Path
    engine_models: dict[str, dict[str, Any]]
    remotes: dict[str, dict[str, Any]] = field(default_factory=dict)  # models on other servers
    offered: dict[str, dict[str, Any]] = field(default_factory=dict)  # models on engines of other hosts
    instances: dict[str, int] = field(default_factory=dict)  # by model; one by default
    adapters: dict[str, str] = field(default_factory=dict)  # name, and the model whose engine has it
    limits: dict[str, Any] = field(default_factory=dict)
    redis: dict[str, Any] | None = None
    policy: dict[str, Any] | None = None  # default: the tree's own policy, evaluated in process
    identity: dict[str, Any] = field(default_factory=dict)
    credentials: dict[str, str] = field(default_factory=dict)
    quarantine: Path | None = None
    feedback: dict[str, Any] | None = None
    tenants: dict[str, dict[str, object]] = field(default_factory=dict)  # what the policy says of them
    experiments: dict[str, dict[str, object]] = field(default_factory=dict)  # of the policy
    aliases: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the policy
    collections: dict[str, dict[str, object]] = field(default_factory=dict)  # of the policy
    documents: dict[str, Any] | None = None
    listen: dict[str, Any] | None = None  # default: the socket http.sock
    engine_options: dict[str, Any] = field(default_factory=dict)
    engine_environment: dict[str, str] = field(default_factory=dict)
    gateway_environment: dict[str, str] = field(default_factory=dict)
    engines: dict[str, Process] = field(default_factory=dict)
    gateway: Process | None = None
    writer: Process | None = None
    key: str = ""
    refusals: int = 0  # rejected policy bundles that a test has seen

    def start(self) -> "Service":
        """Start everything, with one API key."""
        credentials = self.folder / "credentials"
        credentials.mkdir(exist_ok=True)
        (credentials / "llm-gateway.pepper").write_bytes(PEPPER)
        for name, secret in self.credentials.items():
            (credentials / name).write_text(secret)
        with edited(self.folder / "keys.json") as records:
            self.key, record = new_key(PEPPER, "ada", "research", ["developer"], None)
            records.append(record)
        self.start_writer()
        for name in self.engine_models:
            for number in range(self.instances.get(name, 1)):
                self.start_engine(name, wait=False, number=number)
        self.start_gateway(wait=False)
        for process in [*self.engines.values(), self.gateway]:
            if process:
                process.await_ready()
        # A gateway that started first retries its engines only after a while.
        eventually("the gateway has found its engines", self.has_found_engines)
        return self

    def has_found_engines(self) -> bool:
        """Whether the gateway, if any, has connected to each engine and probed each server of `remotes`."""
        if self.gateway is None:
            return True
        log = self.gateway.log.read_text()
        probed = log.count("upstream connected") + log.count("upstream unavailable")
        servers = sum(
            1 if isinstance(each, str) else len(each)
            for remote in self.remotes.values()
            for each in (remote.get("socket", []), remote.get("url", []))
        )
        return log.count("engine connected") >= len(self.engines) and probed >= servers

    def start_writer(self) -> None:
        """Start the audit writer."""
        seed = self.folder / "audit.seed"
        seed.write_text("5e" * 32)
        options = ["--folder", str(self.folder / "audit"), "--socket", str(self.folder / "audit.sock")]
        command = ["serve", *options, "--seed-file", str(seed)]
        self.writer = Process(self.folder, "writer", command, {}, module="llmproof").await_ready()

    def start_engine(self, name: str, wait: bool = True, number: int = 0) -> None:
        """Start one engine; `number` distinguishes the instances of a model."""
        instance = f"{name}-{number}" if number else name
        file = self.folder / f"engine-{instance}.yaml"
        config = {"socket": str(self.folder / f"{instance}.sock"), "model": self.engine_models[name]}
        named = {"name": name} if number else {}  # as in the role's units
        file.write_text(yaml.safe_dump(config | named | self.engine_options))
        arguments = ["engine", "--name", instance, "--config", str(file)]
        torch = f"llmserve.engine.{self.engine_models[name]['driver']}" in WITH_TORCH
        self.engines[instance] = Process(
            self.folder, f"engine-{instance}", arguments, self.engine_environment, torch=torch
        )
        if wait:
            self.engines[instance].await_ready()

    def sockets(self, name: str) -> list[str]:
        """Sockets of all instances of a model."""
        more = range(1, self.instances.get(name, 1))
        return [str(self.folder / f"{each}.sock") for each in [name, *(f"{name}-{one}" for one in more)]]

    def start_gateway(self, wait: bool = True) -> None:
        # A probe is a decision: often only where the policy is the test's, since others' gateways idle for minutes.
        policy = {
            "key": str(self.folder / "policy.pem"),
            "deadline_ms": 5000,
            **({"probe_ms": 100} | self.policy if self.policy else self.embedded()),
        }
        (self.folder / "policy.pem").write_bytes(PUBLIC_KEY)
        config: dict[str, Any] = {
            "policy": policy,
            "audit": {"socket": str(self.folder / "audit.sock")},
            "listen": self.listen or {"socket": str(self.folder / "http.sock")},
            "metrics": {"socket": str(self.folder / "metrics.sock")},
            "engines": {name: {"socket": self.sockets(name)} for name in self.engine_models}
            | {name: {"socket": self.sockets(model)} for name, model in self.adapters.items()}
            | {name: {"remote": remote} for name, remote in self.remotes.items()}
            | self.offered,
            "keys_file": str(self.folder / "keys.json"),
            "identity": self.identity,
            "limits": self.limits,
            "log_level": "DEBUG",
        }
        if self.redis:
            config["redis"] = self.redis
        if self.feedback:
            config["feedback"] = self.feedback
        if self.documents:
            config["documents"] = self.documents
        if self.quarantine:
            config["quarantine"] = str(self.quarantine)
        file = self.folder / "gateway.yaml"
        file.write_text(yaml.safe_dump(config))
        environment = {
            "CREDENTIALS_DIRECTORY": str(self.folder / "credentials"),
            **self.gateway_environment,
        }
        self.gateway = Process(self.folder, "gateway", ["gateway", "--config", str(file)], environment)
        if wait:
            self.gateway.await_ready()

    def embedded(self) -> dict[str, Any]:
        """The tree's own policy, signed for this test."""
        bundle = self.folder / "bundle.tar.gz"
        policy = signed_bundle(
            tenants=self.tenants,
            experiments=self.experiments,
            aliases=self.aliases,
            collections=self.collections,
        )
        bundle.write_bytes(policy)
        return {"engine": "embedded", "bundle": str(bundle)}

    def records(self) -> list[dict[str, Any]]:
        """The events of the audit record."""
        files = sorted((self.folder / "audit").glob("records-*.jsonl"))
        return [json.loads(line) for file in files for line in whole_lines(file).splitlines()]

    def stop(self) -> None:
        for process in [self.gateway, *self.engines.values(), self.writer]:
            if process:
                process.stop()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `llm-serve` with this service's pepper."""
        environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(self.folder / "credentials")}
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "output", Path(folder) / "errors"
            code = Fork("llmserve", arguments, environment, output, errors).wait()
            return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())

    def add_key(self, subject: str = "ada", tenant: str = "research", *more: str) -> dict[str, Any]:
        """Create a key with the CLI."""
        who = ["--subject", subject, "--tenant", tenant, "--role", "developer"]
        result = self.cli("keys", "add", *who, "--json", *more, "--keys-file", str(self.folder / "keys.json"))
        assert result.returncode == 0, result.stderr
        added: dict[str, Any] = json.loads(result.stdout)
        return added

    def client(self, key: str | None = None, socket_name: str = "http.sock") -> httpx.Client:
        """An HTTP client with an API key; "" sends none."""
        key = self.key if key is None else key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.HTTPTransport(uds=str(self.folder / socket_name))
        return httpx.Client(base_url="http://llm", transport=transport, headers=headers, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """All samples of a scrape."""
        with self.client("", "metrics.sock") as client:
            lines = client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def logs(self) -> str:
        """The logs of all processes."""
        return "".join(whole_lines(path) for path in self.folder.glob("*.log"))


def whole_lines(file: Path) -> str:
    """A file's content without a line that is being written."""
    lines, newline, _ = file.read_text().rpartition("\n")
    return lines + newline


@contextmanager
def running(
    folder: Path, models: dict[str, dict[str, Any]] | None = None, **options: Any
) -> Iterator[Service]:
    """Run a service within the block."""
    service = Service(folder, {"echo": {"driver": "echo"}} if models is None else models, **options)
    try:
        yield service.start()
    finally:
        service.stop()


def events(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event, parsed except for "[DONE]"."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]
