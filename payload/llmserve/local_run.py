"""`llm-serve run`: an engine, a gateway and a throw-away key on a developer's machine, until interrupted."""

import asyncio
import http.client
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvloop
import yaml

from llmcore import logs
from llmcore.config import ConfigError, load
from llmcore.manifest import write_manifest
from llmserve.access.api_keys import edited, new_key
from llmserve.gateway.process import run_gateway
from llmserve.settings import GatewayConfig

RESTART_SECONDS = 0.5
LOOK_SECONDS = 0.1


class AllowEverything:
    """Stands in for the policy on a developer's machine: everything is allowed."""

    async def evaluate(self, query: dict[str, Any]) -> object:
        rate = {
            "requests_per_minute": 10**6,
            "tokens_per_minute": 10**9,
            "tokens_per_day": 10**12,
            "priority": 0,
        }
        return {
            "allow": True,
            "reason": "a developer's own machine",
            "rule": "developer",
            "revision": 1,
            "models": ["*"],
            "max_tokens": 10**6,
            "rate_class": "developer",
            "rate": rate,
            "log_prompt": False,
            "weight": 1,
            "experiments": [],
            "reviews": [],
        }

    def close(self) -> None:
        pass


@contextmanager
def free_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that is reserved within the block; a server that sets SO_REUSEADDR can listen on it."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield int(reservation.getsockname()[1])


def run_all(engine: str, model: Path | None, port: int, redis: str | None) -> int:
    """Run until interrupted; returns the exit code. Raises ConfigError unless `model` is given exactly when `engine`
    needs one.
    """
    if (engine == "echo") != (model is None):
        raise ConfigError(
            f"--engine {engine} does not fit --model: give --model DIR for every engine but echo, which takes none"
        )
    with (
        free_port() as spare,
        free_port() as metrics_port,
        tempfile.TemporaryDirectory(prefix="llm-serve-") as name,
    ):
        port = port or spare
        folder = Path(name)
        model_name = "echo" if model is None else model.resolve().name
        described: dict[str, object] = {"driver": engine}
        if model is not None:
            print(f"hashing {model}: its weights are trusted as they are", file=sys.stderr)
            write_manifest(model, folder / "manifest")
            described |= {"path": str(model.resolve()), "manifest": str(folder / "manifest")}
        engine_file, gateway_file = folder / "engine.yaml", folder / "gateway.yaml"
        engine_config = {
            "socket": str(folder / "engine.sock"),
            "model": described,
            "log_level": "WARNING",
        }
        engine_file.write_text(yaml.safe_dump(engine_config))
        gateway = {
            "listen": {"port": port},
            "metrics": {"port": metrics_port},
            "engines": {model_name: {"socket": str(folder / "engine.sock")}},
            "keys_file": str(folder / "keys.json"),
            "audit": {"socket": str(folder / "audit.sock")},
            "log_level": "ERROR",
        }
        if redis:
            gateway["redis"] = {"url": redis}
        gateway_file.write_text(yaml.safe_dump(gateway))
        config = load(gateway_file, GatewayConfig)
        logs.configure(config.log_level)
        pepper = os.urandom(32)
        key, record = new_key(pepper, "developer", "local", ["developer"], None)
        with edited(folder / "keys.json") as records:
            records.append(record)
        if not redis:
            print("no Redis: answers are not cached (use --redis URL)", file=sys.stderr)
        print("no policy: the key below allows everything; an estate checks every request against its policy",
              file=sys.stderr)  # fmt: skip
        seed = folder / "audit.seed"
        seed.write_text(os.urandom(32).hex())
        seed.chmod(0o600)
        address = f"http://127.0.0.1:{port}"
        question = "--data-urlencode 'prompt=Hello'"
        access = f"""\
url      {address}
metrics  http://127.0.0.1:{metrics_port}/metrics
key      {key}
try      curl -G {address}/generate -H 'Authorization: Bearer {key}' {question}"""
        print(f"starting {model_name}: its address and key follow once it answers", file=sys.stderr)
        writer = ["-m", "llmproof", "serve", "--folder", str(folder / "audit"), "--seed-file", str(seed)]
        writer += ["--socket", str(folder / "audit.sock")]
        engine_command = ["-m", "llmserve", "engine", "--name", model_name, "--config", str(engine_file)]
        others = {"engine": engine_command, "audit writer": writer}
        uvloop.run(run_all_three(config, pepper, others, access))
    return 0


async def run_all_three(
    config: GatewayConfig, pepper: bytes, others: dict[str, list[str]], access: str
) -> None:
    """Run the gateway in this process, and the programs in `others` as child processes that are restarted when they
    exit; print `access` once all three are ready.
    """
    tasks = [asyncio.create_task(keep_running(name, command)) for name, command in others.items()]
    tasks.append(asyncio.create_task(announce(config.listen.port or 0, access)))
    try:
        await run_gateway(config, pepper, AllowEverything())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def announce(port: int, access: str) -> None:
    """Print `access` once the gateway would answer a request."""
    while not await asyncio.to_thread(ready, port):
        await asyncio.sleep(LOOK_SECONDS)
    print(access, flush=True)


def ready(port: int) -> bool:
    """Whether the gateway on this port of 127.0.0.1 is ready."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    with suppress(OSError, http.client.HTTPException):
        link.request("GET", "/readyz")
        return link.getresponse().status == 200
    return False


async def keep_running(name: str, command: list[str]) -> None:
    """Run `python COMMAND`, and restart it whenever it exits; runs until cancelled."""
    while True:
        process = await asyncio.create_subprocess_exec(sys.executable, *command, start_new_session=True)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
        print(f"the {name} exited with {code}: restarting it", file=sys.stderr)
        await asyncio.sleep(RESTART_SECONDS)
