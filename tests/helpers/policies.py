"""The tree's policy, a control node that signs it, and the real opa if it is available: for tests of the policy."""

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sealing_double

from llmkeep.bundle import cache, programs
from llmkeep.places import Places
from llmkeep.policy import bundle as policy
from llmkeep.source_tree import TREE

SOURCE = TREE / "policy"


def control_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node that was bootstrapped."""
    sealing_double.use(monkeypatch, policy, policy)
    places = Places(folder)
    policy.init(places)
    return places


def opa() -> Path:
    """The real program, or the test is skipped, which is said."""
    with cache.alone():
        found = programs.find("opa")
    if not found:
        pytest.skip("opa is not available here: set LLMKEEP_MIRROR to a folder that has it")
    return found


@contextmanager
def serving(bundle: Path, key: Path, folder: Path) -> Iterator[Path]:
    """OPA with a signed bundle; yields its UNIX socket once it answers."""
    address = folder / "opa.sock"
    server = subprocess.Popen(
        [opa(), "run", "--server", "--addr", f"unix://{address}", "--skip-version-check", "--log-level", "error",
         "--verification-key", key, "--verification-key-id", "policy", "--signing-alg", "ES256",
         "--bundle", bundle],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )  # fmt: skip
    try:
        end = time.monotonic() + 20
        while not _answers(address):
            if server.poll() is not None:
                raise ChildProcessError(server.communicate()[0].decode())
            if time.monotonic() > end:
                raise TimeoutError("opa does not answer")
            time.sleep(0.02)
        yield address
    finally:
        server.kill()
        server.wait()


class Connection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, address: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.address))

    def ask(self, path: str, body: object = None) -> Any:
        """The answer's JSON."""
        self.request("POST" if body is not None else "GET", path, json.dumps(body))
        return json.loads(self.getresponse().read())


def _answers(address: Path) -> bool:
    try:
        Connection(address).ask("/health")
    except OSError:
        return False
    return True
