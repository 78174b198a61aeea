"""`llm-serve engine` with driver vllm: its refusals, and that it becomes vLLM, for which a stand-in is taken (tests/doubles)."""

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

import pytest
import yaml
from nvml_standin import compiled
from service import eventually

from llmcore.manifest import write_manifest
from llmserve.engine import probe, vllm
from llmserve.settings import VllmModel

STANDIN = Path(__file__).parents[4] / "tests/doubles/vllm"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for CUDA's library."""
    return compiled(tmp_path_factory.mktemp("libraries"))


@dataclass
class Engine:
    """A configured engine with weights of a few bytes."""

    folder: Path
    libraries: Path

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    @property
    def weights(self) -> Path:
        return self.folder / "model"

    @property
    def config(self) -> Path:
        return self.folder / "engine.yaml"

    def configure(self, **changed: object) -> None:
        model: dict[str, object] = {
            "driver": "vllm",
            "path": str(self.weights),
            "manifest": str(self.weights / "SHA256SUMS"),
        }
        model |= {"program": str(self.folder / "vllm"), "context": 64} | changed
        self.config.write_text(
            yaml.safe_dump({"name": "m", "socket": str(self.socket), "model": model, "drain_seconds": 5})
        )

    def start(self, gpus: str = "1") -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "llmserve", "engine", "--name", "engine", "--config", str(self.config)]
        environment = {"LD_LIBRARY_PATH": str(self.libraries), "MOCK_CUDA_DEVICES": gpus}
        environment |= {"STANDIN": str(STANDIN), "TMPDIR": str(self.folder)}
        return subprocess.Popen(
            argv, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def refused(self, gpus: str = "1") -> tuple[int, str]:
        """Exit code and message."""
        process = self.start(gpus)
        _, message = process.communicate(timeout=60)
        assert not self.socket.exists()
        return process.returncode, message


@pytest.fixture
def engine(tmp_path: Path, libraries: Path) -> Engine:
    made = Engine(tmp_path, libraries)
    made.weights.mkdir()
    (made.weights / "config.json").write_text("{}")
    write_manifest(made.weights, made.weights / "SHA256SUMS")
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nPYTHONPATH=$STANDIN exec "{sys.executable}" -m vllm "$@"\n')
    program.chmod(0o755)
    made.configure()
    return made


@pytest.fixture
def serving(engine: Engine) -> Iterator[tuple[Engine, "subprocess.Popen[str]"]]:
    """vLLM, which answers, in the place of a socket that a killed one left behind."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(engine.socket))
    process = engine.start()
    eventually("vLLM is healthy", lambda: probe.vllm_trouble(engine.socket, 5) is None)
    yield engine, process
    process.kill()
    process.communicate()


def test_becomes_vllm_whose_socket_is_its_groups_alone(
    serving: tuple[Engine, "subprocess.Popen[str]"],
) -> None:
    engine, process = serving
    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"--served-model-name=m" in words
    assert stat.S_IMODE(engine.socket.stat().st_mode) == 0o770


def test_drains_when_it_is_told_to_stop(serving: tuple[Engine, "subprocess.Popen[str]"]) -> None:
    _, process = serving
    process.terminate()
    assert process.wait(30) == 0


def test_refuses_a_container_without_a_gpu(engine: Engine) -> None:
    code, message = engine.refused(gpus="0")
    assert code == 2
    assert "no GPU: CUDA starts and finds none. vLLM needs one: ask for nvidia.com/gpu" in message


def test_refuses_a_container_without_a_driver(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/libcuda.so.1").touch()  # also where this machine has one
    engine.libraries = tmp_path / "broken"
    code, message = engine.refused()
    assert code == 2
    assert "no GPU: no driver is in this container (" in message


def test_refuses_fewer_gpus_than_the_model_is_divided_over(engine: Engine) -> None:
    engine.configure(tensor_parallel=4, pipeline_parallel=2)
    code, message = engine.refused(gpus="2")
    assert code == 2
    assert "takes 8 GPUs, and this container has 2: ask for 8 nvidia.com/gpu" in message


def test_refuses_an_image_without_vllm(engine: Engine, tmp_path: Path) -> None:
    engine.configure(program=str(tmp_path / "absent"))
    code, message = engine.refused()
    assert code == 2
    assert f"there is no vLLM at {tmp_path}/absent: deploy the image of variant cuda" in message


def test_refuses_weights_that_differ_from_their_manifest(engine: Engine) -> None:
    (engine.weights / "config.json").write_text('{"auto_map": {}}')
    code, message = engine.refused()
    assert code == 4
    assert "config.json has sha256" in message


def test_refuses_a_node_without_the_release(engine: Engine, tmp_path: Path) -> None:
    engine.configure(path=str(tmp_path / "none"), manifest=str(tmp_path / "none/SHA256SUMS"))
    code, message = engine.refused()
    assert code == 4
    assert "cannot read the manifest" in message


@pytest.mark.parametrize("option", ["trust_remote_code", "api_key", "options"])
def test_refuses_options_that_it_does_not_know(engine: Engine, option: str) -> None:
    engine.configure(**{option: "x"})
    code, message = engine.refused()
    assert code == 2
    assert f"unknown key 'model.vllm.{option}'" in message


def test_leaves_to_vllm_what_is_not_set() -> None:
    paths = {"path": Path("/m"), "manifest": Path("/m/SHA256SUMS")}
    words = vllm.arguments("m", Path("/s"), 25.0, VllmModel(driver="vllm", context=64, **paths))
    names = {word.partition("=")[0] for word in words}
    assert not names & {"--quantization", "--max-num-seqs", "--max-num-batched-tokens"}
    assert "--shutdown-timeout=25" in words


def test_a_start_is_bounded_by_the_size_of_the_weights(engine: Engine) -> None:
    with (engine.weights / "model.safetensors").open("wb") as file:
        file.truncate(472 * 10**9)
    assert probe.load_seconds(engine.config, 600, 200) == pytest.approx(600 + 2 * 2360, abs=1)


def test_a_start_that_takes_longer_is_given_up(engine: Engine) -> None:
    argv = [sys.executable, "-m", "llmserve.engine.probe", str(engine.socket), "--loads", str(engine.config)]
    done = subprocess.run([*argv, "--base", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert "0 s that --base and --rate allow are over" in done.stderr


def test_the_probe_of_a_start_waits_for_it(engine: Engine) -> None:
    process = engine.start()
    assert probe.never_loads(engine.socket, 5, 60) is None
    process.kill()
    process.communicate()


def test_vllm_whose_engine_died_is_not_healthy(tmp_path: Path) -> None:
    class Dead(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *words: object) -> None:
            pass

        def address_string(self) -> str:
            return "the probe"

    with UnixStreamServer(str(tmp_path / "sock"), Dead) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert "vLLM answers GET /health with 503" in (probe.vllm_trouble(tmp_path / "sock", 5) or "")
        thread.join()
