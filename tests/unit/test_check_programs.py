"""Programs that roles' checks run on a host."""

import http.server
import io
import json
import os
import re
import socketserver
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_bundle
from plugin_modules import ROOT


def ran(program: str, *words: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As a check runs it: its text after -c."""
    argv = [sys.executable if program.endswith(".py") else "sh", "-c", (ROOT / "roles" / program).read_text()]
    if not program.endswith(".py"):
        argv.append("check")
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(
        [*argv, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )


def program(folder: Path, name: str, text: str) -> Path:
    """A stand-in for a program of the host; returns the folder for PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Path]:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 401)
            self.end_headers()
            self.wfile.write(b"no key")

        def address_string(self) -> str:
            return "client"

        def log_message(self, *_: object) -> None: ...

    with socketserver.UnixStreamServer(str(tmp_path / "1.sock"), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "1.sock"
        server.shutdown()


def test_a_gateway_has_to_answer_with_the_status(gateway: Path) -> None:
    assert ran("llm_serving/files/gateway_status.py", "200", "/readyz", gateway).returncode == 0
    told = ran("llm_serving/files/gateway_status.py", "200", "/v1/models", gateway)
    assert (told.returncode, told.stderr) == (1, f"{gateway}: 401 no key\n")


@pytest.mark.parametrize(
    ("revisions", "patience", "found"), [([6, 7], 600.0, True), ([6], 0.0, False), ([7], 0.0, True)]
)
def test_gateways_have_some_seconds_in_all_to_take_in_the_policy_in_place(
    tmp_path: Path, revisions: list[int], patience: float, found: bool
) -> None:
    """The last revision is shown for ever."""
    (tmp_path / "revision").write_text("7\n")

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            shown = revisions.pop(0) if len(revisions) > 1 else revisions[0]
            self.wfile.write(
                f'llm_policy_engine{{engine="server"}} 1\nllm_policy_revision {shown}\n'.encode()
            )

        def log_message(self, *_: object) -> None: ...

    text = (ROOT / "roles/llm_serving/files/gateway_policy.py").read_text()
    text = text.replace("/var/lib/llmkeep/policy", str(tmp_path)).replace(
        "PATIENCE = 10.0", f"PATIENCE = {patience}"
    )
    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports = [str(server.server_port)] * 2
        done = subprocess.run(
            [sys.executable, "-c", text, "server", *ports], capture_output=True, text=True, check=True
        )
        server.shutdown()
    checks = json.loads(done.stdout)["checks"]
    assert (checks["engine"]["ok"], checks["revision"]["ok"]) == (True, found)


@pytest.mark.parametrize(
    ("kind", "serial", "code"), [("bundle", 6, 1), ("bundle", 7, 0), ("bundle", 8, 0), ("image", 8, 1)]
)
def test_a_bundle_is_one_and_may_not_be_older_than_one_that_was_seen(
    kind: str, serial: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"type": kind, "serial": serial}))
    (tmp_path / "serial").write_text("7\n")
    told = ran("mirror/files/bundle_serial.py", tmp_path / "MANIFEST.json", tmp_path / "serial")
    assert (told.returncode, told.stdout) == (code, f"served {kind} {serial}, seen 7\n")


@pytest.mark.parametrize(("kind", "told"), [("bundle", ""), ("image", "is not signed as bundle")])
def test_folders_of_the_mirror_are_signed_as_what_they_are(kind: str, told: str, tmp_path: Path) -> None:
    keys = small_bundle.signing_keys(tmp_path)
    place, keyring = tmp_path / "place", keys / "keyring.pgp"
    small_bundle.sign(small_bundle.write(place / "one", keys), keys, 7, 30, kind)
    done = ran("mirror/files/folder-signatures.sh", place, "MANIFEST.json", keyring, "bundle")
    assert (done.returncode, told in done.stdout) == (int(bool(told)), True), done.stdout


