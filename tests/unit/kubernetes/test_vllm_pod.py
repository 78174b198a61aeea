"""The pod of overlay gpu, started on this machine as test_pod.py does, with stand-ins for vLLM and libcuda."""

import http.client
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kustomized import containers
from namespaces import inside
from plugin_modules import ROOT
from pod_given import MODEL, Given, pod_given, tiny_weights
from pod_here import SERVING, PodHere, capable, pod_here
from waiting import until

START_SECONDS = 120
LIBCUDA = "/usr/local/lib/libcuda.so.1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    capable()
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return pod_given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by their path in a container."""
    folder = tmp_path_factory.mktemp("standins")
    program = folder / "vllm"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT}/tests/doubles/vllm exec {SERVING}/python -m vllm "$@"\n'
    )
    subprocess.run([ROOT / "tests/doubles/nvml/build.sh", folder], check=True)
    return {"/opt/vllm/bin/vllm": program, LIBCUDA: folder / "libcuda.so.1"}


def started(pod: PodHere, name: str) -> None:
    """Start a container; its startup probe passes, at once or, with vLLM, by waiting itself."""
    process = pod.start(name)
    probe = pod.container(name).get("startupProbe")

    def passed() -> bool:
        assert process.poll() is None, pod.log(name)
        return probe is None or pod.execute(name, probe["exec"]["command"]).returncode == 0

    until(passed, START_SECONDS)


@pytest.fixture(scope="module")
def pod(
    tmp_path_factory: pytest.TempPathFactory, given: Given, weights: Path, standins: dict[str, Path]
) -> Iterator[PodHere]:
    """All containers, in their order."""
    folder = tmp_path_factory.mktemp("pod")
    with pod_here(folder, given, weights, overlay="overlays/gpu", standins=standins) as made:
        for name in containers(made.spec):
            started(made, name)
        yield made


def answer(pod: PodHere) -> tuple[int, str]:
    """Status and body; 0 while the edge refuses connections."""
    context = ssl.create_default_context(cadata=pod.held["test"]["ca.crt"].decode())
    link = http.client.HTTPSConnection("127.0.0.1", 8443, context=context, timeout=60)
    headers = {
        "Authorization": f"Bearer {pod.held['test']['ada'].decode()}",
        "Content-Type": "application/json",
    }
    body = {"model": MODEL, "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 2}
    try:
        with inside(pod.network):
            link.connect()
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = link.getresponse()
        return response.status, response.read().decode()
    except OSError as problem:
        return 0, str(problem)
    finally:
        link.close()


def test_vllm_answers_through_the_edge(pod: PodHere) -> None:
    until(lambda: answer(pod)[0] == 200, START_SECONDS)
    choices = json.loads(answer(pod)[1])["choices"]
    assert choices[0]["message"]["content"] == "one two "


def test_the_engine_is_vllm_without_rights(pod: PodHere) -> None:
    process = pod.processes["engine"].pid
    assert b"vllm\0serve\0" in Path(f"/proc/{process}/cmdline").read_bytes()
    status = Path(f"/proc/{process}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_its_liveness_probe_asks_vllm(pod: PodHere) -> None:
    command = pod.container("engine")["livenessProbe"]["exec"]["command"]
    assert pod.execute("engine", command).returncode == 0


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp"])
def test_it_can_write_what_it_shares_and_compiles(pod: PodHere, place: str) -> None:
    assert pod.execute("engine", ["/usr/bin/touch", f"{place}/here"]).returncode == 0
    assert "Read-only" in pod.execute("engine", ["/usr/bin/touch", "/opt/vllm/here"]).stderr


def test_a_start_without_a_gpu_says_what_to_do(
    tmp_path: Path, given: Given, weights: Path, standins: dict[str, Path]
) -> None:
    (tmp_path / "none").touch()  # no library
    without = {**standins, LIBCUDA: tmp_path / "none"}
    with pod_here(tmp_path, given, weights, overlay="overlays/gpu", standins=without) as made:
        assert made.start("engine").wait(START_SECONDS) == 2
        assert "no GPU: no driver is in this container" in made.log("engine")


def test_damaged_weights_never_start(
    tmp_path: Path, given: Given, weights: Path, standins: dict[str, Path]
) -> None:
    damaged = tmp_path / "weights"
    shutil.copytree(weights, damaged)
    with (damaged / MODEL / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pod_here(tmp_path, given, damaged, overlay="overlays/gpu", standins=standins) as made:
        assert made.start("engine").wait(START_SECONDS) == 4
        assert "model.safetensors" in made.log("engine")


def test_vllm_ends_when_it_is_told_to(pod: PodHere) -> None:
    """The last test: the pod has none after it."""
    assert pod.stop("engine") == 0
