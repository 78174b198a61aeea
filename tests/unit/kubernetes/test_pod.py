"""What the manifests describe, started on this machine as they say: their programs, users, files, volumes and probes."""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_keys import ClusterKeys
from kustomized import containers
from namespaces import inside
from pod_given import MODEL, Given, pod_given, tiny_weights
from pod_here import SERVING, PodHere, capable, pod_here
from prometheus_here import prometheus_here
from rendered_prometheus import job_of_pods, watching_pods
from waiting import until

from llmkeep.record import pods, witness
from llmkeep.record.witness import Kept
from llmproof.heads import stated

START_SECONDS = 120


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with a tiny one under the name of the manifests'."""
    capable()
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """The estate's Secrets, and its signed policy."""
    return pod_given(tmp_path_factory.mktemp("given"))


def starts(pod: PodHere, name: str) -> None:
    """Start a container, and wait for its startup probe, as kubelet does before it starts the next one."""
    process = pod.start(name)
    probe = pod.container(name).get("startupProbe")

    def passed() -> bool:
        assert process.poll() is None, pod.log(name)
        return probe is None or pod.execute(name, probe["exec"]["command"]).returncode == 0

    until(passed, START_SECONDS)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, given: Given, weights: Path) -> Iterator[PodHere]:
    """All containers, each started once the one before it had passed its startup probe, and ready; ops1 scrapes it."""
    with pod_here(tmp_path_factory.mktemp("pod"), given, weights, scraped_by="ops1") as made:
        for name in containers(made.spec):
            starts(made, name)
        until(lambda: asked(made, probed(made)["path"])[0] == 200, START_SECONDS)
        yield made


def probed(pod: PodHere) -> dict[str, Any]:
    """The readiness probe of the edge."""
    found: dict[str, Any] = pod.container("edge")["readinessProbe"]["httpGet"]
    assert (found["scheme"], found["port"]) == ("HTTPS", "https")
    return found


def connected(
    pod: PodHere,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    port: str = "https",
    certificate: Path | None = None,
) -> http.client.HTTPSConnection:
    """A client in the pod's network. CERTIFICATE: with the key beside it."""
    context = ssl.create_default_context(cadata=pod.held["test"]["ca.crt"].decode())
    context.maximum_version = version
    if certificate:
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    ports = {each["name"]: each["containerPort"] for each in pod.container("edge")["ports"]}
    link = http.client.HTTPSConnection("127.0.0.1", ports[port], context=context, timeout=60)
    with inside(pod.network):
        link.connect()
    return link