def test_opa_is_asked_for_an_action_that_the_policy_grants(tmp_path: Path) -> None:
    roles = json.dumps({"auditor": {"actions": []}, "user": {"actions": ["POST /generate"]}}).encode()
    with tarfile.open(tmp_path / "bundle.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("llm/roles/data.json")
        member.size = len(roles)
        archive.addfile(member, io.BytesIO(roles))
    text = (ROOT / "roles/opa/files/granted_action.py").read_text()
    asked = text.replace("/usr/local/lib/llmkeep/opa-query", "/bin/echo")
    told = subprocess.run(
        [sys.executable, "-c", asked, tmp_path / "bundle.tar.gz"], capture_output=True, text=True, check=True
    )
    method, path, body = told.stdout.split(maxsplit=2)
    assert (method, path) == ("POST", "/v1/data/llm/authz/decision")
    assert json.loads(body)["input"]["roles"] == ["user"]
    assert json.loads(body)["input"]["action"] == "POST /generate"


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[str, list[bytes]]]:
    """The program that asks Prometheus, and the next answers: an empty one is the 503 while the log is replayed."""
    argv: list[str | Path] = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj", "/CN=ops1",
        "-addext", "subjectAltName=DNS:ops1", "-keyout", tmp_path / "host.key", "-out", tmp_path / "host.pem"]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True)
    (tmp_path / "root.pem").symlink_to("host.pem")
    answers: list[bytes] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.pop(0)
            self.send_response(200 if body else 503)
            self.end_headers()
            self.wfile.write(body or b"Service Unavailable")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "host.pem", tmp_path / "host.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = (ROOT / "roles/prometheus/files/ask_prometheus.py").read_text()
        text = text.replace("/etc/llmkeep/pki", str(tmp_path)).replace("9090", str(server.server_port))
        yield text.replace("sleep(0.5)", "sleep(0.01)"), answers
        server.shutdown()


