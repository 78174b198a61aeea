"""`llm-serve run`: an engine, a gateway and a key on one plain machine, for as long as it runs."""

import asyncio
import os
import socket
import sys
import tempfile
from pathlib import Path

import uvloop
import yaml

from llmcore import logs
from llmcore.config import ConfigError, load
from llmcore.manifest import write_manifest
from llmserve.gateway import run_gateway
from llmserve.keys import edited, new_key
from llmserve.settings import GatewayConfig

RESTART_SECONDS = 0.5


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_all(engine: str, model: Path | None, port: int, redis: str | None) -> int:
    """Run until interrupted. Raises ConfigError for a naive engine without a model."""
    if (engine == "naive") != (model is not None):
        raise ConfigError("--engine naive and --model DIR go together: give both, or neither for echo")
    port, metrics_port = port or free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="llm-serve-") as name:
        folder = Path(name)
        model_name = "echo" if model is None else model.resolve().name
        described: dict[str, object] = {"driver": engine}
        if model is not None:
            print(f"hashing {model}: the weights are taken as they are, on your word", file=sys.stderr)
            write_manifest(model, folder / "manifest")
            described |= {"path": str(model.resolve()), "manifest": str(folder / "manifest")}
        engine_file, gateway_file = folder / "engine.yaml", folder / "gateway.yaml"
        engine_file.write_text(yaml.safe_dump({"socket": str(folder / "engine.sock"), "model": described}))
        gateway = {
            "listen": {"port": port},
            "metrics": {"port": metrics_port},
            "engines": {model_name: {"socket": str(folder / "engine.sock")}},
            "keys_file": str(folder / "keys.json"),
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
            print("no Redis: going on without a cache (give one with --redis URL)", file=sys.stderr)
        address = f"http://127.0.0.1:{port}"
        print(f"url      {address}")
        print(f"metrics  http://127.0.0.1:{metrics_port}/metrics")
        print(f"key      {key}")
        question = "--data-urlencode 'prompt=Hello you'"
        print(f"try      curl -G {address}/generate -H 'Authorization: Bearer {key}' {question}", flush=True)
        uvloop.run(run_both(config, pepper, model_name, engine_file))
    return 0


async def run_both(config: GatewayConfig, pepper: bytes, model_name: str, engine_file: Path) -> None:
    """The gateway here, the engine in a process of its own that is started again when it dies."""
    engine = asyncio.create_task(keep_engine(model_name, engine_file))
    try:
        await run_gateway(config, pepper)
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)


async def keep_engine(model_name: str, engine_file: Path) -> None:
    """Start the engine whenever there is none; runs until cancelled."""
    command = [sys.executable, "-m", "llmserve", "engine", "--name", model_name, "--config", str(engine_file)]
    while True:
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
        print(f"the engine ended with {code}: starting it again", file=sys.stderr)
        await asyncio.sleep(RESTART_SECONDS)
