"""What the role opa installs, with the lock's OPA: a new policy holds within seconds, a foreign one never."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_policy
from waiting import own_port

from llmkeep.bundle import cache, programs

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "roles/opa/files"
KEY = small_policy.new_key()
OPEN = 'package llm.authz\n\ndecision := {"allow": true}\n'
# How roles/opa/templates/config.yaml.j2 is filled in on a host.
TEMPLATE = (ROOT / "roles/opa/templates/config.yaml.j2").read_text()


@dataclass
class Host:
    """A folder in place of a host's root."""

    root: Path
    opa: Path
    port: int

    @property
    def bundle(self) -> Path:
        return self.root / "var/lib/llmkeep/policy/bundle.tar.gz"

    def place(self, bundle: bytes) -> None:
        beside = self.bundle.with_name("new")
        beside.write_bytes(bundle)
        beside.replace(self.bundle)

    def start(self) -> list[subprocess.Popen[bytes]]:
        """The two services, with the role's own configuration and arguments."""
        key = "\n".join(f"      {line}" for line in small_policy.public(KEY).splitlines())
        before, _, after = TEMPLATE.partition("{{ ansible_facts")
        text = before.replace("{{ __opa_port }}", str(self.port)) + key + after.partition("}}")[2]
        config = self.root / "config.yaml"
        config.write_text(text.replace("/var/lib/opa", str(self.root / "state")))
        unit = (ROOT / "roles/opa/templates/opa.service.j2").read_text()
        line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
        _, _, arguments = line.partition("/opa run ")
        for old, new in (
            ("{{ __opa_socket }}", f"{self.root}/opa.sock"),
            ("/etc/opa/config.yaml", str(config)),
            ("/etc/opa/authz.rego", str(FILES / "authz.rego")),
        ):
            assert old in arguments
            arguments = arguments.replace(old, new)
        return [
            subprocess.Popen([sys.executable, FILES / "serve_policy.py", self.bundle, str(self.port)]),
            subprocess.Popen([self.opa, "run", *arguments.split()], stderr=(self.root / "log").open("wb")),
        ]

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        link = http.client.HTTPConnection("opa")
        link.sock = socket.socket(socket.AF_UNIX)
        link.sock.connect(f"{self.root}/opa.sock")
        link.request(method, path, json.dumps(body) if body is not None else None)
        answer = link.getresponse()
        status, text = answer.status, answer.read()
        link.close()
        return status, json.loads(text or b"null")

    def decision(self, action: str = "GET /generate") -> Any:
        asked = {"input": {"subject": "a", "tenant": "t", "roles": ["analyst"], "action": action}}
        return self.ask("POST", "/v1/data/llm/authz/decision", asked)[1].get("result")


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except OSError:
            pass
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host that judges by revision 1."""
    with cache.alone():
        opa = programs.find("opa")
    if not opa:
        pytest.skip("OPA is not available: LLMKEEP_MIRROR names no folder that has it")
    small_policy.write(tmp_path, small_policy.signed(small_policy.files(1), KEY), small_policy.public(KEY))
    host = Host(tmp_path, opa, own_port())
    services = host.start()
    until(lambda: host.ask("GET", "/health?bundles")[0] == 200)
    yield host
    for service in services:
        service.terminate()
        service.wait(10)


def test_a_new_policy_holds_within_seconds_and_no_request_finds_nobody(host: Host) -> None:
    host.place(small_policy.signed(small_policy.files(2), KEY))
    seen: list[int] = []
    end = time.monotonic() + 5
    while time.monotonic() < end and seen[-3:] != [2, 2, 2]:
        seen.append(host.decision()["revision"])
    assert seen[-1] == 2
    assert sorted(seen) == seen


def test_a_policy_that_nobody_or_somebody_else_signed_is_refused_and_the_one_before_stays(host: Host) -> None:
    for bundle, words in (
        (small_policy.packed(small_policy.files(3, rego=OPEN)), "bundle missing .signatures.json file"),
        (
            small_policy.signed(small_policy.files(3, rego=OPEN), small_policy.new_key()),
            "failed to verify JWT",
        ),
        (b"no bundle", "bundle read failed"),
    ):
        host.place(bundle)
        until(lambda told=words: told in (host.root / "log").read_text())  # type: ignore[misc]
        assert host.decision()["revision"] == 1
        assert not host.decision("POST /generate")["allow"]


def test_after_a_restart_it_judges_by_the_last_one_that_was_signed(host: Host) -> None:
    host.place(small_policy.signed(small_policy.files(2), KEY))
    until(lambda: host.decision()["revision"] == 2)
    host.place(b"no bundle")
    host.port = own_port()
    services = host.start()  # on the same socket, which now is the second one's
    until(lambda: host.decision()["revision"] == 2)
    for service in services:
        service.terminate()
        service.wait(10)


CLOSED = [
    ("PUT", "/v1/policies/llm"),
    ("DELETE", "/v1/policies/llm"),
    ("GET", "/v1/policies"),
    ("GET", "/v1/data"),
    ("GET", "/v1/data/llm"),
    ("GET", "/v1/data/llm/authz/decision"),
    ("GET", "/v1/data/system/authz"),
    ("PUT", "/v1/data/system/authz/signing"),
    ("PUT", "/v1/data/llm/roles"),
    ("PATCH", "/v1/data/llm/meta"),
    ("POST", "/v0/data/llm/authz/decision"),
    ("POST", "/v1/query"),
    ("POST", "/v1/compile"),
    ("GET", "/v1/config"),
    ("GET", "/v1/status"),
    ("GET", "/metrics"),
    ("POST", "/"),
    ("GET", "/"),
]


def test_it_tells_by_which_key_a_policy_has_to_be_signed(host: Host) -> None:
    assert host.ask("GET", "/v1/data/system/authz/signing") == (200, {"result": {"keyid": "policy"}})


def test_nothing_but_decision_revision_signing_and_health_is_open(host: Host) -> None:
    answers = {f"{method} {path}": host.ask(method, path, {})[0] for method, path in CLOSED}
    assert answers == dict.fromkeys(answers, 401)
    assert host.ask("GET", "/v1/data/llm/meta")[1]["result"]["revision"] == 1


def test_the_role_s_check_sees_that_the_rest_is_closed(host: Host) -> None:
    program = (FILES / "closed_api.py").read_text().replace("/run/opa/opa.sock", f"{host.root}/opa.sock")
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["401"] * 9


def test_the_rules_of_its_socket_are_formatted_and_strict(host: Host) -> None:
    for check in (["fmt", "--fail", "--list"], ["check", "--strict"]):
        done = subprocess.run(
            [host.opa, *check, FILES / "authz.rego"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