@pytest.mark.parametrize(
    ("words", "answers", "told"),
    [
        (["0", "rules"], [{"groups": [{"rules": [{"name": "A", "health": "ok"}]}]}], "1 rules, none broken"),
        (["0", "retention"], [{"time": "90d", "size": "8GiB"}], f"90 days, {8 * 1024**3} bytes"),
        (["0", "retention"], [{"time": "1y", "size": "1GiB476MiB"}], f"365 days, {1500 * 1024**2} bytes"),
        (["0", "targets", "1"], [{"activeTargets": [{"health": "up"}]}], "1 targets are up"),
    ],
)
def test_prometheus_is_waited_for_while_it_replays_its_log(
    prometheus: tuple[str, list[bytes]], words: list[str], answers: list[dict[str, object]], told: str
) -> None:
    text, queue = prometheus
    names = {"time": "storage.tsdb.retention.time", "size": "storage.tsdb.retention.size"}
    named = [{names.get(key, key): value for key, value in each.items()} for each in answers]
    queue += [b"", b"", *(json.dumps({"data": each}).encode() for each in named)]
    done = subprocess.run(
        [sys.executable, "-c", text, "ops1", *words], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{told}\n", "")


@pytest.mark.parametrize(
    ("states", "times"), [("active inactive", 1), ("failed active", 1), ("activating active", 2)]
)
def test_prometheus_is_not_waited_for_once_it_is_stopped(
    prometheus: tuple[str, list[bytes]], tmp_path: Path, states: str, times: int
) -> None:
    """It is stopped at the second look at the latest."""
    text, _ = prometheus
    nothing_listens = re.sub('"prometheus": [0-9]+', '"prometheus": 1', text)
    asked = tmp_path / "asked"
    said = f'[ "$(wc -l < {asked})" = 1 ] && printf "%s\\n" {states} || echo inactive'
    path = program(tmp_path, "systemctl", f"echo >> {asked}\n{said}")
    done = subprocess.run(
        [sys.executable, "-c", nothing_listens, "ops1", "600", "targets", "1"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == "no answer: [Errno 111] Connection refused\n"
    assert len(asked.read_text().splitlines()) == times


def test_restrictions_are_the_kernel_s_a_line_for_each_unit(tmp_path: Path) -> None:
    path = program(tmp_path, "systemctl", f"echo {os.getpid()}")
    lines = ran("_common/files/process-restrictions.sh", "one.service", "two.service", path=path).stdout
    seen, again = lines.splitlines()
    assert seen == again
    assert seen.startswith("CapBnd: ")
    assert "NoNewPrivs: " in seen


def test_a_unit_has_to_run_the_release_that_its_link_names(tmp_path: Path) -> None:
    sleeper = tmp_path / "release/bin/sleep"
    sleeper.parent.mkdir(parents=True)
    sleeper.symlink_to("/bin/sleep")
    (tmp_path / "units").mkdir()
    (tmp_path / "units/one.service").symlink_to(tmp_path / "release")
    with subprocess.Popen([sleeper, "60"]) as process:
        path = program(tmp_path, "systemctl", f"echo {process.pid}")
        good = ran("_common/files/running-release.sh", tmp_path / "units", "one.service", path=path)
        (tmp_path / "units/two.service").symlink_to(tmp_path / "other")
        bad = ran("_common/files/running-release.sh", tmp_path / "units", "two.service", path=path)
        process.kill()
    assert good.returncode == 0
    assert (bad.returncode, bad.stdout) == (1, f"two.service runs another release than {tmp_path}/other\n")


def test_a_job_runs_or_is_done(tmp_path: Path) -> None:
    states = {"active\nsuccess": 0, "failed\nexit-code": 1, "inactive\nsuccess": 1}
    for state, code in states.items():
        path = program(tmp_path, "systemctl", f"printf '{state}\\n'")
        assert ran("llm_training/files/job-states.sh", "job.service", path=path).returncode == code


def test_units_that_nobody_has_are_not_asked_for(tmp_path: Path) -> None:
    path = program(tmp_path, "systemctl", "echo enabled")
    assert ran("llm_training/files/enabled-units.sh", path=path).stdout == ""
    assert ran("llm_training/files/enabled-units.sh", "one.service", path=path).stdout == "enabled\n"


def test_weights_that_may_be_written_to_are_named(tmp_path: Path) -> None:
    assert ran("llm_serving/files/writable-files.sh", tmp_path / "none").stdout == ""
    (tmp_path / "weights").write_text("")
    (tmp_path / "weights").chmod(0o644)
    assert ran("llm_serving/files/writable-files.sh", tmp_path).stdout == f"{tmp_path}/weights\n"
    (tmp_path / "weights").chmod(0o444)
    assert ran("llm_serving/files/writable-files.sh", tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ("VLLM_API_KEY=a-key-of-vllm VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1", "", ""),
        ("VLLM_NO_USAGE_STATS=1", "", "has no key"),
        ("VLLM_API_KEY=a-key-of-vllm", "a-key-of-vllm", "has its key among its arguments"),
        (
            "VLLM_API_KEY=a-key-of-vllm VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1",
            "",
            "runs without DO_NOT_TRACK=1",
        ),
    ],
)
def test_vllm_has_a_key_that_nobody_reads_and_sends_no_statistics(
    environment: str, arguments: str, said: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        ["env", "-i", *environment.split(), sys.executable, "-c", "import time; time.sleep(60)", arguments]
    ) as process:
        while "python" not in Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[0]:
            pass
        path = program(tmp_path, "systemctl", f"echo {process.pid}")
        told = ran("vllm/files/process-environment.sh", "vllm@big.service", path=path)
        process.kill()
    assert (told.returncode, told.stdout) == ((1, f"vllm@big.service {said}\n") if said else (0, ""))


def test_a_gpu_with_too_little_memory_is_named(tmp_path: Path) -> None:
    path = program(tmp_path, "nvidia-smi", "echo 24000")
    assert ran("vllm/files/gpu-memory.sh", "23347", "24G", "0", "1", path=path).returncode == 0
    told = ran("vllm/files/gpu-memory.sh", "46694", "48G", "1", path=path)
    assert (told.returncode, told.stdout) == (1, "GPU 1 has 24000 MiB, declared are 48G\n")


def host_with_switches(folder: Path, version: str, loaded: str, switches: int) -> list[str | Path]:
    """A host's PCI devices, and the fabric manager in a version; the arguments of the program that compares them."""
    bus = folder / "pci"
    bus.mkdir(exist_ok=True)
    for number in range(switches):
        place = bus / f"0000:c{number}:00.0"
        place.mkdir()
        (place / "vendor").write_text("0x10de\n")
        (place / "class").write_text("0x068000\n")
    program(folder, "nv-fabricmanager", f"echo 'Fabric Manager version is : {version}'")
    program(folder, "systemctl", "echo enabled")
    if loaded:
        (folder / "version").write_text(f"NVRM version: NVIDIA UNIX {loaded}  Release Build\n")
    return [bus, folder / "version"]


OPEN, CLOSED = "Open Kernel Module for x86_64  580.105.08", "x86_64 Kernel Module  580.105.08"


@pytest.mark.parametrize(
    ("version", "loaded", "switches", "of_the_set", "code", "says"),
    [
        ("580.105.08", OPEN, 6, "580.105.08", 0, "fabric manager 580.105.08, as the driver"),
        ("580.105.08", CLOSED, 6, "", 0, "fabric manager 580.105.08, as the driver"),
        ("570.1", OPEN, 6, "580.105.08", 1, "the fabric manager is 570.1 and the loaded driver is 580.105.08"),
        ("590.1", OPEN, 6, "590.1", 0, "the driver 590.1 is loaded by the next boot"),
        ("580.105.08", "", 6, "580.105.08", 0, "no driver is loaded: reboot"),
        ("", OPEN, 6, "580.105.08", 1, "6 NVSwitches, and no fabric manager"),
        ("580.105.08", OPEN, 0, "580.105.08", 1, "no NVSwitch is here, and nvidia-fabricmanager.service is enabled"),
    ],
)  # fmt: skip
def test_a_fabric_manager_is_where_switches_are_in_the_version_of_the_loaded_driver(
    version: str, loaded: str, switches: int, of_the_set: str, code: int, says: str, tmp_path: Path
) -> None:
    given = host_with_switches(tmp_path, version, loaded, switches)
    told = ran("gpu/files/fabric-manager.sh", *given, of_the_set, path=tmp_path)
    assert (told.returncode, says in told.stdout) == (code, True), told


def test_a_fabric_manager_is_not_started_before_its_driver_is_loaded(tmp_path: Path) -> None:
    given = host_with_switches(tmp_path, "590.1", OPEN, 1)
    assert ran("gpu/files/fabric-manager.sh", *given, "590.1", "start", path=tmp_path).returncode == 3


def test_ready_is_that_cuda_initialises(tmp_path: Path) -> None:
    given = host_with_switches(tmp_path, "580.105.08", OPEN, 1)
    none = ran("gpu/files/cuda_initialises.py", tmp_path / "none", given[1], "", "0", "nvswitches")
    assert none.returncode == 0
    for version, where in (("580.105.08", "nvswitches"), ("", "always")):
        told = ran("gpu/files/cuda_initialises.py", *given, version, "0", where)
        assert (told.returncode, "libcuda.so.1 cannot be loaded" in told.stdout) == (1, True)


def test_cuda_is_not_asked_for_while_its_driver_waits_for_the_boot(tmp_path: Path) -> None:
    given = host_with_switches(tmp_path, "590.1", OPEN, 1)
    told = ran("gpu/files/cuda_initialises.py", *given, "590.1", "0", "nvswitches")
    assert (told.returncode, told.stdout) == (
        0,
        "the driver 590.1 is loaded by the next boot, 580.105.08 until then\n",
    )