def asked(pod: PodHere, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and answer; 0 without a connection."""
    headers = {
        "Authorization": f"Bearer {pod.held['test']['ada'].decode()}",
        "Content-Type": "application/json",
    }
    try:
        link = connected(pod)
        link.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = link.getresponse()
        return answer.status, answer.read().decode()
    except OSError as problem:
        return 0, str(problem)


def question(words: int = 4) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": words}
    return {**asked, "temperature": 0}


def test_a_question_is_answered_and_on_record(pod: PodHere) -> None:
    status, answer = asked(pod, "/v1/chat/completions", question())
    assert status == 200, answer
    assert json.loads(answer)["usage"]["completion_tokens"] > 0
    record = str(pod.volumes["record"] / "record")
    argv = [str(SERVING / "llm-audit"), "show", "--json", record]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert '"ada"' in shown


def look_at(pod: PodHere, kept: Kept) -> None:
    """One look of the witness at the pod's record, which has to say something of it."""
    done = pod.execute(pods.CONTAINER, pods.look(kept.end()[0], kept.seen()))
    assert witness._keep(kept.folder, done.stdout) == ""


def test_the_witness_keeps_the_heads_and_leaves_what_it_saw_to_the_writer(
    pod: PodHere, tmp_path: Path
) -> None:
    kept = Kept(tmp_path)
    assert pod.stop("audit") == 0  # it signs a head before it goes, or the next one after a minute
    pod.start("audit")
    until(lambda: asked(pod, "/v1/chat/completions", question())[0] == 200)
    look_at(pod, kept)
    assert kept.data()
    look_at(pod, kept)
    place = containers(pod.spec)["audit"]["env"]
    (file,) = (each["value"] for each in place if each["name"] == "LLM_AUDIT_SEEN")
    left = pod.execute("audit", ["/usr/bin/cat", file]).stdout.encode()
    assert stated(left)[1].size == stated(kept.seen())[1].size


def scraped(pod: PodHere, certificate: Path | None, path: str = "/gateway-1") -> tuple[int, str]:
    """Status and answer at the port for metrics."""
    link = connected(pod, port="metrics", certificate=certificate)
    link.request("GET", path)
    answer = link.getresponse()
    return answer.status, answer.read().decode()


ANSWERED = 'llm_requests_total{route="/v1/chat/completions",status="200"}'


def answered(pod: PodHere, certificate: Path) -> float:
    """How many questions were answered, as Prometheus sees it."""
    status, metrics = scraped(pod, certificate)
    assert status == 200, metrics
    return sum(float(line.split()[1]) for line in metrics.splitlines() if line.startswith(f"{ANSWERED} "))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, given: Given) -> Path:
    """A folder with the certificates of hosts, and of one that another authority has certified."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, content in given["test"].items():
        (folder / name).write_bytes(content)
    (folder / "other").mkdir()
    ClusterKeys(folder / "other", []).issued("ops1")
    return folder


def test_prometheus_sees_the_question_that_was_asked(pod: PodHere, certificates: Path) -> None:
    before = answered(pod, certificates / "ops1.crt")
    assert asked(pod, "/v1/chat/completions", question())[0] == 200
    assert answered(pod, certificates / "ops1.crt") == before + 1


def test_the_estates_prometheus_stores_them_under_the_pods_name(
    pod: PodHere, certificates: Path, tmp_path: Path
) -> None:
    made = watching_pods(tmp_path, "localhost", [{"name": "llm-0", "address": "127.0.0.1", "port": 9443}])
    labels = 'job="gateway",instance="main.llm-0",cluster="main",gateway="1"'
    with (
        inside(pod.network),
        prometheus_here(tmp_path, [job_of_pods(made, certificates)]) as query,
    ):
        until(lambda: query(f"llm_engine_up{{{labels}}} == 1"))


@pytest.mark.parametrize(
    ("certificate", "status"),
    [(None, 400), ("llm1.crt", 403), ("other/ops1.crt", 400)],
    ids=["no certificate", "another host's", "another authority's"],
)
def test_a_client_that_is_not_prometheus_gets_no_metrics(
    pod: PodHere, certificates: Path, certificate: str | None, status: int
) -> None:
    said = scraped(pod, certificates / certificate if certificate else None)
    assert said[0] == status
    assert "llm_" not in said[1]


@pytest.mark.parametrize("path", ["/", "/metrics", "/readyz", "/v1/models", "/generate?prompt=hello"])
def test_prometheus_gets_nothing_but_metrics(pod: PodHere, certificates: Path, path: str) -> None:
    assert scraped(pod, certificates / "ops1.crt", path)[0] == 404


@pytest.mark.parametrize("port", ["https", "metrics"])
def test_the_edge_speaks_tls_1_3_alone(pod: PodHere, certificates: Path, port: str) -> None:
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        connected(pod, ssl.TLSVersion.TLSv1_2, port, certificates / "ops1.crt")


def test_an_edge_that_was_not_asked_for_metrics_has_one_port(
    tmp_path: Path, given: Given, weights: Path
) -> None:
    with pod_here(tmp_path, given, weights) as made:
        edge = made.start("edge")
        until(lambda: edge.poll() is not None or asked(made, "/readyz")[0] == 503)
        assert listening(edge.pid) == {8443}, made.log("edge")


def listening(pid: int) -> set[int]:
    """The TCP ports that are open in a process' network."""
    tables = [Path(f"/proc/{pid}/net/{each}").read_text() for each in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def test_no_container_has_a_capability_or_can_gain_one(pod: PodHere) -> None:
    users = {}
    for name, process in pod.processes.items():
        status = Path(f"/proc/{process.pid}/status").read_text()
        said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert {said[each] for each in ("CapPrm", "CapEff", "CapBnd", "CapInh")} == {"0" * 16}, name
        assert said["NoNewPrivs"] == "1", name
        users[name] = int(said["Uid"].split()[0])
    assert users == {
        "policy": 10004,
        "opa": 10004,
        "audit": 10003,
        "engine": 10002,
        "edge": 10005,
        "gateway": 10001,
    }


def test_the_engine_can_open_no_socket_in_the_network_that_it_shares_with_the_policy(pod: PodHere) -> None:
    status = Path(f"/proc/{pod.processes['engine'].pid}/status").read_text().splitlines()
    assert "Seccomp_filters:\t1" in status


@pytest.mark.parametrize(
    ("container", "path"),
    [
        ("engine", "/etc/llmkeep/credentials"),
        ("engine", "/var/log/llm-audit"),
        ("edge", "/etc/llmkeep/credentials"),
        ("edge", "/run/llm-audit"),
        ("edge", "/run/llm-engine"),
        ("gateway", "/var/log/llm-audit"),
        ("gateway", "/etc/llmkeep/edge-tls"),
        ("opa", "/etc/llmkeep/credentials"),
    ],
)
def test_a_container_does_not_have_what_it_does_not_need(pod: PodHere, container: str, path: str) -> None:
    assert pod.execute(container, ["/usr/bin/ls", path]).returncode == 2


@pytest.mark.parametrize(
    ("container", "path"),
    [
        ("engine", "/srv/llmkeep/models/more"),
        ("gateway", "/run/llm-audit/more"),
        ("audit", "/etc/more"),
        ("edge", "/more"),
    ],
)
def test_a_container_cannot_write_elsewhere(pod: PodHere, container: str, path: str) -> None:
    done = pod.execute(container, ["/usr/bin/touch", path])
    assert "Read-only file system" in done.stderr


def test_an_answer_that_was_begun_is_completed_by_a_pod_that_stops(pod: PodHere) -> None:
    begun = time.monotonic()
    asked(pod, "/v1/chat/completions", question(100))
    # An answer of some 12 seconds on this machine: longer than preStop, and shorter than it and drain_seconds.
    words = min(1000, int(12 * 100 / (time.monotonic() - begun)))
    link = connected(pod)
    body = json.dumps({**question(words), "stream": True})
    headers = {
        "Authorization": f"Bearer {pod.held['test']['ada'].decode()}",
        "Content-Type": "application/json",
    }
    link.request("POST", "/v1/chat/completions", body, headers)
    answer = link.getresponse()
    assert answer.readline().startswith(b"data: ")
    with ThreadPoolExecutor() as pool:
        quits = pod.container("edge")["lifecycle"]["preStop"]["exec"]["command"]
        assert pod.execute("edge", [each.replace("sleep 23", "sleep 0") for each in quits]).returncode == 0
        stopped = pool.submit(pod.stop, "gateway")
        assert answer.read().endswith(b"data: [DONE]\n\n")
        link.sock.settimeout(5)  # half of what an idle connection is kept for
        assert link.sock.recv(1) == b""  # so that the client asks another replica next
        assert stopped.result() == 0
    assert '"message":"draining","in_flight":1' in pod.log("gateway")
    assert pod.processes["edge"].wait(START_SECONDS) == 0
    for name in reversed(list(containers(pod.spec))[:-1]):  # its sidecars, the last one first
        pod.stop(name)


def test_damaged_weights_never_start(tmp_path: Path, given: Given, weights: Path) -> None:
    damaged = tmp_path / "weights"
    shutil.copytree(weights, damaged)
    with (damaged / MODEL / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pod_here(tmp_path, given, damaged) as made:
        assert made.start("engine").wait(START_SECONDS) == 4
        assert "model.safetensors" in made.log("engine")
